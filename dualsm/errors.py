"""The one exception for a user's mistake."""


class UserError(Exception):
    """A mistake the user can mend: its text says what is wrong, where, and what to do."""
