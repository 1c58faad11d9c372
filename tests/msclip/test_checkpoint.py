"""Checkpoints: complete or not there, exact, and refused in a sentence where they do not fit."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import msclip
from msclip import checkpoint
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.storage import Folder


@pytest.fixture(scope="module")
def model() -> msclip.Model:
    return msclip.create_model("ms_clip_s_tiny").eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a dog runs", "two birds fly over water"], 600, context_length=16)


def saved(run: Folder, step: int, model: msclip.Model, tokenizer: Tokenizer) -> Folder:
    state, moments = model.state_dict(), {"exp_avg/logit_scale": torch.ones(1)}
    return checkpoint.save(run, {"step": step}, state, moments, model.config, tokenizer, Preprocess(image_size=64))


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The operating system refuses longer files, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_checkpoint_without_its_marker_does_not_count(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    run = Folder(tmp_path)
    first, second = (saved(run, step, model, tokenizer) for step in (9, 10))
    assert checkpoint.finished(run) == [first, second]
    second.delete(checkpoint.COMPLETE)
    assert checkpoint.finished(run) == [first]
    assert checkpoint.newest(run) == first


def test_an_average_is_a_second_export_that_pruning_keeps(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    run, preprocess = Folder(tmp_path), Preprocess(image_size=64)
    average = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    for step in (1, 2):
        folder = checkpoint.save(
            run, {"step": step}, model.state_dict(), {}, model.config, tokenizer, preprocess, averaged_state=average
        )
    without = saved(run, 3, model, tokenizer)
    checkpoint.prune(run, keep=None, keep_optimizer=1)
    assert not folder.exists(checkpoint.OPTIMIZER)
    loaded = msclip.load(tmp_path / "checkpoints" / folder.name / checkpoint.EMA)
    assert (loaded.config, loaded.preprocess) == (model.config, preprocess)
    assert all(torch.equal(value, average[name]) for name, value in loaded.model.state_dict().items())
    assert torch.equal(msclip.load(folder.url).model.logit_scale, model.logit_scale)
    assert checkpoint.load_average(folder).keys() == average.keys()
    assert checkpoint.load_average(without) == {}


def test_pruning_keeps_what_it_was_told_to(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    run = Folder(tmp_path)
    for step in (1, 2, 3, 4):
        saved(run, step, model, tokenizer)
    checkpoint.prune(run, keep=3, keep_optimizer=1)
    assert [folder.name for folder in checkpoint.finished(run)] == [checkpoint.folder_name(s) for s in (2, 3, 4)]
    assert [folder.exists(checkpoint.OPTIMIZER) for folder in checkpoint.finished(run)] == [False, False, True]


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    run = Folder(tmp_path)
    earlier = saved(run, 1, model, tokenizer)
    with files_up_to(100_000), pytest.raises(msclip.TrainingError, match="step 2 could not be written"):
        saved(run, 2, model, tokenizer)
    assert checkpoint.finished(run) == [earlier]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_dir()) == ["checkpoints", earlier.name]
