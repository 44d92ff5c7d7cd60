"""The founder's numbers, as code: every one is a definition in words and the SQL that gives it (`metrics`).

`replay` computes the same numbers a second time in plain Python from the ledger's entries; the two must agree to the
nano. Ratios and growth are made from those integers in `ratios` and `growth`. Months are UTC and half-open.
"""
