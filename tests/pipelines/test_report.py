import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from msclip.data.decode import BadRow
from msclip.data.shards import Manifest
from msclip.errors import UserError
from msclip.eval import Task, evaluate_checkpoint
from msclip.eval.results import write_result
from msclip.quarantine import Quarantine, read, write_skipped
from msclip.storage import Folder
from pipelines import report, report_bad_rows
from pipelines.report_gallery import THUMBNAIL, Found, Gallery, Query, thumbnail
from pipelines.report_run import read_run
from pipelines.report_style import PALETTE, share, smooth, thin
from tests.drawn import captioned, tiny_run

BATCH = 64


def record(step: int) -> dict[str, float]:
    return {
        "step": step,
        "epoch": step / 10,
        "time": 1.7e9 + 2 * step,
        "train/loss": math.log(BATCH) * math.exp(-step / 40),
        "train/image_to_text_accuracy": 1 - math.exp(-step / 40),
        "train/text_to_image_accuracy": 1 - math.exp(-step / 50),
        "train/temperature": 14.0 + step,
        "train/grad_norm": 5.0 / step,
        "train/lr": 1e-3 * (1 - step / 100),
        "train/pairs_per_second": 32.0,
        "train/data_wait": 0.3,
        "train/storage_seconds": 0.05,
        "train/decode_seconds": 0.25,
        "train/queue_seconds": 0.0,
        "train/copy_seconds": 0.1,
        "train/communication_seconds": 0.2,
        "train/compute_seconds": 0.4,
        "train/decode_processes_lacking": 3,
        "train/bad_rows": 0,
    }


def write_metrics(run: Folder) -> None:
    run.write_text("metrics.jsonl", "".join(json.dumps(record(step)) + "\n" for step in range(1, 101)))


def write_page(run: Path, *options: str) -> str:
    assert report.main(["--run", str(run), *options]) == 0
    return (run / "report" / "index.html").read_text()


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything a page can show: two checkpoints, retrieval results, a quarantine, a config."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run = tiny_run(folder, steps=(50, 100))
    write_metrics(run)
    run.write_text("config.yaml", yaml.safe_dump({"training": {"global_batch": BATCH, "zero_stage": 2}}))
    record = Quarantine(run, most=1)
    for i in range(30):
        record.add([(i, BadRow("/data", f"part-{i % 2}", 9, 0, i, f"<k{i}>", "truncated" if i else "not an image"))], 1)
    record.write()
    data = captioned(folder.parent / "val.parquet", [[f"picture <b>{i}</b>", f"number {i}"] for i in range(12)])
    task = Task(name="val", kind="retrieval", data=str(data))
    for step in (50, 100):
        checkpoint = run / "checkpoints" / f"step_{step:08d}"
        write_result(run / "evaluation" / checkpoint.name, task, evaluate_checkpoint(checkpoint, task))
    return folder


@pytest.fixture(scope="module")
def whole_page(whole_run: Path) -> str:
    return write_page(whole_run)


