"""What ingest reads: tables of captions as people keep them, and which image each row means."""

import io
import json
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msclip.data.captions import Refused, read_captions
from msclip.data.sources import ImageFiles, ImageFolder, ParquetSource, Row, Source, TarSource, open_source
from msclip.errors import UserError
from msclip.storage import Folder


def table(path: Path, content: str | bytes) -> Folder:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Folder(path)


def pairs(file: Folder, **columns: Any) -> list[tuple[str, list[str]]]:
    rows, refused = read_captions(file, **columns)
    assert refused == []
    return [(row.image, row.captions) for row in rows]


def test_csv_tsv_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    same = [("a.jpg", ["one, two"]), ("b.jpg", ['says "hi"'])]
    assert pairs(table(tmp_path / "a.csv", '\ufeffImage,Caption\na.jpg,"one, two"\nb.jpg,"says ""hi"""\n')) == same
    assert pairs(table(tmp_path / "a.tsv", 'path\ttitle\r\na.jpg\tone, two\r\nb.jpg\tsays "hi"\r\n')) == same
    lines = '{"file": "a.jpg", "text": "one, two"}\n\n{"file": "b.jpg", "text": ["says \\"hi\\"", " "]}\n'
    assert pairs(table(tmp_path / "a.jsonl", lines)) == same
    pq.write_table(pa.table({"x": ["a.jpg", "b.jpg"], "y": [c for _, c in same]}), tmp_path / "a.parquet")
    assert pairs(Folder(tmp_path / "a.parquet"), image_column="x", caption_column="y") == same


def test_rows_that_cannot_be_read_are_returned_with_reasons(tmp_path: Path) -> None:
    _, refused = read_captions(table(tmp_path / "a.csv", "image,text\na.jpg,fine\nb.jpg,too,many\n,no name\n"))
    assert refused == [
        Refused("a.csv", 1, None, "b.jpg", "3 values for 2 columns"),
        Refused("a.csv", 2, None, "", "no value in column image"),
    ]
    _, refused = read_captions(table(tmp_path / "a.jsonl", '{"image": "a.jpg", "text": "x"}\n{broken\n[1]\n'))
    assert [(r.row, r.reason) for r in refused] == [(1, "not a JSON object"), (2, "not a JSON object")]


def test_lines_of_json_need_not_have_the_same_fields_and_may_be_anything(tmp_path: Path) -> None:
    lines = (
        '{"image": "a.jpg"}',
        '{"caption": "b", "image": "b.jpg"}',
        "[" * 200_000,
        '{"image": "\\ud800.jpg", "caption": ["half a pair: \\ud800", 7, true, null, {"raw": "c"}, ["d"]]}',
    )
    rows, refused = read_captions(table(tmp_path / "a.jsonl", "\n".join(lines)))
    assert [(row.image, row.captions) for row in rows] == [
        ("a.jpg", []),
        ("b.jpg", ["b"]),
        ("?.jpg", ["half a pair: ?", "7"]),
    ]
    assert [(r.row, r.reason) for r in refused] == [(2, "not a JSON object")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "image,prose\na.jpg,x\n", "none of the usual columns captions, caption, text, title; .* image, prose"),
        ("a.csv", "image,text\n", "has no rows"),
        ("a.csv", "", "has no rows"),
        ("a.csv", "image,text\na.jpg,Bär\n".encode("latin-1"), "not in UTF-8"),
        ("a.parquet", "no parquet", "not a whole Parquet file"),
        (
            "a.csv",
            'image,text\na.jpg,x\nb.jpg,"open\nc.jpg,y\nd.jpg,z\n',
            r"a\.csv .* begins in line 3, unexpected end of data",
        ),
        ("a.csv", 'image,text\na.jpg,"open\nb.jpg,"shut"\n', r"a\.csv .* begins in line 2, ',' expected after"),
        ("a.csv", '"image,text\na.jpg,x\n', r"a\.csv .* begins in line 1, unexpected end of data"),
        ("a.csv", "image,image,text\na.jpg,b.jpg,x\n", r"line 1 of .*a\.csv names 2 columns 'image'"),
        ("a.tsv", "image\ttext\ttext\na.jpg\tx\ty\n", r"line 1 of .*a\.tsv names 2 columns 'text'"),
        ("a.xlsx", "x", r"must be a file of kind \.csv"),
    ],
)
def test_an_unusable_table_is_the_users_mistake(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_captions(table(tmp_path / name, content))


def test_a_caption_may_span_lines_and_columns_need_no_name(tmp_path: Path) -> None:
    assert pairs(table(tmp_path / "a.csv", '\n\r\nimage,text,,\na.jpg,"one\ntwo",,\n\nb.jpg,say "x",,\n')) == [
        ("a.jpg", ["one\ntwo"]),
        ("b.jpg", ['say "x"']),
    ]
    assert pairs(table(tmp_path / "a.tsv", f"image\ttext\na.jpg\t{'x' * 200_000}\n")) == [("a.jpg", ["x" * 200_000])]


def test_a_column_that_is_not_there_names_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"caption_column is 'alt', but .*a\.csv has only the columns image, text"):
        read_captions(table(tmp_path / "a.csv", "image,text\na.jpg,x\n"), caption_column="alt")


