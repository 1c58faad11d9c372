"""Folders on disk and, through a loopback server, in S3."""

import errno
import os
import pickle
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from msclip.errors import UserError
from msclip.storage import Folder


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    if request.param == "local":
        yield Folder(tmp_path / "runs")
        return
    # What fsspec alone knows, stands for all that it knows.
    url = "memory://bucket/runs" if request.param == "memory" else request.getfixturevalue("s3_url")
    folder = Folder(url) / request.node.name.partition("[")[0]
    yield folder
    folder.delete()


def test_what_is_written_is_read_listed_and_deleted(folder: Folder) -> None:
    assert folder.names() == []
    assert not folder.exists("a.txt")
    folder.write_text("b.txt", "grün")
    folder.write_bytes("a.txt", b"\x00\xff")
    (folder / "steps" / "one").write_text("c.json", "{}")
    assert folder.read_text("b.txt") == "grün"
    assert folder.read_bytes("a.txt") == b"\x00\xff"
    assert folder.read_text("steps/one/c.json") == "{}"
    assert folder.names() == ["a.txt", "b.txt", "steps"]
    assert folder.names("*.txt") == ["a.txt", "b.txt"]
    assert folder.exists()
    assert (folder / "a.txt").exists()
    folder.delete("a.txt")
    folder.delete("steps")
    folder.delete("never was")
    assert folder.names() == ["b.txt"]


def test_a_folder_may_be_deleted_by_several_at_once(folder: Folder) -> None:
    for i in range(300 if folder.local else 5):
        (folder / "old" / str(i % 10)).write_text(f"{i}.txt", "")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: folder.delete("old"), range(4)))
    assert not folder.exists("old")


def test_a_missing_file_is_a_file_not_found_error(folder: Folder) -> None:
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("nothing.json")


def test_files_travel_both_ways(folder: Folder, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "weights").write_bytes(content)
    folder.upload(tmp_path / "weights", "model.safetensors")
    folder.download("model.safetensors", tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == content


def test_a_folder_survives_pickling_and_works_afterwards(folder: Folder) -> None:
    (folder / "x").write_text("a b+c.txt", "here")
    again = pickle.loads(pickle.dumps(folder / "x"))
    assert again == folder / "x"
    assert again.names() == ["a b+c.txt"]
    assert Folder((folder / "x" / "a b+c.txt").url).exists()
    assert again.filesystem.get_file_info(again.path).is_file is False


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_text("state.json", "old")

    def fill_the_disk() -> None:
        with folder._replacing("state.json") as temporary:
            temporary.write_text("half of the n")
            assert folder.names() == ["state.json"]
            raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="full") as caught:
        fill_the_disk()
    assert caught.value.errno == errno.ENOSPC
    assert folder.read_text("state.json") == "old"
    assert os.listdir(tmp_path) == ["state.json"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    Folder(tmp_path).write_text("ours", "")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_lines_are_appended_locally_and_refused_in_an_object_store(tmp_path: Path, s3_url: str) -> None:
    folder = Folder(tmp_path / "run")
    folder.append_text("metrics.jsonl", "1\n")
    folder.append_text("metrics.jsonl", "2\n")
    assert folder.read_text("metrics.jsonl") == "1\n2\n"
    with pytest.raises(ValueError, match="only replace whole files"):
        Folder(s3_url).append_text("metrics.jsonl", "1\n")


def test_a_relative_path_stays_the_same_folder_in_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder("runs/one")
    monkeypatch.chdir("/")
    assert folder.local == tmp_path / "runs" / "one"
    assert Folder(f"file://{tmp_path}/a%20b").local == tmp_path / "a b"
    assert folder.name == "one"


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "s3://", "s3:// /a b"])
def test_a_url_no_file_system_knows_is_the_users_mistake(url: str) -> None:
    with pytest.raises(UserError, match="s3://"):
        Folder(url)


@pytest.mark.parametrize("place", ["local", "s3", "memory"])
def test_of_writers_at_the_same_time_one_makes_a_new_file(place: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    urls = {"local": str(tmp_path / "new"), "memory": f"memory://{tmp_path.name}/new"}
    folder = Folder(urls.get(place) or request.getfixturevalue("s3_url")) / "versions"

    def write(writer: int) -> bool:
        try:
            folder.write_new("one.json", f"writer {writer} ".encode() * 1000)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(write, range(8)))
    assert sum(done) == 1
    assert folder.read_text("one.json") == f"writer {done.index(True)} " * 1000
    assert folder.names() == ["one.json"]
    folder.delete()


def test_a_new_file_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links on this disk")

    monkeypatch.setattr(os, "link", refuse)
    folder = Folder(tmp_path)
    folder.write_new("a", b"first")
    with pytest.raises(FileExistsError):
        folder.write_new("a", b"second")
    assert folder.read_bytes("a") == b"first"
    assert folder.names() == ["a"]


def test_a_stream_writes_below_folders_that_are_not_there_yet(folder: Folder) -> None:
    with folder.open_output("deep/er/rows") as stream:
        for part in (b"one ", b"two"):
            stream.write(part)
    assert folder.read_bytes("deep/er/rows") == b"one two"


def test_the_environment_may_name_another_s3(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = s3_url.partition("%3A")[2].partition("&")[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    folder = Folder("s3://bucket/by-environment")
    folder.write_new("a.txt", b"here")
    with pytest.raises(FileExistsError):
        folder.write_new("a.txt", b"there")
    assert (Folder(s3_url.replace("bucket/runs", "bucket/by-environment"))).read_bytes("a.txt") == b"here"
