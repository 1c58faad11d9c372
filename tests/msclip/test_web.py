"""Data on the web: what follows the question mark of an address goes to the server, and is written down nowhere."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from msclip.data.mixture import Mixture, pinned
from msclip.data.shards import Manifest
from msclip.errors import UserError, without_queries
from msclip.storage import Folder
from tests.web_server import WebServer

# As AWS signs: letters that a client might quote anew, and with that break the signature.
KEY = "X-Amz-Credential=AKIA%2F2026%2Fs3&X-Amz-Signature=5eCr3t%2Bt%3D"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[WebServer]:
    (tmp_path / "my data").mkdir()
    pq.write_table(pa.table({"image": [b"x", b"y"], "captions": [["one"], ["two"]]}), tmp_path / "my data" / "a b.parquet")
    with WebServer(tmp_path, KEY) as site:
        yield site


def test_a_signed_file_is_read_and_its_signature_shows_nowhere(site: WebServer) -> None:
    data = Mixture.load(pinned(site.of("my%20data/a%20b.parquet")))
    again: Mixture = pickle.loads(pickle.dumps(data))
    assert again.read(0)["captions"].to_pylist() == [["one"], ["two"]]
    assert all(path.endswith(f"?{KEY}") for path in site.asked)
    manifest = data.sources[0].manifest
    assert data.home(0) == manifest.folder.path == f"{site.url}/my%20data"  # of quarantine records
    for shown in (repr(manifest), str(manifest.folder.url), manifest.to_json(), data.digest):
        assert "Amz" not in shown
        assert "5eCr3t" not in shown


def test_files_that_only_the_query_tells_apart_stay_apart(tmp_path: Path) -> None:
    with WebServer(tmp_path, "id=1") as site:
        for site.key in ("id=1", "id=2"):
            pq.write_table(pa.table({"image": [b"x"], "captions": [[site.key]]}), tmp_path / "download")
            for _ in range(2):  # the second time out of memory
                assert Manifest.load(site.of("download")).read(0, keep=True)["captions"].to_pylist() == [[site.key]]


def test_a_missing_and_a_forbidden_file_are_told_apart_and_named_without_the_key(site: WebServer) -> None:
    with pytest.raises(UserError, match=r"the data '.*/my%20data/c.parquet' do not exist") as missing:
        Manifest.load(site.of("my%20data/c.parquet"))
    site.refusal = 401
    with pytest.raises(PermissionError, match=r"401 Unauthorized: '.*/my%20data/a%20b.parquet'") as refused:
        Manifest.load(f"{site.url}/my%20data/a%20b.parquet?token=5eCr3t")
    site.refusal = 503
    with pytest.raises(OSError, match="503 Service Unavailable") as busy:
        Manifest.load(f"{site.url}/my%20data/a%20b.parquet?token=5eCr3t")
    for error in (missing, refused, busy):
        assert "5eCr3t" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    ["https://5eCr3t@host/a.parquet", "https://user:5eCr3t@host/a", "gs://bucket/a?access_token=5eCr3t", "s3://b/a?key=5eCr3t"],
)
def test_a_key_that_would_be_written_down_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError) as refused:
        Folder(url)
    assert "5eCr3t" not in str(refused.value)


@pytest.mark.parametrize(
    "name",
    ["passphrase", "sftp_passwd", "pass%77ord", "X-Amz-Signature", "SAS", "accessToken2", "api_key", "apikey", "secretKeys"],
)
def test_a_parameter_that_looks_like_a_password_is_named(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"the parameter '{name}', which looks like a password")) as refused:
        Folder(f"sftp://u@h/x?port=22&{name}=5eCr3t")
    assert "5eCr3t" not in str(refused.value)
    with pytest.raises(UserError, match="must not hold a password") as refused:
        Folder("sftp://u@h/x?5eCr3t-key")
    assert "5eCr3t" not in str(refused.value)


@pytest.mark.parametrize("name", ["monkey", "design", "compass", "keyboard", "tokenizer", "bypass", "author", "passage"])
def test_a_parameter_that_only_has_such_letters_is_none(name: str) -> None:
    assert Folder(f"memory://x/y?{name}=1").url == f"memory://x/y?{name}=1"


def test_the_letters_of_a_scheme_have_no_case(tmp_path: Path) -> None:
    signed = Folder("HTTP://localhost/a.parquet?token=5eCr3t")
    assert (signed.url, signed.full_url) == ("http://localhost/a.parquet", "http://localhost/a.parquet?token=5eCr3t")
    assert Folder(f"FILE://{tmp_path}/a%20b").local == tmp_path / "a b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the data 'https://h/a b.parquet?x=1&y=2' are", "the data 'https://h/a b.parquet' are"),
        ("""["https://h/a?x='1'"]""", """["https://h/a"]"""),
        ("the data 'https://h/a.parquet?x=1&y=2' are", "the data 'https://h/a.parquet' are"),
        ("see http://h:80/a?x=1: no", "see http://h:80/a: no"),
        ("https://h/a?x=1, https://h/b?x=2).", "https://h/a, https://h/b)."),
        ("why? s3://b/a?region=x", "why? s3://b/a?region=x"),
        ("https://h/a", "https://h/a"),
        ("the data 'https://h/?q=a b&token=5eCr3t' are", "the data 'https://h/' are"),
        ("https://h/? q=a b;token=5eCr3t.", "https://h/."),
        ("https://h/a?x=1 2&y=3, https://h/b?x=1 2&y=3 are", "https://h/a, https://h/b are"),
        ("https://h/a?x=https://k/ b&token=5eCr3t", "https://h/a"),
        ("https://h/a?x=1 https://g/b c&token=5eCr3t", "https://h/a"),
        ("https://h/a?b c?token=5eCr3t", "https://h/a"),
        ("HTTPS://h/it's?token=5eCr3t", "HTTPS://h/it's"),
        ("did you mean https://h/b? yes", "did you mean https://h/b? yes"),
        ("(did you mean 'https://h/b?'?)", "(did you mean 'https://h/b?'?)"),
        ("is it https://h/b? or https://h/c?token=5eCr3t", "is it https://h/b? or https://h/c"),
        ("no file matches 'https://h/0000?.parquet'", "no file matches 'https://h/0000?.parquet'"),
        ("https://h/00??.parquet, which", "https://h/00??.parquet, which"),
        ("https://h/00??.parquet?token=5eCr3t", "https://h/00"),  # too much
    ],
)
def test_of_web_addresses_in_messages_the_query_is_left_out(text: str, shown: str) -> None:
    assert without_queries(text) == shown
    assert str(UserError(text)) == shown
