"""Requests to S3 through boto3: the one place that says what is asked again, how often, and counts it.

What fails on the way (a connection, a time limit, `SlowDown` and the other 5xx) botocore repeats, with random pauses that grow.
A body that ends early is read on from where it broke off, of the same version of the object or not at all. A write that is
refused because its first answer was lost is told from somebody else's by a mark in the object's metadata.
"""

import contextlib
import errno
import os
import random
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from msclip.errors import UserError

ATTEMPTS = 10
_CONNECT_SECONDS, _SILENCE_SECONDS, _LONGEST_PAUSE = 10, 30, 20.0
_CONNECTIONS = 32
_ERRNO = {401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 409: errno.EAGAIN, 412: errno.EEXIST, 501: errno.ENOTSUP}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
"""Answered with status 400; a HEAD has no body that could say so."""
_making = threading.Lock()


class _Count:
    def __init__(self) -> None:
        self._count, self._lock = 0, threading.Lock()

    def add(self, count: int) -> None:
        with self._lock:
            self._count += count

    def take(self) -> int:
        """The count since it was taken last."""
        with self._lock:
            count, self._count = self._count, 0
        return count


repeated = _Count()
"""Requests that this process had to repeat, and what processes that work for it add of theirs."""


@lru_cache(maxsize=8)
def _client(region: str | None, endpoint: str | None, process: int) -> Any:
    """One for each process: connections must not cross a fork."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    config = Config(
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_SILENCE_SECONDS,
        max_pool_connections=_CONNECTIONS,
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
    )
    try:
        client = boto3.session.Session().client("s3", region_name=region, endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:  # an unknown profile, an endpoint that is no URL
        raise UserError(f"cannot use S3: {error}") from error
    client.meta.events.register("needs-retry.s3", lambda attempts, **_: repeated.add(attempts > 1))
    return client


@dataclass(frozen=True)
class Requests:
    """What a store can be asked. Paths are bucket/key."""

    region: str | None = None
    """None to go by the environment, or ask the bucket."""
    endpoint: str | None = None
    """None for the environment's, or Amazon's."""

    @property
    def client(self) -> Any:
        """For requests inside `explained`."""
        with _making:
            return _client(self.region, self.endpoint, os.getpid())

    def head(self, path: str) -> dict[str, Any]:
        """Size, version and metadata of an object.

        Raises:
            FileNotFoundError: there is none.
        """
        with explained(path):
            found: dict[str, Any] = self.client.head_object(**place(path))
        return found

    def read(self, path: str, start: int = 0, stop: int | None = None, etag: str | None = None) -> bytearray:
        """Some bytes of an object, in one request and as many more as it takes to have them all.

        Args:
            stop: None for all from the start.
            etag: of the version that must be read; None for the newest.

        Raises:
            FileNotFoundError: there is no such object.
            OSError: the store gave up; or the object was replaced meanwhile.
        """
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        held, failures = bytearray(), 0
        while stop is None or start + len(held) < stop:
            at = start + len(held)
            wanted = {"IfMatch": etag} if etag else {}
            if stop is not None:
                wanted["Range"] = f"bytes={at}-{stop - 1}"
            try:
                with explained(path):
                    answer = self.client.get_object(**place(path), **wanted)
            except FileExistsError:
                raise OSError(errno.ESTALE, "it was replaced while it was read", f"s3://{path}") from None
            etag, stop = answer["ETag"], at + answer["ContentLength"]
            try:
                while piece := answer["Body"].read(2**20):
                    held += piece
                    failures = 0
            except (HTTPClientError, IncompleteReadError) as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise OSError(errno.EIO, f"the connection broke off {failures} times: {error}", f"s3://{path}") from error
                repeated.add(1)
                time.sleep(random.uniform(0, min(_LONGEST_PAUSE, 2.0 ** (failures - 2))))
        return held

    def put(self, path: str, data: bytes) -> None:
        """Writes an object in one request; it is there whole or not at all."""
        with explained(path):
            self.client.put_object(**place(path), Body=data)

    def put_new(self, path: str, data: bytes) -> None:
        """Writes an object that must not be there yet: of any number of writers one succeeds.

        Raises:
            FileExistsError: it is there.
            OSError: with errno.ENOTSUP where the store knows no conditions.
        """
        mark = new_mark()
        for _ in range(ATTEMPTS):
            try:
                with explained(path):
                    self.client.put_object(**place(path), Body=data, IfNoneMatch="*", Metadata=mark)
            except FileExistsError:
                if not self.is_marked(path, mark):
                    raise
            except BlockingIOError:  # another write of this key is under way, and only a new attempt tells how it ended
                repeated.add(1)
                time.sleep(random.uniform(0, 0.5))
                continue
            return
        raise OSError(errno.EAGAIN, "others keep writing it", f"s3://{path}")

    def is_marked(self, path: str, mark: dict[str, str]) -> bool:
        """Whether the object there was written with this mark."""
        return bool(self.head(path)["Metadata"].items() >= mark.items())


class Multipart:
    """An object that is written in parts. As a context manager it is there after a body that raised nothing, else never."""

    def __init__(self, store: Requests, path: str):
        self._store, self._path = store, path
        self._mark, self._parts = new_mark(), dict[int, str]()
        with explained(path):
            begun = store.client.create_multipart_upload(**place(path), Metadata=self._mark)
        self._upload = place(path) | {"UploadId": begun["UploadId"]}

    def send(self, number: int, data: bytes) -> None:
        """Part `number`, from 1. Several threads may send."""
        with explained(self._path):
            self._parts[number] = self._store.client.upload_part(**self._upload, PartNumber=number, Body=data)["ETag"]

    def __enter__(self) -> "Multipart":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.complete()
        else:
            self.abort()

    def complete(self) -> None:
        """Makes the object appear."""
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in sorted(self._parts.items())]
        try:
            with explained(self._path):
                self._store.client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts})
        except FileNotFoundError:  # no such upload: it is complete already if only the answer was lost
            if not self._store.is_marked(self._path, self._mark):
                raise

    def abort(self) -> None:
        """Drops the parts, if the store answers; else they stay, and are no object."""
        with contextlib.suppress(OSError), explained(self._path):
            self._store.client.abort_multipart_upload(**self._upload)


def place(path: str) -> dict[str, str]:
    """Bucket and key, as requests call them."""
    bucket, _, key = path.strip("/").partition("/")
    return {"Bucket": bucket, "Key": key}


def new_mark() -> dict[str, str]:
    """Metadata that no other write has."""
    return {"msclip-write": uuid.uuid4().hex}


@contextmanager
def explained(path: str) -> Iterator[None]:
    """Raises botocore's errors as those of files."""
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        CredentialRetrievalError,
        NoCredentialsError,
        PartialCredentialsError,
        SSOError,
        TokenRetrievalError,
    )

    url = f"s3://{path}"
    try:
        yield
    except ClientError as error:
        status, told = error.response["ResponseMetadata"].get("HTTPStatusCode"), error.response.get("Error", {})
        number = _ERRNO.get(status, errno.EIO)
        if status == 400 and told.get("Code") in (*_EXPIRED, "400"):
            number = errno.EACCES
        text = os.strerror(number) if status in (404, 412) else f"{told.get('Code')}: {told.get('Message')}"
        raise OSError(number, text, url) from error
    except (NoCredentialsError, PartialCredentialsError) as error:
        raise UserError(
            f"cannot use {url}: {error}; set AWS_PROFILE or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a "
            "role"
        ) from error
    except (CredentialRetrievalError, SSOError, TokenRetrievalError) as error:
        raise OSError(errno.EACCES, str(error), url) from error
    except BotoCoreError as error:
        raise OSError(errno.EIO, str(error), url) from error