class Page(HTMLParser):
    """Tags that were left open, and every address that a browser would fetch."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing(whole_page: str) -> None:
    page = Page(whole_page)
    assert page.open == []
    assert page.fetched == []
    assert "@import" not in whole_page
    assert len(whole_page) < 3_000_000


def test_no_two_elements_of_the_page_share_an_id(whole_page: str) -> None:
    ids = Page(whole_page).ids
    assert len(ids) == len(set(ids))


def test_the_pictures_take_every_colour_from_the_page(whole_page: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", whole_page, flags=re.DOTALL)
    assert len(pictures) == 6
    for picture in pictures:
        assert set(re.findall(r"#[0-9a-f]{6}", picture)) == set()
        assert set(re.findall(r"var\(--(\w+)\)", picture)) <= set(PALETTE)


def test_each_picture_is_also_a_png_file(whole_run: Path, whole_page: str) -> None:
    files = {path.stem: path for path in (whole_run / "report").glob("*.png")}
    assert set(files) == {"loss", "accuracy", "throughput", "step_time", "optimisation", "evaluation_val"}
    for path in files.values():
        with Image.open(path) as picture:
            assert picture.width > 1000
            assert len(picture.getcolors(1 << 20) or []) > 20, f"{path.name} is empty"


def test_the_gallery_marks_the_right_answers(whole_run: Path) -> None:
    text = write_page(whole_run, "--queries", "4")
    gallery = text[text.index('id="gallery"') : text.index('id="data"')]
    assert gallery.count("<blockquote>") == 4
    assert gallery.count('class="card query asking"') == 4
    # Every caption of the set belongs to an image of the set: each question has a right answer, among the five or after.
    for card in gallery.split('class="card query')[1:]:
        assert 'class="right' in card


def test_texts_of_the_data_cannot_become_markup(whole_page: str) -> None:
    assert "&lt;b&gt;" in whole_page
    assert "<b>" not in whole_page
    assert "&lt;k1&gt;" in whole_page


def test_bad_rows_are_counted_by_reason_and_shard_and_the_first_shown(whole_run: Path, whole_page: str) -> None:
    run = read_run(str(whole_run))
    (bad,) = run.quarantine
    assert bad.reasons == (("truncated", 29), ("not an image", 1))
    assert bad.shards == (("part-0", 15), ("part-1", 15))
    assert "30 in training" in whole_page
    assert whole_page.count("&lt;k") == report_bad_rows.SHOWN_BAD_ROWS


@pytest.mark.parametrize("data", ["shards", "shards/manifest-000003.json"])
def test_bad_rows_of_ingest_are_found_beside_the_shards(tmp_path: Path, data: str) -> None:
    run = Folder(tmp_path / "run")
    write_metrics(run)
    run.write_text("config.yaml", yaml.safe_dump({"data": {"train": str(tmp_path / data)}}))
    Folder(tmp_path / "shards").write_text("quarantine.jsonl", '{"shard": "a.csv", "row": 3, "reason": "empty file"}\n')
    assert "1 in ingest" in write_page(tmp_path / "run")


def test_bad_rows_are_those_of_the_ingests_of_the_version_and_counted_as_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_bad_rows, "_MOST_SHARDS", 5)
    shards = Folder(tmp_path / "shards")
    for version in (1, 2, 3):
        ingests = tuple({"quarantine": f"quarantine-{number}.jsonl"} for number in range(1, version + 1))
        Manifest(shards, (), version=version, ingests=ingests).publish()
        rows: list[dict[str, Any]] = [{"shard": "much.tar", "row": i, "reason": "no image"} for i in range(5 * version)]
        # A name may hold what elsewhere ends a line.
        rows += [{"shard": f"{i}\u2028.jpg", "row": None, "reason": f"duplicate: of {i}"} for i in range(20)]
        shards.write_text(f"quarantine-{version}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    (bad,) = report_bad_rows.read_bad_rows(Folder(tmp_path), {"data": {"train": str(tmp_path / "shards/manifest-000002.json")}})
    assert bad.count == 2 * 20 + 5 + 10
    assert bad.reasons == (("duplicate", 40), ("no image", 15))
    assert bad.shards[0] == ("much.tar", 15)
    assert len(bad.rows) == report_bad_rows.SHOWN_BAD_ROWS
    assert (bad.rows[5]["shard"], bad.rows[5]["reason"]) == ("0\u2028.jpg", "duplicate: of 0")


def test_rows_that_a_run_left_out_and_bad_rows_of_several_ingests_are_shown(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    write_metrics(run)
    sources = {name: {"path": str(tmp_path / name), "weight": 1} for name in ("one", "two")}
    run.write_text("config.yaml", yaml.safe_dump({"data": {"train": sources}}))
    for name in sources:
        Folder(tmp_path / name).write_text("quarantine.jsonl", f'{{"shard": "{name}.csv", "row": 3, "reason": "empty file"}}\n')
    earlier = Quarantine(Folder(tmp_path / "earlier"), most=1)
    earlier.add([(1, BadRow("/data", "a.parquet", 9, 0, 5, "", "no image"))], 1)
    write_skipped(run, read(Folder(tmp_path / "earlier")))
    page = write_page(tmp_path / "run")
    assert "2 in ingest" in page
    assert "1 in earlier runs, left out of this one" in page


def test_facts_follow_from_the_records(whole_run: Path) -> None:
    run = read_run(str(whole_run))
    assert report.pairs_seen(run) == 100 * BATCH
    assert report.training_seconds(run) == pytest.approx(100 * BATCH / 32)
    facts = dict(report.facts(run))
    assert facts["Pairs seen"] == "6,400"
    assert facts["Time in steps"] == "3:20 min"
    assert facts["DeepSpeed ZeRO"] == "stage 2"
    run.state["world_size"] = 1
    assert dict(report.facts(run))["DeepSpeed ZeRO"] == "none"
    assert facts["Finished checkpoints"] == "2"


def test_a_table_has_one_row_a_checkpoint_and_chance(whole_run: Path) -> None:
    (results,) = read_run(str(whole_run)).tasks().values()
    table = report.table("val", results)
    assert table.groups == (("text → image", 4), ("image → text", 4))
    assert table.columns == ("R@1", "R@5", "R@10", "median") * 2
    assert [row[0] for row in table.rows] == ["100", "50"]
    assert table.chance[:4] == ("8.33", "41.7", "83.3", "")
    for column in range(8):
        assert any(best[column] for _, _, best in table.rows)


def test_a_run_that_has_only_metrics_still_gets_a_page(tmp_path: Path) -> None:
    write_metrics(Folder(tmp_path / "young"))
    text = write_page(tmp_path / "young")
    assert "Nothing has been evaluated yet" in text
    assert "The run has no finished checkpoint yet." in text
    assert "None recorded" in text
    assert "no config.yaml" in text


def test_a_run_with_the_sigmoid_loss_shows_its_bias_and_no_guess(tmp_path: Path, whole_page: str) -> None:
    run = Folder(tmp_path / "sigmoid")
    records = ({**record(step), "train/logit_bias": -10.0 - step / 100} for step in range(1, 101))
    run.write_text("metrics.jsonl", "".join(json.dumps(values) + "\n" for values in records))
    run.write_text("config.yaml", yaml.safe_dump({"training": {"global_batch": BATCH}, "model": {"loss": "sigmoid"}}))
    page = write_page(tmp_path / "sigmoid")
    for words, softmax, sigmoid in (("guessing: ln", 1, 0), ("bias of the sigmoid loss", 0, 1), ("cross-entropy", 1, 0)):
        assert (words in whole_page, words in page) == (softmax, sigmoid), words


def test_a_run_with_one_record_and_gaps_still_gets_a_page(tmp_path: Path) -> None:
    only = {"step": 1, "time": 1.7e9, "train/loss": math.nan, "train/lr": 1e-3}
    Folder(tmp_path / "first").write_text("metrics.jsonl", json.dumps(only) + "\n")
    assert Page(write_page(tmp_path / "first")).open == []


def test_results_of_averaged_weights_have_a_chart_of_their_own(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", steps=(50,), averaged=True)
    write_metrics(run)
    task = Task(
        name="val", kind="retrieval", data=str(captioned(tmp_path / "val.parquet", [[f"number {i}"] for i in range(4)]))
    )
    checkpoint = run / "checkpoints" / "step_00000050"
    for suffix, weights in (("", checkpoint), ("-ema", checkpoint / "ema.safetensors")):
        write_result(run / "evaluation" / (checkpoint.name + suffix), task, evaluate_checkpoint(weights, task))
    page = write_page(tmp_path / "run")
    assert "val (EMA)" in page
    assert "step_00000050-ema" in page  # whose pictures the gallery shows
    assert "not whole" not in page
    assert read_run(run.url).unreadable == ()
    assert list(read_run(run.url).tasks()) == ["val (EMA)", "val"]


def test_an_unfinished_result_file_is_named_and_left_out(tmp_path: Path) -> None:
    run = Folder(tmp_path / "run")
    write_metrics(run)
    run.write_text("evaluation/step_00000010/val.json", '{"dataset": "val", "metr')
    assert "evaluation/step_00000010/val.json" in write_page(tmp_path / "run")


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_metrics_is_the_users_mistake(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        Folder(tmp_path).write_text("metrics.jsonl", content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        report.main(["--run", str(tmp_path)])
    assert not (tmp_path / "report").exists()


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is at"):
        report.main(["--run", str(tmp_path / "nowhere")])


def test_gallery_data_that_are_missing_are_the_users_mistake(whole_run: Path) -> None:
    with pytest.raises(UserError, match="do not exist"):
        report.main(["--run", str(whole_run), "--data", str(whole_run / "nothing.parquet")])


def test_evaluated_data_that_have_moved_cost_only_the_gallery(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run", steps=(50,))
    write_metrics(run)
    data = captioned(tmp_path / "val.parquet", [[f"number {i}"] for i in range(4)])
    task = Task(name="val", kind="retrieval", data=str(data))
    checkpoint = run / "checkpoints" / "step_00000050"
    write_result(run / "evaluation" / checkpoint.name, task, evaluate_checkpoint(checkpoint, task))
    data.unlink()
    assert "No gallery. It could not be made" in write_page(tmp_path / "run")


def test_a_right_answer_beyond_the_fifth_follows_with_its_place(whole_run: Path) -> None:
    wrong = tuple(Found(f"wrong {i}", 0.9 - i / 10, False, "data:image/png;base64,") for i in range(5))
    right = Found("the right one", 0.1, True, "data:image/png;base64,")
    query = Query("a question", wrong, rank=17, candidates=200, missed=right)
    gallery = Gallery("val.parquet", "step_00000001", 200, 200, (query,), (query,))
    text = report.render(read_run(str(whole_run)), [], [], gallery, "")
    assert "right image at place 17 of 200" in text
    assert text.count("the right one") == 3  # as the picture's text twice, and as a caption


def test_smoothing_keeps_a_constant_and_skips_gaps() -> None:
    values = np.full(200, 3.0)
    values[50:60] = np.nan
    smoothed = smooth(values)
    assert np.isnan(smoothed[50:60]).all()
    np.testing.assert_allclose(np.delete(smoothed, np.arange(50, 60)), 3.0)


def test_thinning_keeps_every_spike() -> None:
    values = np.zeros(50_000)
    values[31_415] = 7.0
    steps, kept = thin(np.arange(50_000.0), values)
    assert len(kept) < 1000
    assert steps[kept == 7.0].tolist() == [31_415.0]


def test_shares_show_the_digits_that_matter() -> None:
    assert [share(v) for v in (1.0, 0.5214, 1 / 12, 0.001, 1 / 4096)] == ["100 %", "52.1 %", "8.3 %", "0.1 %", "0.024 %"]


def test_large_photographs_become_small_jpegs_and_drawings_stay_png() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 800, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    assert thumbnail(file.getvalue()).startswith("data:image/jpeg;base64,")
    assert len(thumbnail(file.getvalue())) < 40_000
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    assert thumbnail(file.getvalue()).startswith("data:image/png;base64,")
    assert thumbnail(b"no image").startswith("data:image/")
    assert THUMBNAIL < 600
