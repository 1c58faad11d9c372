"""Where the optional real data lie (MSCLIP_SHARED, or a folder `shared` beside the checkout), and an S3 on this machine."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faulty_proxy import at_port


def _shared(part: str) -> Path:
    root = Path(os.environ.get("MSCLIP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / part).is_dir():
        pytest.skip(f"no {part} at {root / part}; set MSCLIP_SHARED to the folder that holds it")
    return root / part


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image-text data (Flickr8k, emoji art, labelled sets)."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_fixtures() -> Path:
    """Recorded outputs of published models."""
    return _shared("fixtures")


@pytest.fixture(scope="module")
def s3_port() -> Iterator[int]:
    """The port of a moto server of this test's own, with a bucket, and credentials in the environment."""
    boto3 = pytest.importorskip("boto3")
    pytest.importorskip("moto")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    settings = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    command = [sys.executable, "-c", "from moto.server import main; import sys; main(sys.argv[1:])"]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        server = subprocess.Popen(
            [*command, "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 60
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline, "the S3 server did not start"
                    time.sleep(0.1)
            boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}").create_bucket(Bucket="bucket")
            yield port
        finally:
            server.terminate()
            server.wait(10)


@pytest.fixture(scope="module")
def s3_url(s3_port: int) -> str:
    """A folder in that bucket."""
    return at_port("s3://bucket/runs", s3_port)
