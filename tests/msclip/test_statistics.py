"""Statistics of parts add up to those of the whole, also through JSON."""

import io
import json

import pytest
from PIL import Image

from msclip.data.statistics import EDGES, Statistics, image_format


def test_each_row_is_counted_in_its_bins() -> None:
    made = Statistics()
    made.add(b"\xff\xd8" + bytes(998), 640, 480, ["a dog", "a cat on a mat"])
    made.add(b"\x89PNG" + bytes(96), 100, 400, ["one"])
    content = made.to_dict()
    assert (content["rows"], content["captions"], content["image_bytes"]) == (2, 3, 1100)
    assert content["formats"] == {"JPEG": 1, "PNG": 1}

    def counted(name: str) -> dict[float, int]:
        histogram = content["histograms"][name]
        return {start: count for start, count in zip(histogram["from"], histogram["count"], strict=True) if count}

    assert counted("short_side") == {384: 1, 96: 1}
    assert counted("aspect_ratio") == {0: 1, 4 / 3: 1}
    assert counted("image_bytes") == {512: 2}
    assert counted("captions_per_image") == {2: 1, 1: 1}
    assert counted("caption_words") == {2: 1, 5: 1, 1: 1}


def test_parts_add_up_also_when_written_and_read() -> None:
    rows = [(bytes(50 * i), 10 * i, 7 * i, ["word " * i] * (i % 3 + 1)) for i in range(1, 200)]
    whole, one, other = Statistics(), Statistics(), Statistics()
    for number, row in enumerate(rows):
        whole.add(*row)
        (one if number % 3 else other).add(*row)
    read = Statistics.from_dict(json.loads(json.dumps(one.to_dict())))
    read.merge(other)
    assert read.to_dict() == whole.to_dict()
    assert all(sum(counts) for counts in whole.histograms.values())
    assert Statistics.from_dict({}).to_dict() == Statistics().to_dict()


def test_a_histogram_over_other_bins_is_left_out_and_nothing_else() -> None:
    content = Statistics().to_dict() | {"rows": 5}
    content["histograms"] = {"short_side": {"from": [0, 1], "count": [2, 3]}, "unknown": {"from": [0], "count": [5]}}
    read = Statistics.from_dict(content)
    assert read.totals["rows"] == 5
    assert read.histograms["short_side"] == [0] * len(EDGES["short_side"])


@pytest.mark.parametrize("name", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM"])
def test_a_format_shows_in_the_first_bytes(name: str) -> None:
    Image.new("RGB", (8, 8)).save(buffer := io.BytesIO(), name)
    assert image_format(buffer.getvalue()) == (name if name != "PPM" else "other")
