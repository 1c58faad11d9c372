from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from msclip.data.shards import Manifest, Shard
from msclip.errors import UserError
from msclip.eval.rows import encode_images, image_bytes, open_rows, spread
from msclip.storage import Folder
from tests.drawn import COLOURS, labelled, png, tiny_parts

CPU = torch.device("cpu")


def numbered(path: Path, first: int, rows: int, group: int) -> None:
    pq.write_table(pa.table({"n": range(first, first + rows)}), path, row_group_size=group)


@pytest.mark.parametrize("spec", ["{}", "{}/part-*.parquet"])
def test_rows_of_several_files_are_numbered_through(tmp_path: Path, spec: str) -> None:
    numbered(tmp_path / "part-0.parquet", 0, 7, 3)
    numbered(tmp_path / "part-1.parquet", 7, 600, 500)
    rows = open_rows(spec.format(tmp_path))
    assert len(rows) == 607
    assert [(number, values["n"]) for number, values in rows.read(["n"])] == [(n, n) for n in range(607)]


def test_a_folder_of_ingest_is_read_by_its_manifest(tmp_path: Path) -> None:
    table = pa.table({"image": [b"x"] * 3, "captions": [["a"], ["b"], ["c"]]})
    for place in ("in/shards/00001.parquet", "in/shards/00000.parquet", "in/shards/left-over.parquet"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / place, row_group_size=2)
    folder = Folder(tmp_path / "in")
    names = ("shards/00001.parquet", "shards/00000.parquet")
    Manifest(folder, tuple(Shard.read(folder, name) for name in names)).write()
    rows = open_rows(str(tmp_path / "in"))
    assert rows.files == tuple(str(tmp_path / "in" / name) for name in names)
    assert [values["captions"] for _, values in rows.read(["captions"])] == [["a"], ["b"], ["c"]] * 2
    pq.write_table(table.slice(1), tmp_path / "in" / names[0])
    with pytest.raises(UserError, match="the file changed after ingest"):
        open_rows(str(tmp_path / "in"))


def test_only_the_chosen_rows_are_read(tmp_path: Path) -> None:
    numbered(tmp_path / "a.parquet", 0, 700, 300)
    chosen = [699, 0, 255, 256, 299, 300, 650]
    read = list(open_rows(str(tmp_path / "a.parquet")).read(["n"], chosen))
    assert [(number, values["n"]) for number, values in read] == [(n, n) for n in sorted(chosen)]


def test_a_limit_spreads_over_all_rows() -> None:
    assert spread(10, 4).tolist() == [0, 2, 5, 7]
    assert spread(3, 10).tolist() == spread(3, 0).tolist() == [0, 1, 2]


def test_data_that_are_missing_or_no_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"not at all")
    for spec, complaint in [
        ("gone.parquet", "gone.parquet' do not exist"),
        ("x-*.parquet", r"no Parquet file .* matches .*x-\*\.parquet"),
        ("a.parquet", "a.parquet is not"),
    ]:
        with pytest.raises(UserError, match=complaint):
            len(open_rows(str(tmp_path / spec)))


def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"label_column must be a column .* got 'target'; it has image, label, class_name"):
        open_rows(str(labelled(tmp_path / "a.parquet"))).column_type("target", "label_column")


def test_footers_follow_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 0), ("c", 1)):
        numbered(tmp_path / f"{name}.parquet", first, 10, 5)
    a, b, c = (open_rows(str(tmp_path / f"{name}.parquet")).footers() for name in "abc")
    assert a == b != c


def test_features_come_in_row_order_and_bad_rows_are_counted() -> None:
    model, _, preprocess = tiny_parts()
    model.eval()
    images = [png(colour, i) for i, colour in enumerate(COLOURS)]
    stream = [(10, images[0]), (11, b"no image at all"), (12, images[1]), (13, None), (14, images[2]), (15, images[3])]
    features, kept, skipped = encode_images(model, preprocess, stream, device=CPU, batch_size=3, threads=2)
    assert kept == [10, 12, 14, 15]
    assert [row.row for row in skipped] == [11, 13]
    assert skipped[1].reason == "no image"
    with torch.inference_mode():
        alone = torch.cat([model.encode_image(preprocess(image)[None]) for image in images[:4]])
    # One image at a time sums in another order than four: 1e-5 is the parity tolerance of the project.
    assert torch.allclose(features, alone, atol=1e-5)


def test_nothing_decodable_is_an_error() -> None:
    model, _, preprocess = tiny_parts()
    with pytest.raises(UserError, match=r"no image could be decoded \(row 4"):
        encode_images(model, preprocess, [(4, b"x")], device=CPU, batch_size=2, threads=1)


def test_weights_that_are_not_finite_give_an_error_instead_of_a_score() -> None:
    model, _, preprocess = tiny_parts()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(UserError, match="features are not finite"):
        encode_images(model.eval(), preprocess, [(0, png("red", 0))], device=CPU, batch_size=2, threads=1)


def test_an_image_may_be_a_struct_with_its_bytes() -> None:
    assert image_bytes({"bytes": b"abc", "path": None}) == image_bytes(b"abc") == b"abc"
    assert image_bytes({"path": "x.png"}) is None
