"""Files on the web, by fsspec. What follows the question mark of a URL goes with every request, and nowhere else.

It may be a key: the signature of a pre-signed URL, a token. So it is no part of the paths by which files are known, and with
that of no manifest, log or message. What a server answers is told as the error of a file; fsspec would call a refusal, a
server that is busy and a connection that fails a file that does not exist.
"""

import errno
from typing import Any

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

_ERRNO = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 410: errno.ENOENT}
_BEYOND_THE_END = 416  # fsspec takes it for no bytes


class Web(HTTPFileSystem):
    """The web as one asks with a query, or none.

    Args:
        query: with its question mark.
    """

    def __init__(self, query: str = "", **options: Any):
        super().__init__(client_kwargs={"raise_for_status": _explained}, **options)
        self._query = query

    def encode_url(self, url: str) -> yarl.URL:
        """The URL of a request. A signature is of the query as it was given, so not one letter of that is quoted anew."""
        return yarl.URL(str(super().encode_url(url)) + self._query, encoded=True) if self._query else super().encode_url(url)

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await super()._info(url, **options)
        except FileNotFoundError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError):
                raise FileNotFoundError(*cause.args) from None
            if isinstance(cause, OSError):
                raise cause from None
            raise OSError(errno.EIO, type(cause).__name__, url) from None  # whose text may have the whole URL
        return found


async def _explained(answer: aiohttp.ClientResponse) -> None:
    """Raises `OSError` for an answer that is none."""
    if answer.status >= 400 and answer.status != _BEYOND_THE_END:
        number = _ERRNO.get(answer.status, errno.EIO)
        raise OSError(number, f"{answer.status} {answer.reason}", str(answer.url.with_query(None).with_fragment(None)))
