"""Figures about the rows of a data set that add up: of two parts they are the sums of each part's."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from typing import Any

# Lower edges of the bins; the last has no upper edge.
EDGES: dict[str, tuple[float, ...]] = {
    "short_side": (0, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 512, 640, 768, 1024, 1536, 2048, 4096),
    "aspect_ratio": (0, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 9 / 10, 10 / 9, 4 / 3, 3 / 2, 2, 3),
    "image_bytes": tuple(2**power for power in range(9, 25)),
    "caption_words": (0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 77, 128),
    "captions_per_image": (1, 2, 3, 4, 5, 6, 8, 11, 16),
}
_MAGIC = {b"\xff\xd8": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF"}


class Statistics:
    """Counts of rows, captions and bytes, and histograms over `EDGES`."""

    def __init__(self) -> None:
        self.totals: Counter[str] = Counter(rows=0, captions=0, image_bytes=0)
        self.formats: Counter[str] = Counter()
        self.histograms = {name: [0] * len(edges) for name, edges in EDGES.items()}

    def add(self, image: bytes, width: int, height: int, captions: list[str]) -> None:
        """Counts one row."""
        self.totals.update(rows=1, captions=len(captions), image_bytes=len(image))
        self.formats[image_format(image)] += 1
        self._count("short_side", min(width, height))
        self._count("aspect_ratio", width / height)
        self._count("image_bytes", len(image))
        self._count("captions_per_image", len(captions))
        for caption in captions:
            self._count("caption_words", len(caption.split()))

    def _count(self, name: str, value: float) -> None:
        self.histograms[name][max(0, bisect_right(EDGES[name], value) - 1)] += 1

    def merge(self, other: "Statistics") -> None:
        """Adds another part's figures."""
        self.totals += other.totals
        self.formats += other.formats
        for name, counts in other.histograms.items():
            self.histograms[name] = [a + b for a, b in zip(self.histograms[name], counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        histograms = {
            name: {"from": list(EDGES[name]), "count": list(counts)} for name, counts in sorted(self.histograms.items())
        }
        return {**self.totals, "formats": dict(sorted(self.formats.items())), "histograms": histograms}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Statistics":
        """What `to_dict` made; an empty mapping is no rows. Histograms over other bins, of another version, are left out."""
        made = cls()
        made.totals.update({name: values[name] for name in made.totals if name in values})
        made.formats.update(values.get("formats", {}))
        for name, histogram in values.get("histograms", {}).items():
            if name in EDGES and histogram["from"] == list(EDGES[name]):
                made.histograms[name] = list(histogram["count"])
        return made


def image_format(data: bytes) -> str:
    """The format by the file's first bytes."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "AVIF"
    return next((name for magic, name in _MAGIC.items() if data.startswith(magic)), "other")
