"""Errors that are the user's to mend."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, what to do."""
