"""Exports: one file with all that a model needs, read back exactly or refused by the name of what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import msclip
from msclip import checkpoint, describe, exports
from msclip.convert import __main__ as convert
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer
from msclip.model import ModelConfig
from tests.msclip.tiny_models import equal


@pytest.fixture(scope="module")
def model() -> msclip.Model:
    return msclip.create_model("ms_clip_s_tiny").eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a dog runs", "two birds fly over water"], 600, context_length=16)


@pytest.fixture
def file(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> Path:
    """An export of `model`."""
    exports.export(tmp_path / "m.safetensors", model.state_dict(), model.config, tokenizer, Preprocess(image_size=64))
    return tmp_path / "m.safetensors"


def edited(file: Path, part: str, changes: dict[str, Any], gone: str | None = None) -> None:
    """Rewrites values of a section of the header, which is text that anybody can edit."""
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    values = json.loads(header[part]) | changes
    values.pop(gone, None)
    save_file(load_file(file), file, metadata=header | {part: json.dumps(values)})


def stored(file: Path, dtype: torch.dtype, names: str = "") -> None:
    """Rewrites the tensors whose name contains `names` with numbers of another type."""
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    tensors = {n: t.to(dtype) if names in n and t.is_floating_point() else t for n, t in load_file(file).items()}
    save_file(tensors, file, metadata=header)


def test_an_exported_model_comes_back_with_all_it_needs(tmp_path: Path, model: msclip.Model, tokenizer: Tokenizer) -> None:
    preprocess = Preprocess(image_size=64, mean=(0.1, 0.2, 0.3))
    exports.export(tmp_path / "m.safetensors", model.state_dict(), model.config, tokenizer, preprocess)
    loaded = msclip.load(tmp_path / "m.safetensors")
    assert loaded.config == model.config
    assert loaded.preprocess == preprocess
    assert torch.equal(loaded.tokenizer(["two dogs"]), tokenizer(["two dogs"]))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.model.encode_image(images), model.encode_image(images))


@pytest.mark.parametrize("damage", ["cut", "foreign", "text", "absent"])
def test_a_file_that_is_no_export_is_refused_in_a_sentence(file: Path, damage: str) -> None:
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
        exports.load_weights(other, model.state_dict(), "x")
    smaller = msclip.create_model("ms_clip_s_tiny", device="meta", branch_layers=())
    with pytest.raises(msclip.UserError, match="another architecture"):
        exports.load_weights(smaller, model.state_dict(), "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_in_fewer_or_more_bits_are_float32_here_and_counters_stay_whole(
    file: Path, model: msclip.Model, dtype: torch.dtype
) -> None:
    stored(file, dtype)
    loaded = msclip.load(file).model
    for name, tensor in loaded.state_dict().items():
        expected = model.state_dict()[name]
        assert tensor.dtype == expected.dtype == (torch.int64 if name.endswith("num_batches_tracked") else torch.float32)
        assert torch.equal(tensor, expected.to(dtype).to(expected.dtype) if expected.is_floating_point() else expected)
    assert loaded.encode_image(torch.randn(1, 3, 64, 64)).isfinite().all()


def test_whole_numbers_for_weights_are_refused_by_name_and_not_with_a_traceback(
    file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stored(file, torch.int32, "token_embedding")
    for main, arguments in ((describe.main, [str(file)]), (convert.main, [str(file), str(tmp_path / "x"), "--to", "msclip"])):
        assert main(arguments) == 2
        error = capfd.readouterr().err
        assert "text_input.token_embedding.weight must be of type torch.float32 or alike, got torch.int32" in error


def test_a_model_is_read_in_evaluation_mode(file: Path, model: msclip.Model) -> None:
    found = checkpoint.read(file).model
    assert not any(module.training for module in found.modules())
    assert equal(found, model)


@pytest.mark.parametrize(
    ("part", "changes", "gone", "words"),
    [
        ("preprocess", {"image_size": 32}, None, "preprocess.image_size is 32 and model.image_size 64"),
        ("preprocess", {}, "mean", "it has no preprocess.mean"),
        ("preprocess", {"mean": [0.1, 0.2]}, None, r"preprocess.mean must be a list of 3, each a number, got \(0.1, 0.2\)"),
        ("model", {"stem": "no"}, None, "model.stem must be true or false, got 'no'"),
        ("model", {"stem": 1}, None, "model.stem must be true or false, got 1"),
        ("model", {"layers": 6.0}, None, "model.layers must be a whole number, got 6.0"),
        ("model", {"layers": True}, None, "model.layers must be a whole number, got True"),
        ("model", {"norm_eps": "1e-12"}, None, "model.norm_eps must be a number"),
        ("model", {"activation": "relu"}, None, "model.activation must be quick_gelu or gelu, got 'relu'"),
        ("model", {"branch_layers": [1, 2, 3, 4, "5"]}, None, "model.branch_layers must be a list, each a whole number"),
        (
            "model",
            {"sharing": {"layers": "last:5", "attn": "yes"}},
            None,
            "model.sharing.attn must be true or false, got 'yes'",
        ),
        ("model", {"sharing": "all"}, None, "model.sharing must be a section of settings, got 'all'"),
    ],
)
def test_a_header_with_a_wrong_value_is_refused_by_its_name(
    file: Path, part: str, changes: dict[str, Any], gone: str | None, words: str
) -> None:
    edited(file, part, changes, gone)
    with pytest.raises(msclip.UserError, match=rf"m\.safetensors is refused: .*{words}"):
        msclip.load(file)


def test_a_header_without_any_preprocessing_is_refused(file: Path) -> None:
    with safe_open(file, "pt") as opened:
        header = dict(opened.metadata())
    save_file(load_file(file), file, metadata=header | {"preprocess": "{}"})
    with pytest.raises(msclip.UserError, match=r"it has no preprocess\.image_size"):
        msclip.load(file)


def test_a_device_that_does_not_exist_is_a_users_mistake(file: Path) -> None:
    with pytest.raises(msclip.UserError, match=r"device must be one that torch has here.*got cudaa"):
        msclip.load(file, device="cudaa")
    with pytest.raises(msclip.UserError, match="got cuda:99"):
        msclip.load(file, device="cuda:99")
