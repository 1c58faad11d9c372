"""One folder on a local disk or in an object store, with the few verbs that runs, shards and checkpoints need.

Local files appear whole or not at all: written beside their place, synchronised, then renamed. Object stores give the
same promise for one object. S3 is `msclip.s3`; anything else that `pyarrow.fs.FileSystem.from_uri` knows works (gs, abfs,
hdfs), and anything that fsspec knows and is installed for (http, sftp, hf, memory, ...); query parameters such as
`?endpoint_override=host:port&scheme=http` stay with every folder below. URLs are written down (in a run's config, in logs, in
exports), so one with a password is refused; on the web, where the query may be a signature, `Folder.url` has none.
"""

import fnmatch
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote

import pyarrow
from pyarrow import fs

from msclip import s3
from msclip.errors import UserError

_TEMPORARY = ".tmp-"
_COPY_BYTES = 8 * 2**20
_SECRET = re.compile(  # as a word of a parameter's name: api_key, accessKey, X-Amz-Signature, but not monkey
    r"(?<![a-z])(?:[a-z]*(?:secret|token|password|passphrase|passwd|credential)|signature|sig|sas|pass|pwd|auth"
    r"|(?:api|access|account|auth|aws|client|private|secret|session|shared|storage)?key)s?(?![a-z])"
)
_WEB = ("http://", "https://")
_PYARROW = {f"{scheme}://" for scheme in ("gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "local", "mock")}


def _remote(url: str) -> tuple[str, str, str] | None:
    """(scheme and host part, path part, query part) of a URL; None for a local path."""
    scheme, separator, rest = url.partition("://")
    if not separator or scheme.lower() == "file" or "/" in scheme:
        return None
    rest, mark, query = rest.partition("?")
    return scheme.lower() + "://", rest.rstrip("/"), mark + query


def _fsspec(url: str) -> tuple[fs.FileSystem, str]:
    from fsspec.core import url_to_fs

    filesystem, path = url_to_fs(url)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _web(url: str) -> tuple[fs.FileSystem, str]:
    from msclip.web import Web

    path, mark, query = url.partition("?")
    return fs.PyFileSystem(fs.FSSpecHandler(Web(mark + query))), path


class Folder:
    """A place for files, by URL. Making one reads nothing and creates nothing; writing creates what is missing.

    Args:
        url: a local path (made absolute, so that workers elsewhere agree), `file://` or a URL of an object store.

    Raises:
        UserError: no file system knows this kind of URL, or it holds a password.
    """

    def __init__(self, url: "str | Path | Folder"):
        text = url.full_url if isinstance(url, Folder) else str(url)
        remote = _remote(text)
        self.url: str
        self.local: Path | None = None
        self._filesystem: fs.FileSystem | None = None
        if remote is None:
            path = unquote(text[7:]) if text[:7].lower() == "file://" else os.path.expanduser(text)
            self.local = Path(os.path.abspath(path))
            self.url = str(self.local)
        else:
            self._scheme, self._rest, self._query = remote
            if secret := self._secret():
                raise UserError(
                    f"a {self._scheme} URL must not hold {secret}, since URLs are written into configs, logs and exports; "
                    "leave it to the environment (for S3: AWS_PROFILE, AWS_ACCESS_KEY_ID or the machine's role)"
                )
            self.url = self._public_url()
            if not self._rest:
                raise UserError(f"the folder {text!r} names no bucket; write {self._scheme}BUCKET/PATH")
            self._connect()

    @property
    def _on_web(self) -> bool:
        return self._scheme in _WEB

    def _secret(self) -> str | None:
        """Which part of the URL must not be written down, and would be."""
        user = "[^/@]*@" if self._on_web else "[^/@]*:[^/]*@"  # on the web a token may stand alone there
        if re.match(user, self._rest):
            return "a password"
        settings = [] if self._on_web or self._scheme == "s3://" else self._query.removeprefix("?").split("&")
        for name, has_value, _ in (each.partition("=") for each in settings):
            words = re.sub("(?<=[a-z])(?=[A-Z])", "_", unquote(name)).lower()
            if _SECRET.search(words):
                return f"the parameter {name!r}, which looks like a password" if has_value else "a password"
        return None

    def _public_url(self) -> str:
        return self._scheme + self._rest + ("" if self._on_web else self._query)

    @property
    def full_url(self) -> str:
        """`url` with the query that it leaves out on the web: to come here again, and not to be written down."""
        return self.url if self.local is not None else self._scheme + self._rest + self._query

    def _connect(self) -> None:
        if self._scheme == "s3://":
            self._filesystem, self._path = s3.connect(self._rest, self._query.removeprefix("?"))
            return
        try:
            connect: Any = _web if self._on_web else fs.FileSystem.from_uri if self._scheme in _PYARROW else _fsspec
            self._filesystem, self._path = connect(self.full_url)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ValueError, ImportError) as error:
            raise UserError(
                f"cannot use the folder {self.url!r}: {error}; give a local path or a URL such as s3://bucket/path"
            ) from error
        except OSError as error:
            if "not found" not in str(error).lower():
                raise  # perhaps only the network: not for us to call a mistake
            raise UserError(f"cannot use the folder {self.url!r}: {error}") from error

    @property
    def filesystem(self) -> fs.FileSystem:
        """The pyarrow file system that `path` belongs to."""
        return self._filesystem or fs.LocalFileSystem()

    @property
    def _handler(self) -> Any:
        """Who serves a file system that is not pyarrow's own: `S3` or fsspec's; None for all others."""
        return self._filesystem.handler if isinstance(self._filesystem, fs.PyFileSystem) else None

    @property
    def path(self) -> str:
        """This folder as `filesystem` names it: no scheme, no query."""
        return str(self.local) if self.local is not None else self._path

    @property
    def name(self) -> str:
        """The last part of the path."""
        return PurePosixPath(self.path).name

    def __truediv__(self, name: str | PurePosixPath) -> "Folder":
        if self.local is not None:
            return Folder(self.local / name)
        parts = PurePosixPath(name)
        if ".." in parts.parts or parts.is_absolute():
            raise ValueError(f"{name!r} leaves the folder {self.url}")
        # The connection is shared: a second one would ask the object store for its region again.
        child = Folder.__new__(Folder)
        child.local, child._filesystem = None, self._filesystem
        child._scheme, child._query = self._scheme, self._query
        rest = path = str(parts)
        if self.quotes:
            rest = quote(rest)
            path = rest if self._on_web else path
        child._rest = f"{self._rest}/{rest}" if str(parts) != "." else self._rest
        child._path = f"{self._path}/{path}" if str(parts) != "." else self._path
        child.url = child._public_url()
        return child

    @property
    def quotes(self) -> bool:
        """Whether URLs here have names in quotation, such as %20 for a space. Of what fsspec knows, those of the web alone."""
        return self.local is None and (self._on_web or not isinstance(self._handler, fs.FSSpecHandler))

    def __repr__(self) -> str:
        return f"Folder({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and self.full_url == other.full_url

    def __hash__(self) -> int:
        return hash(self.full_url)

    def __reduce__(self) -> tuple[type["Folder"], tuple[str]]:
        return Folder, (self.full_url,)

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of this name is there; without a name, whether this folder is."""
        if self.local is not None:
            return (self.local / name).exists()
        return self.filesystem.get_file_info((self / name).path).type != fs.FileType.NotFound

    def names(self, pattern: str = "*") -> list[str]:
        """Sorted names of what is directly inside, by a shell pattern; none where the folder is missing."""
        if self.local is not None:
            found = os.listdir(self.local) if self.local.is_dir() else []
        else:
            selector = fs.FileSelector(self.path, allow_not_found=True)
            found = [info.base_name for info in self.filesystem.get_file_info(selector)]
        return sorted(n for n in found if fnmatch.fnmatchcase(n, pattern) and not n.startswith(_TEMPORARY))

    def read_bytes(self, name: str) -> bytes:
        """The file's content.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.local is not None:
            return (self.local / name).read_bytes()
        path = (self / name).path
        if isinstance(self._handler, s3.S3):
            return bytes(self._handler.read(path))  # one request; a file that is opened asks for its size first
        with self.filesystem.open_input_file(path) as file:
            return file.read()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes the whole file; a reader sees the old one or the new one, never a part.

        Raises:
            OSError: among others `errno.ENOSPC` for a full disk; the old file is then still there.
        """
        if self.local is not None:
            with self._replacing(name) as temporary:
                temporary.write_bytes(data)
        elif isinstance(self._handler, s3.S3):
            self._handler.put((self / name).path, data)
        else:
            with self.open_output(name) as stream:
                stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_new(self, name: str, data: bytes) -> None:
        """Writes a file that must not be there yet: of any number of writers at the same time one succeeds.

        Local disks and S3 promise that, and fsspec where the protocol has exclusive creation. Elsewhere the file is only
        looked for first.

        Raises:
            FileExistsError: the file is there, and stays as it is.
        """
        path = (self / name).path
        if self.local is not None:
            with self._replacing(name, new=True) as temporary:
                temporary.write_bytes(data)
        elif isinstance(self._handler, s3.S3):
            self._handler.create(path, data)
        elif self._handler:
            self._make_parent(path)
            self._handler.fs.pipe_file(path, data, mode="create")
        elif self.exists(name):
            raise FileExistsError(f"{self.url}/{name} exists")
        else:
            self.write_bytes(name, data)

    def open_output(self, name: str) -> Any:
        """A binary stream to write a file piece by piece, a context manager. While it is open, a local file is there in part;
        in S3 none is, nor after a body that raised."""
        path = (self / name).path
        if isinstance(self._handler, s3.S3):
            return s3.Writer(self._handler, path)
        self._make_parent(path)
        return self.filesystem.open_output_stream(path)

    def _make_parent(self, path: str) -> None:
        if self.local is not None:
            os.makedirs(os.path.dirname(path), exist_ok=True)
        elif isinstance(self._handler, fs.FSSpecHandler):  # of object stores only some want one
            self._handler.fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def append_text(self, name: str, text: str) -> None:
        """Adds to the end of a file. Object stores cannot: keep the file locally and `upload` it."""
        if self.local is None:
            raise ValueError(f"cannot append to {name!r} in {self.url}: object stores only replace whole files")
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(text)

    def upload(self, local_path: str | Path, name: str) -> None:
        """Copies a local file to here, with the promise of `write_bytes`."""
        if self.local is not None:
            with self._replacing(name) as temporary:
                shutil.copyfile(local_path, temporary)
        elif isinstance(self._handler, s3.S3):
            self._handler.upload(local_path, (self / name).path)
        else:
            source = os.path.abspath(local_path)
            fs.copy_files(source, (self / name).path, fs.LocalFileSystem(), self.filesystem, chunk_size=_COPY_BYTES)

    def download(self, name: str, local_path: str | Path) -> None:
        """Copies a file from here to a local path, which appears whole or not at all."""
        target = Path(os.path.abspath(local_path))
        with Folder(target.parent)._replacing(target.name) as temporary:
            if self.local is not None:
                shutil.copyfile(self.local / name, temporary)
            elif isinstance(self._handler, s3.S3):
                self._handler.download((self / name).path, temporary)
            else:
                source = (self / name).path
                fs.copy_files(source, str(temporary), self.filesystem, fs.LocalFileSystem(), chunk_size=_COPY_BYTES)

    def delete(self, name: str = "") -> None:
        """Removes a file, or a folder with everything in it; without a name, this folder. Nothing there is no error, nor is
        somebody else who removes the same at the same time."""
        target = self / name
        if target.local is not None:
            while target.local.is_dir() and not target.local.is_symlink():
                with suppress(FileNotFoundError):
                    shutil.rmtree(target.local)
            target.local.unlink(missing_ok=True)
            return
        with suppress(FileNotFoundError):
            kind = target.filesystem.get_file_info(target.path).type
            if kind == fs.FileType.Directory:
                target.filesystem.delete_dir(target.path)
            elif kind == fs.FileType.File:
                target.filesystem.delete_file(target.path)

    @contextmanager
    def _replacing(self, name: str, new: bool = False) -> Iterator[Path]:
        """A temporary path beside `name`, renamed onto it at the end of a body that raised nothing.

        Args:
            new: `name` must not be there: else `FileExistsError`.
        """
        assert self.local is not None
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        # Made with the usual mode bits (tempfile's are 0600, and other users of a team folder must read checkpoints).
        temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:12]}"
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            if new:
                _move_new(temporary, path)
            else:
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _move_new(temporary: Path, path: Path) -> None:
    """Renames without replacing. Raises `FileExistsError`."""
    try:
        os.link(temporary, path)  # the one way to rename that fails where the target exists
    except FileExistsError:
        raise
    except OSError:  # no hard links here, as on FAT and some network disks
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, path)
        return
    temporary.unlink()
