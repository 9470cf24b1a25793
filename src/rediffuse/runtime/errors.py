"""The error that a user can fix: it names the parameter or file, the value, what is allowed, the remedy."""


class UserError(Exception):
    """Wrong parameters, data or weights.  A stage prints its text without a traceback and exits with 1."""
