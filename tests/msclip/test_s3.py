"""S3 on a bad day: a proxy before the loopback server refuses, stalls and cuts, and nothing is lost or there twice."""

import hashlib
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from msclip import s3, s3_requests
from msclip.errors import UserError
from msclip.storage import Folder
from tests.faulty_proxy import Faults, FaultyProxy, at_port

BAD_DAY = Faults(slow_down=0.1, cut=0.1, lost=0.05, stall=0.02, stall_seconds=0.5, seed=1)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest parts that S3 takes, and hardly a pause."""
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_requests, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.02)


def folder(proxy: FaultyProxy, name: str) -> Folder:
    return Folder(at_port(f"s3://bucket/{name}", proxy.port))


def raw(port: int) -> Callable[[str], bytes]:
    """Reads an object past the proxy."""
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    return lambda key: client.get_object(Bucket="bucket", Key=key)["Body"].read()


def test_on_a_bad_day_all_bytes_come_and_go_whole(s3_port: int, tmp_path: Path) -> None:
    direct = raw(s3_port)
    s3_requests.repeated.take()
    with FaultyProxy(s3_port, BAD_DAY) as proxy:
        store = folder(proxy, "bad-day")
        for i, size in enumerate((0, 1, 50_000, 70_000, 300_000, 6_000_000, 13_000_000)):
            content = np.random.default_rng(i).bytes(size)
            (tmp_path / "file").write_bytes(content)
            store.write_bytes(f"{i}/written", content)
            store.upload(tmp_path / "file", f"{i}/uploaded")
            with store.open_output(f"{i}/streamed") as stream:
                for start in range(0, len(content), 3_333_333):
                    stream.write(content[start : start + 3_333_333])
            for name in ("written", "uploaded", "streamed"):
                assert direct(f"bad-day/{i}/{name}") == content
                assert store.read_bytes(f"{i}/{name}") == content
                with store.filesystem.open_input_file((store / f"{i}/{name}").path) as file:
                    assert hashlib.sha256(file.read()).digest() == hashlib.sha256(content).digest()
            store.download(f"{i}/uploaded", tmp_path / "back")
            assert (tmp_path / "back").read_bytes() == content
        assert store.names() == [str(i) for i in range(7)]
        store.delete("3")
        assert not store.exists("3")
        assert store.exists("4")
    assert {"slow_down", "cut", "lost", "stall"} <= proxy.done.keys()
    # A stall only takes time. Everything else was asked again, and counted.
    assert s3_requests.repeated.take() == proxy.done.total() - proxy.done["stall"]


def test_parquet_is_read_in_concurrent_parts(s3_port: int, tmp_path: Path) -> None:
    images = [np.random.default_rng(i).bytes(200_000) for i in range(100)]
    pq.write_table(pa.table({"image": images, "n": list(range(100))}), tmp_path / "x.parquet", compression="none")
    with FaultyProxy(s3_port, Faults(cut=0.2, seed=2)) as proxy:
        store = folder(proxy, "parquet")
        store.upload(tmp_path / "x.parquet", "x.parquet")
        place = store / "x.parquet"
        with place.filesystem.open_input_file(place.path) as stream:
            table = pq.ParquetFile(stream, pre_buffer=True).read_row_group(0, use_threads=False)
    assert table["image"].to_pylist() == images
    assert proxy.done["cut"]
    assert proxy.most_at_once > 2


def test_a_cut_body_is_read_on_from_where_it_broke_off(s3_port: int) -> None:
    content = np.random.default_rng(0).bytes(4_000_000)
    Folder(at_port("s3://bucket/resumed", s3_port)).write_bytes("x", content)
    with FaultyProxy(s3_port, Faults(cut=1.0)) as proxy:  # each answer is half of what was asked for
        assert folder(proxy, "resumed").read_bytes("x") == content
    assert proxy.done["cut"] == proxy.seen["GET"] - 1  # the last byte cannot be halved


def test_a_replaced_object_is_never_read_half_and_half(s3_port: int) -> None:
    store = Folder(at_port("s3://bucket/replaced", s3_port))
    store.write_bytes("x", b"a" * 300_000)
    with store.filesystem.open_input_file((store / "x").path) as file:
        assert file.read(10) == b"a" * 10
        store.write_bytes("x", b"b" * 300_000)
        with pytest.raises(OSError, match="replaced"):
            file.read()


def test_a_writer_that_fails_leaves_the_old_file(s3_port: int, tmp_path: Path) -> None:
    store = Folder(at_port("s3://bucket/failing", s3_port))
    store.write_text("x", "old")

    def fail() -> None:
        with store.open_output("x") as stream:
            stream.write(b"n" * 6_000_000)
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    with FaultyProxy(s3_port, Faults(slow_down=1.0)) as proxy, pytest.raises(OSError, match="SlowDown"):
        folder(proxy, "failing").write_text("x", "new")
    assert store.read_text("x") == "old"
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}")
    assert "Uploads" not in client.list_multipart_uploads(Bucket="bucket", Prefix="failing")


def test_of_writers_on_a_bad_day_exactly_one_creates_a_file_and_knows_it(s3_port: int) -> None:
    with FaultyProxy(s3_port, Faults(slow_down=0.1, lost=0.3, seed=3)) as proxy, ThreadPoolExecutor(4) as pool:
        store, start = folder(proxy, "created"), threading.Barrier(4)

        def create(writer: int, name: str) -> bool:
            start.wait()
            try:
                store.write_new(name, str(writer).encode())
            except FileExistsError:
                return False
            return True

        for name in "abcdef":
            won = list(pool.map(create, range(4), [name] * 4))
            assert sum(won) == 1
            assert store.read_text(name) == str(won.index(True))
    assert proxy.done["lost"] > 2


def test_a_store_without_conditions_is_looked_into_first(s3_port: int) -> None:
    with FaultyProxy(s3_port, Faults(conditions=False)) as proxy:
        store = folder(proxy, "plain")
        store.write_new("a", b"first")
        with pytest.raises(FileExistsError):
            store.write_new("a", b"second")
        assert store.read_bytes("a") == b"first"


def test_the_file_system_lists_copies_and_moves_as_pyarrow_expects(s3_port: int, tmp_path: Path) -> None:
    store = Folder(at_port("s3://bucket/tree", s3_port))
    for name in ("a", "b/c", "b/d/e"):
        store.write_text(name, name)
    boto3.client("s3", endpoint_url=f"http://127.0.0.1:{s3_port}").put_object(Bucket="bucket", Key="tree/mark/", Body=b"")
    system = pickle.loads(pickle.dumps(store.filesystem))
    assert system == store.filesystem

    def listed(base: str, recursive: bool) -> dict[str, str]:
        found = system.get_file_info(fs.FileSelector(base, recursive=recursive))
        return {info.path: info.type.name for info in found}

    everything = {"a": "File", "b": "Directory", "b/c": "File", "b/d": "Directory", "b/d/e": "File", "mark": "Directory"}
    assert listed("bucket/tree", True) == {f"bucket/tree/{name}": kind for name, kind in everything.items()}
    assert listed("bucket/tree", False) == {f"bucket/tree/{name}": everything[name] for name in ("a", "b", "mark")}
    assert "bucket/tree" in listed("bucket", False)
    with pytest.raises(FileNotFoundError):
        listed("bucket/nothing", True)
    fs.copy_files("bucket/tree", str(tmp_path / "tree"), system, fs.LocalFileSystem())
    assert (tmp_path / "tree" / "b" / "d" / "e").read_text() == "b/d/e"
    system.move("bucket/tree/a", "bucket/tree/z")
    assert (store.names(), store.read_text("z")) == (["b", "mark", "z"], "a")
    with pytest.raises(OSError, match="whole bucket"):
        Folder(at_port("s3://bucket", s3_port)).filesystem.delete_dir_contents("bucket")
    assert not Folder(at_port("s3://no-such-bucket/x", s3_port)).exists()


def test_the_environment_names_endpoint_and_profile(s3_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{s3_port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    s3_requests._client.cache_clear()
    folder = Folder("s3://bucket/by-environment")
    with pytest.raises(UserError, match="AWS_PROFILE"):
        folder.write_text("a", "here")
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_PROFILE", "team")
    s3_requests._client.cache_clear()
    folder.write_text("a", "here")
    assert Folder(at_port("s3://bucket/by-environment", s3_port)).read_text("a") == "here"
    s3_requests._client.cache_clear()


@pytest.mark.parametrize("url", ["s3://key:hush@bucket/x", "sftp://me:hush@host/x", "s3://bucket/x?secret_key=hush"])
def test_a_url_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(UserError) as caught:
        Folder(url)
    assert "hush" not in str(caught.value)


def test_a_process_forked_from_one_that_read_has_connections_of_its_own(s3_port: int) -> None:
    store = Folder(at_port("s3://bucket/forked", s3_port))
    content = os.urandom(12_000_000)
    store.write_bytes("x", content)
    path = (store / "x").path
    with store.filesystem.open_input_file(path) as file:
        file.read()
    child = os.fork()
    if not child:  # in parts, so by threads that a fork does not bring along
        with store.filesystem.open_input_file(path) as file:
            os._exit(0 if file.read() == content else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
