"""Storage that no longer lets an ingest in ends it; a single file that is hidden is a bad row."""

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from msclip.data.sources import Row, Source, open_source
from msclip.storage import Folder
from tests.faulty_proxy import FaultyProxy, at_port
from tests.pipelines.test_ingest import captions, jpeg, reasons, run
from tests.pipelines.test_web import site
from tests.web_server import WebServer

__all__ = ["site"]
ROWS = 12


@pytest.fixture(scope="module")
def proxy(s3_port: int) -> Iterator[FaultyProxy]:
    """In front of a bucket with a folder of pictures and their captions."""
    folder = Folder(at_port("s3://bucket/photos", s3_port))
    for i in range(ROWS):
        folder.write_bytes(f"{i:02}.jpg", jpeg(i))
        folder.write_bytes(f"{i:02}.txt", f"picture {i}".encode())
    with FaultyProxy(s3_port) as proxy:
        yield proxy


def rows(source: Source) -> list[Row]:
    return [row for unit in source.units()[0] for row in source.read(unit)]


@pytest.mark.parametrize(
    ("status", "code", "reason"), [(403, "AccessDenied", "PermissionError"), (404, "", "FileNotFoundError")]
)
def test_one_file_that_is_forbidden_or_gone_is_a_bad_row(proxy: FaultyProxy, status: int, code: str, reason: str) -> None:
    source = open_source(at_port("s3://bucket/photos", proxy.port))
    proxy.refuse = lambda method, path: (status, code) if "/03.jpg" in path else None
    assert [(row.key, row.refused.reason) for row in rows(source) if row.image is None] == [("03.jpg", f"unreadable: {reason}")]


@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", PermissionError),
        (401, "Unauthorized", PermissionError),
        (400, "ExpiredToken", PermissionError),
        (404, "NoSuchBucket", FileNotFoundError),
    ],
)
def test_an_input_that_is_closed_or_gone_makes_no_bad_rows(
    proxy: FaultyProxy, status: int, code: str, error: type[OSError]
) -> None:
    proxy.refuse = lambda method, path: None
    source = open_source(at_port("s3://bucket/photos", proxy.port))
    units, _ = source.units()
    proxy.refuse = lambda method, path: (status, code)
    with pytest.raises(error):
        list(source.read(units[0]))


class Expiring:
    """A credential that is good for some requests to the pictures, and then for none at all."""

    def __init__(self, requests: int):
        self.left, self.lock = requests, threading.Lock()

    def __call__(self, method: str, path: str) -> tuple[int, str] | None:
        with self.lock:
            self.left -= "/photos/" in path
            return (400, "ExpiredToken") if self.left < 0 else None


def test_an_ingest_whose_credential_expires_stops_and_is_started_again(
    ray_session: None, proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    options = ("--input", at_port("s3://bucket/photos", proxy.port), "--output", output)
    proxy.refuse = Expiring(7)
    status, _, error = run(capsys, *options)
    assert status == 2
    assert "ExpiredToken" in error
    assert "If a credential has expired, renew it" in error
    assert "Traceback" not in error
    assert not list(output.iterdir())  # nothing is published, nothing left behind
    proxy.refuse = lambda method, path: None
    assert run(capsys, *options)[0] == 0
    assert captions(output) == sorted([f"picture {i}"] for i in range(ROWS))
    assert reasons(output) == Counter()


def test_an_input_to_which_access_is_refused_at_the_start_is_said_so(
    proxy: FaultyProxy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.refuse = lambda method, path: (403, "InvalidAccessKeyId")
    status, _, error = run(capsys, "--input", at_port("s3://bucket/photos", proxy.port), "--output", tmp_path / "out")
    assert status == 2
    assert "access to s3://bucket/photos was refused (403: Forbidden). If a credential" in error


def test_a_credential_that_expires_for_the_output_too_does_not_hide_why_an_ingest_ended(
    ray_session: None, proxy: FaultyProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.refuse = Expiring(7)
    place = at_port("s3://bucket/photos", proxy.port)
    output = at_port("s3://bucket/out", proxy.port)
    status, _, error = run(capsys, "--input", place, "--output", output)
    assert status == 2
    assert "renew it" in error


def test_a_signed_address_that_expires_stops_an_ingest(
    ray_session: None, site: WebServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--input", site.of("pairs.tar"), "--output", tmp_path / "out")
    status, _, error = run(capsys, "--input", f"{site.url}/pairs.tar?token=old", "--output", tmp_path / "out")
    assert status == 2
    assert "give the new URL for the web" in error
    assert "old" not in error
    site.expires_after = 0  # its size is still told, and no byte
    assert run(capsys, *options)[0] == 2
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    site.expires_after = None
    assert run(capsys, *options)[0] == 0
    assert len(captions(tmp_path / "out")) == ROWS
