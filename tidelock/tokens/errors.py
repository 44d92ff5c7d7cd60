"""Errors that are the user's to mend."""


class UserError(Exception):
    """Bad input. The message is one line: what was wrong, where, what to do."""


class NotAnExtension(UserError):
    """A conversation cannot go on from the ids it has: its template would show the model other ids now."""
