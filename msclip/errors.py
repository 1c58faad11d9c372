"""The two ways a run ends that are nobody's bug; everything else keeps its traceback."""

import re

# A last net, which rather hides too much than tells a key: messages should print `Folder.url`, which has no query.
_PROSE_OR_GLOB = r"""(?:[\s.:;,!?)\]}'"]* | [?*]*\.(?-i:[a-z]{1,7})['"]?[.:;,)\]}]*) (?:\s|$)"""
_WEB_QUERY = re.compile(
    rf"""(https?:// (?:[^?\n] | \?(?={_PROSE_OR_GLOB}))*)
    \? (?:
        (?:(?!\s\S*://[^\s?]*\?).)* [&;?][^\s=&;?]+=\S*?  # over spaces to the last parameter, or up to another such address
        | (?!{_PROSE_OR_GLOB}) \S+?
    )
    (?=['"]?[.:;,)\]}}]* (?:\s|$))""",
    re.IGNORECASE | re.VERBOSE,
)


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
