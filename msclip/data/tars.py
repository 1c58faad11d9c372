"""Image-text samples out of tar files as webdataset and img2dataset write them, and as they look after years on a disk.

Members of one name, up to the first dot of its last part, are a sample: `a/7.jpg`, `a/7.txt` and `a/7.json` belong together.
A tar is read once, from front to end, compressed or not. Nothing in it is fatal: what cannot be used comes out as a record,
and reading goes on behind damage where there is something to go on with.
"""

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from msclip.data.captions import CAPTION_NAMES, json_object, texts

IMAGE_KINDS = frozenset(("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "pgm"))
TEXT_KINDS = ("txt", "text", "caption")
_KINDS = IMAGE_KINDS | {*TEXT_KINDS, "json"}

_MOST_BYTES = 2**28  # of one member; an image file is never that large
_PENDING_BYTES = 2**26  # of samples whose other members have not come yet


class Sample(NamedTuple):
    """A sample, or what stands in a tar and is none."""

    key: str
    """The name of its members up to the first dot, folders included; of what is no sample, a member's name."""
    image: bytes | None
    captions: list[str]
    reason: str
    """Why it cannot be used; empty for a good one."""


@dataclass
class _Parts:
    """Members of one key."""

    image: bytes | None = None
    texts: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    trouble: str = ""
    members: list[str] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.image or b"") + sum(map(len, self.texts.values()))


def read_samples(
    stream: BinaryIO, caption_field: str | None = None, more_captions: Callable[[str], list[str]] = lambda _: []
) -> Iterator[Sample]:
    """All samples of a tar, each when its last member has come, and all that is none.

    A sample's members usually follow each other. Where they do not, parts wait for the others, up to 64 MiB of them.

    Args:
        caption_field: of a sample's JSON member, with its captions; None for its text member, else the JSON's usual fields.
        more_captions: asked for the captions of a key that has none in the tar.

    Raises:
        OSError: the storage failed.
    """
    waiting: dict[str, _Parts] = {}
    done: dict[str, set[str]] = {}
    size, last = 0, None

    def sample(key: str, parts: _Parts) -> Sample:
        done[key] = parts.kinds
        captions, reason = _captions(parts, caption_field)
        if parts.image is None and not parts.texts and not parts.record and not parts.trouble:
            return Sample(key, None, [], f"foreign file: {', '.join(parts.members[:5])}")
        captions = captions or more_captions(key)
        if parts.image is None:
            reason = parts.trouble or f"no image: {', '.join(parts.members[:5])}"
        return Sample(key, parts.image, captions, "" if captions and parts.image is not None else reason)

    for name, data, trouble in _members(stream):
        if trouble:
            yield Sample(name, None, [], trouble)
            continue
        key, kind = _split(name)
        if not kind:
            yield Sample(name, None, [], "foreign file")
            continue
        if last is not None and key != last and last in waiting and _complete(waiting[last]):
            size -= waiting[last].size
            yield sample(last, waiting.pop(last))
        last = key
        known = done.get(key) or (waiting[key].kinds if key in waiting else set())
        if kind in known or (key in done and kind in _KINDS):
            yield Sample(name, None, [], "duplicate key")
            continue
        if key in done:
            continue  # more of a sample that was complete without it, such as a label
        parts = waiting.setdefault(key, _Parts())
        size -= parts.size
        _add(parts, name, kind, data)
        size += parts.size
        while size > _PENDING_BYTES and len(waiting) > 1:
            oldest = next(each for each in waiting if each != key)
            size -= waiting[oldest].size
            yield sample(oldest, waiting.pop(oldest))
    for key, parts in waiting.items():
        yield sample(key, parts)


def captions_beside(image: str) -> list[str]:
    """Paths at which the captions of an image file outside of a tar may lie."""
    stem = image[: image.rfind(".")]
    return [f"{stem}.{kind}" for kind in (*TEXT_KINDS, "json")]


def is_caption(path: str) -> bool:
    """Whether a file outside of a tar would hold the captions of an image beside it."""
    return path.rpartition(".")[2] in (*TEXT_KINDS, "json")


def captions_of(files: Mapping[str, bytes], caption_field: str | None = None) -> tuple[list[str], str]:
    """The captions in text and JSON files, by the rule for a tar's members; and why there are none."""
    parts = _Parts()
    for name, data in files.items():
        _add(parts, name, name.rpartition(".")[2], data)
    return _captions(parts, caption_field)


def _complete(parts: _Parts) -> bool:
    return parts.image is not None and bool(parts.texts or parts.record)


def _split(name: str) -> tuple[str, str]:
    """Key and kind: webdataset's rule. No kind for what has no dot, and for what systems leave behind (.DS_Store, ._7.jpg)."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return (folder + slash + stem, kind.lower()) if stem else (name, "")


def _add(parts: _Parts, name: str, kind: str, data: bytes | None) -> None:
    parts.members.append(name)
    parts.kinds.add(kind)
    if data is None:
        parts.trouble = parts.trouble or f"too large: {name}"
    elif kind in IMAGE_KINDS:
        parts.image = parts.image if parts.image is not None else data
    elif kind == "json":
        record = json_object(data)
        parts.record = record or {}
        if record is None:
            parts.trouble = parts.trouble or f"not a JSON object: {name}"
    elif kind in TEXT_KINDS:
        try:
            parts.texts[kind] = data.decode("utf-8-sig")
        except UnicodeDecodeError:
            parts.trouble = parts.trouble or f"caption not in UTF-8: {name}"


def _captions(parts: _Parts, caption_field: str | None) -> tuple[list[str], str]:
    """The captions, and why there are none."""
    if caption_field is None:
        for kind in TEXT_KINDS:
            if found := texts(parts.texts.get(kind)):
                return found, ""
    for name in CAPTION_NAMES if caption_field is None else (caption_field,):
        if found := texts(parts.record.get(name)):
            return found, ""
    return [], parts.trouble or "no caption"


class _Member(NamedTuple):
    name: str
    data: bytes | None
    """None for a file that is too large; empty for one of a kind that no sample needs."""
    trouble: str = ""
    """What is wrong, where this is no member."""


def _members(stream: BinaryIO) -> Iterator[_Member]:
    """The regular files, and a word on everything that is damaged."""
    passed_over: set[str] = set()

    class Header(tarfile.TarInfo):
        """Keeps in mind what tarfile passes over in silence."""

        @classmethod
        def fromtarfile(cls, archive: tarfile.TarFile) -> "Header":
            try:
                return super().fromtarfile(archive)
            except tarfile.HeaderError as error:
                passed_over.add(type(error).__name__)
                raise

    try:
        # Zeros and damaged headers are passed over, block by block, until another header comes: so are joined tars.
        with tarfile.open(fileobj=stream, mode="r|*", bufsize=2**20, tarinfo=Header, ignore_zeros=True) as tar:
            while member := tar.next():
                vars(tar)["members"].clear()  # else they pile up
                if member.isdir():
                    continue
                name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace").removeprefix("./")
                if not member.isreg():
                    yield _Member(name, None, "foreign file: a link or a device")
                elif member.size > _MOST_BYTES:
                    yield _Member(name, None)
                elif _split(name)[1] in _KINDS and (file := tar.extractfile(member)):
                    yield _Member(name, file.read())
                else:
                    yield _Member(name, b"")
    except OSError:
        raise
    except Exception as error:  # damaged headers and streams show themselves in errors of many types
        cut = isinstance(error, EOFError) or "end of data" in str(error)
        yield _Member("", None, f"{'truncated' if cut else 'damaged'} tar: {error}")
    else:
        if "InvalidHeaderError" in passed_over:
            yield _Member("", None, "damaged tar: blocks where a header should be were passed over")
        elif "EOFHeaderError" not in passed_over:
            yield _Member("", None, "truncated tar: it has no end mark")
