"""The files below a folder of images, and which of them a table of captions means by a name."""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import PurePosixPath

from pyarrow import fs

from msclip.data.captions import Refused, whole
from msclip.data.tars import IMAGE_KINDS
from msclip.storage import Folder

IMAGE_SUFFIXES = frozenset(f".{kind}" for kind in IMAGE_KINDS)


def is_image(path: str) -> bool:
    """By the suffix."""
    return PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES


def files_below(folder: Folder) -> tuple[list[str], list[Refused]]:
    """Paths of all files below, relative, sorted; what starts with a dot is left out. And those that no shard could name."""
    if folder.local is not None:
        found = sorted(_below(folder.path, "", frozenset()))
    else:
        infos = folder.filesystem.get_file_info(fs.FileSelector(folder.path, recursive=True))
        below = sorted(info.path[len(folder.path) :].lstrip("/") for info in infos if info.type == fs.FileType.File)
        found = [path for path in below if not any(part.startswith(".") for part in path.split("/"))]
    odd = [whole(path) for path in found if not _is_utf8(path)]
    refused = [Refused(path, None, None, path, "file name not in UTF-8") for path in odd]
    return [path for path in found if _is_utf8(path)], refused


def _below(path: str, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """Files below a local folder. Links are followed, but into no folder that is above them; those to nothing count as files.

    pyarrow would follow a link to a folder above forty times, and end at a name that is not UTF-8.
    """
    here = os.stat(path)
    above |= {(here.st_dev, here.st_ino)}
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            link = entry.is_symlink()
            if os.path.isdir(entry.path) if link else entry.is_dir():
                there = os.stat(entry.path)
                if (there.st_dev, there.st_ino) not in above:
                    yield from _below(entry.path, f"{prefix}{entry.name}/", above)
            elif (not os.path.exists(entry.path) or os.path.isfile(entry.path)) if link else entry.is_file():
                yield prefix + entry.name


def _is_utf8(text: str) -> bool:
    return text.isascii() or whole(text) == text


class Finder:
    """From an image's name in a table to the files it may mean.

    The name is a file's path below the folder or the end of one, in whole parts: `train/0.jpg` is never `val/0.jpg`. Where
    no file fits, the same without the file's suffix. Letters and their accents may be written together or apart (macOS
    writes them apart, tables mostly together).
    """

    def __init__(self, folder: Folder, files: list[str]):
        self.root = folder.path.rstrip("/") + "/"
        self.paths = set(files)
        self.names: dict[str, list[str]] = {}
        self.stems: dict[str, list[str]] = {}
        for path in files:
            self.names.setdefault(PurePosixPath(_composed(path)).name, []).append(path)
            if is_image(path):
                self.stems.setdefault(PurePosixPath(_composed(path)).stem, []).append(path)

    def __call__(self, name: str) -> list[str]:
        path = str(PurePosixPath(name.strip().replace("\\", "/").removeprefix(self.root)))
        if path in self.paths:
            return [path]
        path = _composed(path)
        last = PurePosixPath(path).name
        found = [file for file in self.names.get(last, []) if _ends_with(file, path)]
        if found or is_image(last):
            return found
        return [file for file in self.stems.get(last, []) if _ends_with(str(PurePosixPath(file).with_suffix("")), path)]


def _ends_with(path: str, end: str) -> bool:
    return f"/{_composed(path)}".endswith(f"/{end}")


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)
