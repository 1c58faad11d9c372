"""The two ways a run ends that are nobody's bug; everything else keeps its traceback."""

import re

_WEB_QUERY = re.compile(r"""(https?://[^?'"\n]*)\?\S*?(?=['"]?[.:;,)\]}]*(?:\s|$))""")


def without_queries(text: str) -> str:
    """The text with its web addresses up to their question marks: what follows may be a signature or a token."""
    return _WEB_QUERY.sub(r"\1", text)


class UserError(Exception):
    """A mistake in a setting or an input.

    The message is one paragraph: which setting, what it was, what would do. Entry points print it without a traceback and
    exit with status 2, and retries are pointless. Messages quote what users wrote, so of web addresses in it the query is left
    out: it may be a key.
    """

    exit_status = 2

    def __init__(self, message: str):
        super().__init__(without_queries(message))


class TrainingError(UserError):
    """Training had to stop although its settings were valid: a loss that is not finite, a full disk. Exit status 1."""

    exit_status = 1
