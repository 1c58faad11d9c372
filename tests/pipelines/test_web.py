"""Jobs on data that lie on the web behind a key: it is used, and written nowhere."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from msclip.data.mixture import Mixture
from msclip.data.shards import Manifest
from pipelines import train
from tests.pipelines.test_ingest import captions, jpeg, reasons, run, write_parquet
from tests.web_server import WebServer

KEY = "X-Amz-Signature=5eCr3t%2Bt&token=t0ken"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WebServer]:
    """A tar of twelve pairs and one that is none, an evaluation set, queries, and a file to train on."""
    folder = tmp_path / "site"
    folder.mkdir()
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for i in range(13):
            for name, data in ((f"{i:02}.jpg", jpeg(i) if i else b"none"), (f"{i:02}.txt", f"picture {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    write_parquet(folder / "evaluation.parquet", [(jpeg(1), "one")])
    write_parquet(folder / "train.parquet", [(jpeg(i), f"picture {i}") for i in range(8)])
    (folder / "queries.txt").write_text("picture\n")
    with WebServer(folder, KEY) as site:
        yield site


def written(folder: Path) -> str:
    """All that stands in the files of a folder."""
    return "".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())


def test_an_ingest_writes_no_key(
    ray_session: None, site: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ("--input", site.of("pairs.tar"), "--output", output, "--queries", site.of("queries.txt"))
    status, printed, told = run(capsys, *options, "--decontaminate", site.of("evaluation.parquet"))
    assert (status, told) == (0, "")
    assert captions(output) == sorted([f"picture {i}"] for i in range(2, 13))
    assert reasons(output) == {"not an image": 1, "in an evaluation set": 1}
    (provenance,) = Manifest.load(str(output)).ingests
    assert provenance["input"] == provenance["settings"]["input"] == f"{site.url}/pairs.tar"
    assert provenance["settings"]["decontaminate"] == [f"{site.url}/evaluation.parquet"]
    status, again, refused = run(capsys, "--input", f"{site.url}/pairs.tar?{KEY}", "--output", output)
    assert status == 2
    assert "is in" in refused
    for text in (written(output), printed, again, refused):
        assert "5eCr3t" not in text
        assert "t0ken" not in text


def test_of_one_path_each_query_is_an_input_of_its_own(
    ray_session: None, site: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    for rows, site.key in ((3, "id=1"), (5, "id=2")):
        write_parquet(tmp_path / "site" / "download.parquet", [(jpeg(rows * 10 + i), f"{rows}") for i in range(rows)])
        options = ("--input", site.of("download.parquet"), "--output", output)
        assert run(capsys, *options)[0] == 0
        status, _, refused = run(capsys, *options)
        assert status == 2
        assert "download.parquet' is in" in refused
    site.key = ""
    assert run(capsys, "--input", f"{site.url}/download.parquet", "--output", output)[0] == 0
    manifest = Manifest.load(str(output))
    assert [(each["input"], each["kept"]) for each in manifest.ingests] == [
        (f"{site.url}/download.parquet", rows) for rows in (3, 5, 5)
    ]
    assert len({each.get("address_sha256") for each in manifest.ingests}) == 3
    assert "?id=" not in written(output)


def test_a_training_is_configured_without_the_key_and_reads_with_it(site: WebServer) -> None:
    job, _ = train.new(["--data.train", site.of("train.parquet"), "--data.caption_column", "caption"])
    data = Mixture.load(job.data.train, job.data.image_column, job.data.caption_column)
    assert data.rows == 8
    assert data.home(0) == site.url  # what its quarantine records would name
    assert train.plain(job)["data"]["train"] == f"{site.url}/train.parquet"
