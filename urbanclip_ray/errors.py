"""The base of every error that a user can mend."""


class UserError(Exception):
    """The message names what is wrong (the file, row or key) and the fix; jobs print it without a traceback."""
