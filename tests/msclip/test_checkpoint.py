"""Checkpoints: complete or not there, exact, and refused in a sentence where they do not fit."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import msclip
from msclip import checkpoint
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.model import ModelConfig
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


def test_an_exported_model_comes_back_with_all_it_needs(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    preprocess = Preprocess(image_size=64, mean=(0.1, 0.2, 0.3))
    checkpoint.export(tmp_path / "m.safetensors", model.state_dict(), model.config, tokenizer, preprocess)
    loaded = msclip.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocess == preprocess
    assert torch.equal(loaded.tokenizer(["two dogs"]), tokenizer(["two dogs"]))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.model.encode_image(images), model.encode_image(images))


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


@pytest.mark.parametrize("damage", ["cut", "foreign", "text", "absent"])
def test_a_file_that_is_no_export_is_refused_in_a_sentence(
    tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer, damage: str
) -> None:
    file = tmp_path / "m.safetensors"
    checkpoint.export(file, model.state_dict(), model.config, tokenizer, Preprocess(image_size=64))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "foreign":
        save_file({"x": torch.ones(1)}, file)
    elif damage == "text":
        file.write_text("not a model")
    else:
        file.unlink()
    with pytest.raises(msclip.UserError, match=r"m\.safetensors"):
        msclip.load(file)


def test_weights_of_another_architecture_are_named(model: msclip.Model) -> None:
    other = msclip.build(ModelConfig.from_dict({**model.config.to_dict(), "embed_dim": 48}), device="meta")
    with pytest.raises(msclip.UserError, match=r"projection\.image\.weight"):
        checkpoint.load_weights(other, model.state_dict(), "x")
    smaller = msclip.create_model("ms_clip_s_tiny", device="meta", branch_layers=())
    with pytest.raises(msclip.UserError, match="another architecture"):
        checkpoint.load_weights(smaller, model.state_dict(), "x")
