"""S3 as a pyarrow file system, over `s3_requests`.

pyarrow's own S3, made from a URL, repeats what fails every 0.2 s for 6 s and then gives up. It tells nobody how often, has no
conditional put, and a file whose writer fails halfway is then there, half. Here large reads and writes travel in parts, several
at a time, and what is written appears whole, with its last part.

Region, endpoint and credentials come from where every AWS tool looks for them: AWS_* variables (AWS_ENDPOINT_URL among them),
profiles, roles of the instance or the pod. A URL may name `region`, `endpoint_override` and `scheme`, nothing secret.
"""

import errno
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote

import pyarrow as pa
from pyarrow import fs

from msclip.errors import UserError
from msclip.s3_requests import Multipart, Requests, explained, place

T = TypeVar("T")
PART_BYTES = 8 * 2**20
_MOST_PARTS = 10_000
_THREADS = 8
_SETTINGS = {"region", "endpoint_override", "scheme"}


def connect(location: str, query: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL, and the URL's place in it. Asks nothing of the store.

    Args:
        location: bucket and key as they stand in the URL.
        query: what follows the URL's question mark.

    Raises:
        UserError: no bucket has such a name, or S3 has no such setting.
    """
    settings = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    if unknown := sorted(settings.keys() - _SETTINGS):
        raise UserError(
            f"the URL s3://{location} has a setting {unknown[0]!r}, and S3 knows {', '.join(sorted(_SETTINGS))}; credentials "
            "come from AWS_PROFILE, AWS_ACCESS_KEY_ID or the machine's role"
        )
    bucket, _, key = location.partition("/")
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
        raise UserError(f"the URL s3://{location} names no bucket; write s3://BUCKET/PATH")
    endpoint = settings.get("endpoint_override")
    if endpoint and "://" not in endpoint:
        endpoint = f"{settings.get('scheme', 'https')}://{endpoint}"
    return fs.PyFileSystem(S3(settings.get("region"), endpoint)), f"{bucket}/{unquote(key)}".rstrip("/")


class S3(Requests, fs.FileSystemHandler):
    """What `pyarrow.fs.PyFileSystem` asks of a file system. A folder is what keys begin with, there with its first file."""

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
        return [self._info(path) for path in paths]

    def _info(self, path: str) -> fs.FileInfo:
        try:
            if place(path)["Key"]:
                head = self.head(path)
                return fs.FileInfo(path, fs.FileType.File, size=head["ContentLength"], mtime=head["LastModified"])
        except FileNotFoundError:
            pass
        try:
            below = any(self._list(path, MaxKeys=1))
        except FileNotFoundError:  # the bucket itself
            below = False
        return fs.FileInfo(path, fs.FileType.Directory if below else fs.FileType.NotFound)

    def _list(self, path: str, **options: Any) -> Iterator[dict[str, Any]]:
        """What is below a folder, up to a thousand names at a time; nothing where nothing is."""
        bucket, key = place(path).values()
        with explained(path):
            pages = self.client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=bucket, Prefix=f"{key}/" if key else "", **options):
                if page.get("Contents") or page.get("CommonPrefixes"):
                    yield page

    def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
        base = selector.base_dir.strip("/")
        bucket = place(base)["Bucket"]
        files: list[fs.FileInfo] = []
        folders = {base} if base == bucket else set[str]()
        for page in self._list(base, **({} if selector.recursive else {"Delimiter": "/"})):
            folders |= {base} | {f"{bucket}/{each['Prefix']}".rstrip("/") for each in page.get("CommonPrefixes", ())}
            for each in page.get("Contents", ()):
                path = f"{bucket}/{each['Key']}"
                if path.endswith("/"):  # a mark that some tools make for a folder
                    folders.add(path.rstrip("/"))
                else:
                    files.append(fs.FileInfo(path, fs.FileType.File, size=each["Size"], mtime=each["LastModified"]))
                    while (path := path.rpartition("/")[0]) not in folders:
                        folders.add(path)
        if not folders and not selector.allow_not_found:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{base}")
        return [*(fs.FileInfo(path, fs.FileType.Directory) for path in sorted(folders - {base})), *files]

    def create_dir(self, path: str, recursive: bool) -> None:
        """Nothing to do."""

    def delete_dir(self, path: str) -> None:
        self.delete_dir_contents(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = True) -> None:
        bucket, key = place(path).values()
        if not key:
            raise OSError(errno.EPERM, "will not empty a whole bucket", f"s3://{path}")
        for page in self._list(path):
            names = [{"Key": each["Key"]} for each in page["Contents"]]
            with explained(path):
                answer = self.client.delete_objects(Bucket=bucket, Delete={"Objects": names, "Quiet": True})
            if errors := answer.get("Errors"):
                raise OSError(errno.EIO, f"cannot delete {errors[0].get('Key')}: {errors[0].get('Code')}", f"s3://{path}")

    def delete_root_dir_contents(self) -> None:
        raise OSError(errno.EPERM, "will not empty all buckets")

    def delete_file(self, path: str) -> None:
        with explained(path):
            self.client.delete_object(**place(path))

    def copy_file(self, src: str, dest: str) -> None:
        with explained(src):
            self.client.copy(place(src), *place(dest).values())

    def move(self, src: str, dest: str) -> None:
        self.copy_file(src, dest)
        self.delete_file(src)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(_Reader(self, path), mode="r")

    def open_input_stream(self, path: str) -> pa.NativeFile:
        """For reading from the start to the end, however little at a time: several parts are asked for together."""
        reader: Any = _Reader(self, path)
        return pa.PythonFile(io.BufferedReader(reader, _THREADS // 2 * PART_BYTES), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return pa.PythonFile(Writer(self, path), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise OSError(errno.ENOTSUP, "S3 cannot append to a file", f"s3://{path}")

    def create(self, path: str, data: bytes) -> None:
        """`put_new`, and where the store cannot do that, the nearest to it: it is asked first whether the object is there.

        Raises:
            FileExistsError: it is.
        """
        try:
            return self.put_new(path, data)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
        if self._info(path).type != fs.FileType.NotFound:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), f"s3://{path}")
        self.put(path, data)

    def read_parts(self, path: str, start: int, stop: int, etag: str, take: Callable[[int, bytearray], Any]) -> None:
        """Reads in parts, several at a time; `take` gets each with its place, in any order."""
        spans = [(at, min(at + PART_BYTES, stop)) for at in range(start, stop, PART_BYTES)]
        _each(lambda span: take(span[0], self.read(path, *span, etag)), spans)

    def download(self, path: str, local_path: Path) -> None:
        """Into a local file that is there already."""
        source = _Reader(self, path)
        with local_path.open("r+b") as file:
            self.read_parts(path, 0, source.size, source.etag, lambda at, data: os.pwrite(file.fileno(), data, at))

    def upload(self, local_path: str | Path, path: str) -> None:
        """A local file."""
        with open(local_path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= PART_BYTES:
                return self.put(path, file.read())
            part = max(PART_BYTES, -(-size // _MOST_PARTS))
            with Multipart(self, path) as upload:
                starts = range(0, size, part)
                _each(lambda at: upload.send(at // part + 1, os.pread(file.fileno(), part, at)), starts)


class _Reader(io.RawIOBase):
    """One version of an object, from any place."""

    def __init__(self, store: S3, path: str):
        super().__init__()
        head = store.head(path)
        self._store, self._path, self._at = store, path, 0
        self.size: int = head["ContentLength"]
        self.etag: str = head["ETag"]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytearray:
        start = min(self._at, self.size)
        stop = self.size if size is None or size < 0 else min(self.size, start + size)
        self._at = stop
        if stop - start <= PART_BYTES:
            return self._store.read(self._path, start, stop, self.etag)
        whole = bytearray(stop - start)

        def take(at: int, part: bytearray) -> None:
            whole[at - start : at - start + len(part)] = part

        self._store.read_parts(self._path, start, stop, self.etag, take)
        return whole


class Writer:
    """A file that is written piece by piece. As a context manager it is there after a body that raised nothing, else never."""

    def __init__(self, store: S3, path: str):
        self._store, self._path, self._held = store, path, bytearray()
        self._upload: Multipart | None = None
        self._sent = self._at = 0
        self.closed = False

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._give_up()

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing: what is less than a part waits for more."""

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._held += data
        self._at += size
        while len(self._held) >= (part := PART_BYTES * (1 + self._sent // 1000)):  # an object may have 10,000
            self._send(part)
        return size

    def _send(self, size: int) -> None:
        try:
            self._upload = self._upload or Multipart(self._store, self._path)
            self._sent += 1
            self._upload.send(self._sent, bytes(self._held[:size]))
        except BaseException:
            self._give_up()
            raise
        del self._held[:size]

    def close(self) -> None:
        """Makes the file appear, if nothing failed."""
        if self.closed:
            return
        if self._upload is None:
            self.closed = True
            return self._store.put(self._path, bytes(self._held))
        if self._held:
            self._send(len(self._held))
        self.closed = True
        self._upload.complete()

    def _give_up(self) -> None:
        if not self.closed and self._upload:
            self._upload.abort()
        self.closed = True


@lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="s3")


def _each(action: Callable[[T], Any], items: Iterable[T]) -> None:
    """Several at a time. When it returns, or raises what the first failure was, none is under way."""
    futures = [_pool(os.getpid()).submit(action, item) for item in items]
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
