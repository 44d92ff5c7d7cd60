"""Three records of the same business, compared: what upstreams (or our own traces) say was used, what the ledger took for
it, and what invoices and payments say. `kinds` names what can differ; `usage`, `traces` and `money` look; `job` runs them."""