def folder_of(tmp_path: Path, *names: str) -> Path:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


def listed(source: Source) -> tuple[list[str], list[tuple[str, str, str]]]:
    units, refused = source.units()
    return [place[0] for unit in units for place in unit.content], [(r.shard, r.key, r.reason) for r in refused]


def rows_of(source: Source) -> list[Row]:
    return [row for unit in source.units()[0] for row in source.read(unit)]


def test_an_image_is_found_by_path_by_name_or_by_name_without_suffix(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a/1.jpg", "b/1.png", "b/2.jpeg", "3.webp", "d/odd.dat", ".hidden/4.jpg", "notes.md")
    names = ["a/1.jpg", "./b/1.png", "2.jpeg", "3", f"{tmp_path}/d/odd.dat", "b\\2.jpeg"]
    table(tmp_path / "captions.csv", "image,text\n" + "".join(f"{name},caption of {name}\n" for name in names))
    files, refused = listed(open_source(str(folder)))
    assert files == ["a/1.jpg", "b/1.png", "b/2.jpeg", "3.webp", "d/odd.dat"]
    assert refused == []


def test_a_path_is_found_by_its_own_end_and_never_by_the_file_name_alone(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "val/0.jpg", "set/train/1.jpg", "set/train/2.png", "val/3.jpg", "retrain/4.jpg")
    names = ["train/0.jpg", "train/1.jpg", "train/2", "train/3", "train/4.jpg", "/elsewhere/val/0.jpg", "3.jpg"]
    table(tmp_path / "captions.csv", "image,text\n" + "".join(f"{name},caption of {name}\n" for name in names))
    files, refused = listed(open_source(str(folder)))
    assert files == ["set/train/1.jpg", "set/train/2.png", "val/3.jpg"]
    missing = ["train/0.jpg", "train/3", "train/4.jpg", "/elsewhere/val/0.jpg"]
    assert [line for line in refused if line[2] == "no such image"] == [("captions.csv", n, "no such image") for n in missing]


def test_a_name_that_may_mean_two_images_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a/1.jpg", "b/1.jpg", "c/2.png", "c/2.jpg")
    table(tmp_path / "captions.csv", "image,text\na/1.jpg,sure\n1.jpg,which\n2,which\n5.jpg,none\n")
    files, refused = listed(open_source(str(folder)))
    assert files == ["a/1.jpg"]
    assert refused == [
        ("captions.csv", "1.jpg", "ambiguous image name: a/1.jpg, b/1.jpg"),
        ("captions.csv", "2", "ambiguous image name: c/2.jpg, c/2.png"),
        ("captions.csv", "5.jpg", "no such image"),
        ("b/1.jpg", "b/1.jpg", "no caption"),
        ("c/2.jpg", "c/2.jpg", "no caption"),
        ("c/2.png", "c/2.png", "no caption"),
    ]


def test_accents_may_be_written_together_or_apart(tmp_path: Path) -> None:
    apart, together = "cafe\u0301", "caf\u00e9"
    folder = folder_of(tmp_path, f"{apart}/1.jpg", f"{apart}.png", f"b/{together}.jpg")
    table(tmp_path / "captions.csv", f"image,text\n{together}/1.jpg,one\n{together}.png,two\nb/{apart},three\n")
    files, refused = listed(open_source(str(folder)))
    assert files == [f"{apart}/1.jpg", f"{apart}.png", f"b/{together}.jpg"]
    assert refused == []


def test_links_are_followed_once_and_what_cannot_be_named_or_opened_is_recorded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", "a/1.jpg")
    folder_of(tmp_path / "elsewhere", "2.jpg")
    (folder / "more").symlink_to(tmp_path / "elsewhere")
    (folder / "a/again").symlink_to(folder)
    (folder / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (folder / "itself.jpg").symlink_to("itself.jpg")
    (folder / "caf\udce9.jpg").write_bytes(b"named in Latin-1")
    os.mkfifo(folder / "pipe.jpg")
    table(folder / "captions.csv", "image,text\n" + "".join(f"{name},x\n" for name in ("1", "2", "gone", "itself")))
    source = open_source(str(folder))
    found = [(row.key, row.refused.reason) for row in rows_of(source)]
    unread = [("gone.jpg", "unreadable: FileNotFoundError"), ("itself.jpg", "unreadable: OSError")]
    assert found == [("a/1.jpg", ""), ("more/2.jpg", ""), *unread]
    assert listed(source)[1] == [("caf?.jpg", "caf?.jpg", "file name not in UTF-8")]


def test_rows_of_one_image_become_one_row_in_the_order_of_the_table(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "x.jpg", "y.jpg", "z.jpg")
    lines = [("y.jpg", ["one"]), ("x.jpg", ["two", "three"]), ("y.jpg", "four"), ("z.jpg", None)]
    table(folder / "list.jsonl", "\n".join(json.dumps({"image": i, "captions": c}) for i, c in lines))
    source = open_source(str(folder), name="mine")
    units, refused = source.units()
    rows = [row for unit in units for row in source.read(unit)]
    assert [(row.key, row.captions, row.image, row.source) for row in rows] == [
        ("y.jpg", ["one", "four"], b"y.jpg", "mine"),
        ("x.jpg", ["two", "three"], b"x.jpg", "mine"),
    ]
    assert [(r.key, r.reason) for r in refused] == [("z.jpg", "no caption")]
    (folder / "x.jpg").unlink()
    assert [row.refused.reason for unit in units for row in source.read(unit)] == ["", "unreadable: FileNotFoundError"]


def test_the_table_of_captions_may_lie_outside_and_must_be_clear(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "in", "x.jpg")
    with pytest.raises(UserError, match="there is none"):
        open_source(str(folder))
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UserError, match=r"captions names a folder: .*folder\.csv"):
        open_source(str(folder), captions=f"{tmp_path}/folder.csv").units()
    outside = table(tmp_path / "list.tsv", "image\ttext\nx.jpg\tout\n")
    assert listed(open_source(str(folder), captions=outside.url))[0] == ["x.jpg"]
    for name in ("a.csv", "b.tsv"):
        table(folder / name, "image,text\nx.jpg,in\n")
    with pytest.raises(UserError, match=r"could be any of a\.csv, b\.tsv"):
        open_source(str(folder))
    assert listed(open_source(str(folder), captions="a.csv"))[0] == ["x.jpg"]
    table(folder / "captions.csv", "image,text\nx.jpg,in\n")
    assert listed(open_source(str(folder)))[0] == ["x.jpg"]
    with pytest.raises(UserError, match="key_column is for Parquet"):
        open_source(str(folder), key_column="id")


def test_parquet_rows_keep_their_key_and_source(tmp_path: Path) -> None:
    content = {"jpg": [b"a", b"b", None], "TEXT": ["x", "", "z"], "id": [7, None, 9], "source": ["web", None, None]}
    pq.write_table(pa.table(content), tmp_path / "some.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "some.parquet"))
    assert isinstance(source, ParquetSource)
    assert source.units()[1] == []
    rows = rows_of(source)
    assert [(r.key, r.source, r.refused.reason) for r in rows] == [
        ("7", "web", ""),
        ("some/1", "some", "no caption"),
        ("9", "some", "no image bytes"),
    ]
    assert [(r.refused.row_group, r.refused.row) for r in rows] == [(0, 0), (0, 1), (1, 0)]


def test_every_parquet_file_must_have_the_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"a"], "text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": [b"a"], "prose": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"caption_column is 'text', but .*b\.parquet has only the columns image, prose"):
        open_source(str(tmp_path))
    with pytest.raises(UserError, match="key_column is 'id'"):
        open_source(str(tmp_path / "a.parquet"), key_column="id")
    pq.write_table(pa.table({"image": [b"a"], "text": [3]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="is of type int64; it must be string or list of string"):
        open_source(str(tmp_path / "b.parquet"))


def pack(path: Path, members: Mapping[str, bytes], mode: str = "w") -> None:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


def test_tars_are_a_source_by_folder_by_glob_and_alone(tmp_path: Path) -> None:
    pack(tmp_path / "b-0.tar", {"x.jpg": b"0", "x.txt": b"zero"})
    pack(tmp_path / "b-1.tar.gz", {"y.png": b"1", "y.json": b'{"text": "one"}', "z.cls": b"2"}, "w:gz")
    both, first, second = ["b-0/x", "b-1/y"], ["b-0/x"], ["b-1/y"]
    for spec, keys in ((tmp_path, both), (f"{tmp_path}/b-*.tar", first), (tmp_path / "b-1.tar.gz", second)):
        source = open_source(str(spec))
        assert isinstance(source, TarSource)
        assert [row.key for row in rows_of(source) if not row.refused.reason] == keys
    last = rows_of(source)[-1]
    assert last.refused == Refused("b-1.tar.gz", 1, None, "z", "foreign file: z.cls")
    assert {row.source for row in rows_of(open_source(str(tmp_path)))} == {tmp_path.name}
    (tmp_path / "b-0.tar").unlink()
    units = source.units()[0]
    (tmp_path / "b-1.tar.gz").unlink()
    assert [row.refused.reason for row in source.read(units[0])] == ["unreadable: FileNotFoundError"]
    with pytest.raises(UserError, match=r"no tar \(\*\.tar\) matches"):
        open_source(f"{tmp_path}/*.tar")
    with pytest.raises(UserError, match="key_column is for Parquet"):
        open_source(f"{tmp_path}/*.tar", key_column="id")


ONE, TWO = b"first image", b"second image"


def test_all_three_outputs_of_img2dataset_are_read(tmp_path: Path) -> None:
    stats = b'{"count": 3}'
    table = {"key": ["000000000", "000000001", "000000002"], "caption": ["one", "two", "gone"], "url": ["a", "b", "c"]}
    status = table | {"status": ["success", "success", "failed_to_download"]}
    # webdataset: tars, and beside each a table of everything that was tried; the second sample has lost its text.
    web = tmp_path / "web"
    web.mkdir()
    pack(web / "00000.tar", {"000000000.jpg": ONE, "000000000.txt": b"one", "000000000.json": b"{}", "000000001.jpg": TWO})
    pq.write_table(pa.table(status), web / "00000.parquet")
    (web / "00000_stats.json").write_bytes(stats)
    # files: the members in folders.
    files = tmp_path / "files"
    folder_of(files, "00000/x")
    for name, data in (("000000000.jpg", ONE), ("000000000.txt", b"one"), ("000000001.webp", TWO)):
        (files / "00000" / name).write_bytes(data)
    (files / "00000" / "000000001.json").write_text('{"caption": "two", "key": "000000001"}')
    (files / "00000" / "000000002.json").write_text('{"caption": "gone", "status": "failed_to_download"}')
    pq.write_table(pa.table(status), files / "00000.parquet")
    (files / "00000_stats.json").write_bytes(stats)
    # parquet: the bytes in a column.
    parquet = tmp_path / "parquet"
    parquet.mkdir()
    pq.write_table(pa.table(status | {"jpg": [ONE, TWO, None]}), parquet / "00000.parquet")
    (parquet / "00000_stats.json").write_bytes(stats)
    expected = [(ONE, ["one"]), (TWO, ["two"])]
    kinds = {web: TarSource, files: ImageFiles, parquet: ParquetSource}
    for folder, kind in kinds.items():
        source = open_source(str(folder))
        assert isinstance(source, kind)
        assert [(row.image, row.captions) for row in rows_of(source) if not row.refused.reason] == expected
    assert rows_of(source)[2].refused.reason == "no image bytes"


def test_captions_may_lie_in_files_beside_the_images(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "a/1.jpg", "a/2.v2.png", "3.jpg", "4.jpg", "5.jpg")
    (folder / "a" / "1.txt").write_text("one")
    (folder / "a" / "2.v2.json").write_text('{"alt": "two"}')
    (folder / "3.txt").write_bytes("Bär".encode("latin-1"))
    (folder / "4.txt").write_text(" ")
    (folder / "6.heic").write_bytes(b"of no kind that is read")
    (folder / "6.txt").write_text("six")
    source = open_source(str(folder))
    assert isinstance(source, ImageFiles)
    rows = rows_of(source)
    assert [(row.key, row.captions, row.refused.reason) for row in rows] == [
        ("3.jpg", [], "caption not in UTF-8: 3.txt"),
        ("4.jpg", [], "no caption"),
        ("a/1.jpg", ["one"], ""),
        ("a/2.v2.png", [], "no caption"),
    ]
    assert [(r.key, r.reason) for r in source.units()[1]] == [("5.jpg", "no caption"), ("6.txt", "no image")]
    units = source.units()[0]
    (folder / "a" / "1.txt").unlink()
    assert [row.refused.reason for row in source.read(units[0])][2] == "unreadable: FileNotFoundError"
    (folder / "a" / "1.txt").write_text("one")
    by_field = rows_of(open_source(str(folder), caption_column="alt"))
    assert [row.captions for row in by_field] == [[], [], [], ["two"]]
    # With a table it is the table that counts, and Hugging Face calls it metadata.
    table(folder / "metadata.csv", "file_name,text\n3.jpg,three\n")
    assert isinstance(open_source(str(folder)), ImageFolder)


def test_a_source_is_read_from_any_store(tmp_path: Path) -> None:
    folder = Folder(f"memory://{tmp_path.name}/in")
    pack(tmp_path / "x.tar", {"d/1.jpg": b"1", "d/1.txt": b"one"})
    folder.upload(tmp_path / "x.tar", "tars/x.tar")
    (folder / "photos" / "deep").write_bytes("2.jpg", b"2")
    (folder / "photos").write_text("captions.csv", "image,text\n2.jpg,two\n")
    assert [(row.key, row.image) for row in rows_of(open_source(f"{folder.url}/tars"))] == [("x/d/1", b"1")]
    assert [(row.key, row.image) for row in rows_of(open_source(f"{folder.url}/photos"))] == [("deep/2.jpg", b"2")]


def test_a_file_or_a_glob_in_an_object_store_is_told_by_its_name_whatever_the_url_asks_for(s3_url: str, tmp_path: Path) -> None:
    store = Folder(s3_url)
    pq.write_table(pa.table({"image": [b"1"], "caption": ["one"]}), tmp_path / "x.parquet")
    pack(tmp_path / "x.tar", {"1.jpg": b"1", "1.txt": b"one"})
    for name in ("x.parquet", "x.tar"):
        store.upload(tmp_path / name, name)
    for spec in ("x.parquet", "*.parquet", "x.tar", "*.tar"):
        url = s3_url.replace("?", f"/{spec}?")
        assert [(row.key, row.captions) for row in rows_of(open_source(url))] in ([("x/0", ["one"])], [("x/1", ["one"])])
