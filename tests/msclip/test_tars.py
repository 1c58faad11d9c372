"""Tars as they are: every member ends in a sample or in a record, whatever state the file is in."""

import bz2
import gzip
import io
import json
import tarfile
from collections.abc import Iterable

import pytest

from msclip.data.tars import Sample, read_samples

Member = tuple[str, bytes | str]


def tar(members: Iterable[Member], kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as file:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def read(data: bytes, **options: object) -> list[Sample]:
    return list(read_samples(io.BytesIO(data), **options))  # type: ignore[arg-type]


def good(samples: list[Sample]) -> list[tuple[str, bytes | None, list[str]]]:
    return [sample[:3] for sample in samples if not sample.reason]


def bad(samples: list[Sample]) -> list[tuple[str, str]]:
    return [(sample.key, sample.reason) for sample in samples if sample.reason]


CLEAN: list[Member] = [
    ("a/0001.jpg", b"one"),
    ("a/0001.txt", " first \n"),
    ("b/0001.PNG", b"two"),
    ("b/0001.json", json.dumps({"caption": "second", "url": "x"})),
    ("b/0001.cls", "3"),
]
ROWS = [("a/0001", b"one", ["first"]), ("b/0001", b"two", ["second"])]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_members_of_one_key_in_any_kind_of_tar(pack, kind: int) -> None:
    assert [*map(tuple, read(pack(tar(CLEAN, kind))))] == [(*row, "") for row in ROWS]


def test_the_key_ends_at_the_first_dot_of_the_base_name() -> None:
    members: list[Member] = [
        ("x.y/a.jpg", b"1"),
        ("x.y/a.txt", "one"),
        ("v1.0.jpg", b"2"),
        ("v1.0.txt", "two"),
        ("v1.seg.png", b"3"),
    ]
    samples = read(tar(members))
    assert good(samples) == [("x.y/a", b"1", ["one"])]
    # Both `v1.0.jpg` and `v1.seg.png` are members `0.jpg` and `seg.png` of `v1`, which is what webdataset makes of them.
    assert bad(samples) == [("v1", "foreign file: v1.0.jpg, v1.0.txt, v1.seg.png")]


def test_missing_members_and_foreign_files_are_recorded_one_by_one() -> None:
    members: list[Member] = [
        ("1.jpg", b"1"),
        ("2.txt", "two"),
        ("README", "hello"),
        (".DS_Store", b"\0"),
        ("._3.jpg", b"mac"),
        ("3.jpg", b"3"),
        ("3.txt", ""),
        ("4.cls", "7"),
        ("5.jpg", b"5"),
        ("5.txt", "five"),
    ]
    samples = read(tar(members))
    assert good(samples) == [("5", b"5", ["five"])]
    assert sorted(bad(samples)) == [
        (".DS_Store", "foreign file"),
        ("._3.jpg", "foreign file"),
        ("1", "no caption"),
        ("2", "no image: 2.txt"),
        ("3", "no caption"),
        ("4", "foreign file: 4.cls"),
        ("README", "foreign file"),
    ]


def test_members_that_do_not_follow_each_other_still_meet() -> None:
    images: list[Member] = [(f"{i}.jpg", bytes([i])) for i in range(5)]
    captions: list[Member] = [(f"{i}.txt", f"text {i}") for i in range(5)]
    assert sorted(good(read(tar(images + captions)))) == [(str(i), bytes([i]), [f"text {i}"]) for i in range(5)]


def test_parts_wait_for_each_other_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msclip.data.tars._PENDING_BYTES", 250)
    images: list[Member] = [(f"{i}.jpg", bytes(100)) for i in range(5)]
    samples = read(tar([*images, ("4.txt", "in time"), ("0.txt", "too late")]))
    assert good(samples) == [("4", bytes(100), ["in time"])]
    assert bad(samples) == [(str(i), "no caption") for i in range(3)] + [("0.txt", "duplicate key"), ("3", "no caption")]


def test_of_duplicate_keys_the_first_stays() -> None:
    samples = read(tar([*CLEAN, ("c.jpg", b"3"), ("c.jpg", b"4"), ("c.txt", "third"), *CLEAN[:2]]))
    assert good(samples) == [*ROWS, ("c", b"3", ["third"])]
    assert bad(samples) == [("c.jpg", "duplicate key"), ("a/0001.jpg", "duplicate key"), ("a/0001.txt", "duplicate key")]


def test_captions_come_from_text_then_json_then_elsewhere() -> None:
    record = json.dumps({"caption": "alt", "text": ["x", "y"], "prose": "p"})
    both = tar([("1.jpg", b"1"), ("1.txt", "text"), ("1.json", record)])
    assert good(read(both)) == [("1", b"1", ["text"])]
    assert good(read(both, caption_field="prose")) == [("1", b"1", ["p"])]
    assert bad(read(both, caption_field="other")) == [("1", "no caption")]
    latin: list[Member] = [("1.jpg", b"1"), ("1.txt", "Bär".encode("latin-1"))]
    assert bad(read(tar(latin))) == [("1", "caption not in UTF-8: 1.txt")]
    assert good(read(tar([*latin, ("1.json", record)]))) == [("1", b"1", ["alt"])]
    for odd in ("[1]", "[" * 200_000, b"\xff"):
        assert bad(read(tar([("1.jpg", b"1"), ("1.json", odd)]))) == [("1", "not a JSON object: 1.json")]
    assert good(read(tar([("1.jpg", b"1")]), more_captions=lambda key: [f"of {key}"])) == [("1", b"1", ["of 1"])]
    half = tar([("1.jpg", b"1"), ("1.json", '{"caption": "half \\ud83d"}')])
    assert good(read(half)) == [("1", b"1", ["half ?"])]


@pytest.mark.parametrize("keep", [0.3, 0.55, 0.8])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_of_a_truncated_tar_the_whole_samples_remain(keep: float, pack) -> None:
    members: list[Member] = [
        member for i in range(20) for member in ((f"{i:02}.jpg", bytes(range(256)) * 9), (f"{i:02}.txt", f"text {i}"))
    ]
    whole = pack(tar(members))
    samples = read(whole[: int(len(whole) * keep)])
    rows = good(samples)
    assert rows == [(f"{i:02}", bytes(range(256)) * 9, [f"text {i}"]) for i in range(len(rows))]
    assert pack is not bytes or len(rows) >= int(20 * keep) - 1
    assert any(reason.startswith("truncated tar") for _, reason in bad(samples))


def test_a_tar_without_end_mark_and_joined_tars_are_read_to_the_end() -> None:
    first, second = tar(CLEAN[:2]), tar(CLEAN[2:])
    assert good(read(first + second)) == ROWS
    end = tar(CLEAN).rstrip(b"\0")
    end += bytes(-len(end) % 512)
    samples = read(end)
    assert good(samples) == ROWS
    assert bad(samples) == [("", "truncated tar: it has no end mark")]


def test_reading_goes_on_behind_damage() -> None:
    data = bytearray(tar([*CLEAN, ("c.jpg", b"3"), ("c.txt", "third")]))
    data[1024 : 1024 + 300] = b"?" * 300  # the header of a/0001.txt
    samples = read(bytes(data))
    assert good(samples) == [("b/0001", b"two", ["second"]), ("c", b"3", ["third"])]
    assert bad(samples) == [
        ("", "damaged tar: blocks where a header should be were passed over"),
        ("a/0001", "no caption"),
    ]


@pytest.mark.parametrize("data", [b"", b"no tar at all" * 100, gzip.compress(b"no tar"), bytes(10_240)])
def test_what_is_no_tar_is_one_record_or_none(data: bytes) -> None:
    samples = read(data)
    assert good(samples) == []
    assert all(reason.startswith(("truncated tar", "damaged tar")) for _, reason in bad(samples))
    assert len(samples) == (0 if data == bytes(10_240) else 1)


def test_links_and_huge_members_are_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msclip.data.tars._MOST_BYTES", 1000)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    data = buffer.getvalue()[:1024] + tar(
        [("2.jpg", bytes(2000)), ("2.txt", "two"), ("3\udcff.jpg", b"3"), ("3\udcff.txt", "x")]
    )
    samples = read(data)
    assert good(samples) == [("3\ufffd", b"3", ["x"])]
    assert bad(samples) == [("1.jpg", "foreign file: a link or a device"), ("2", "too large: 2.jpg")]
