"""The base of every error that a user can mend, and other libraries' errors in one line."""


class UserError(Exception):
    """The message names what is wrong (the file, row or key) and the fix; jobs print it without a traceback."""


def one_line(error: BaseException, max_characters: int = 300) -> str:
    """An error of another library as a phrase inside a message of ours."""
    return " ".join(f"{type(error).__name__} {error}".split())[:max_characters]
