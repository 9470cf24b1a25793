"""The error a user can mend: its message names the parameter or file, what was found, what is allowed, and what to do."""


class UserError(Exception):
    """Wrong input from outside: parameters, data, weights.  Stages print its text without a traceback and exit with 1."""
