"""The libraries that users come from, as oracles: their forward pass on our exports, ours on their files.

Neither is a dependency. `pip install transformers` and `pip install --no-deps open_clip_torch timm` beside the tests, and these
run; without --no-deps the second brings torchvision and with it another torch. It is replaced by a stub where it is missing:
open_clip's model code only mentions it.
"""

import importlib
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from msclip.checkpoint import read
from msclip.convert.openai import SCALARS
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Layout, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.sharing import Sharing
from tests.msclip.tiny_models import RESNET, tiny, tokenizer

MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "ms_clip": {"sharing": Sharing(), "norm_eps": 1e-12},
    "other_heads": {"num_heads": 2, "text_heads": 4},
    "unequal_towers": {"text_width": 128, "text_heads": 2, "text_layers": 2},
    "resnet": RESNET,
    "sigmoid": {"loss": "sigmoid"},
}
CAPTIONS = ["A dog  runs", "two birds fly over the water and over the red ball, again and again", "ball"]


@pytest.fixture(scope="module")
def torchvision_stub() -> Iterator[None]:
    """open_clip's package imports torchvision's transforms at its top."""
    names = ["torchvision", *(f"torchvision.{n}" for n in ("transforms", "transforms.functional", "ops", "ops.misc"))]
    missing = importlib.util.find_spec("torchvision") is None
    for name in names if missing else []:
        stub = MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
        sys.modules[name] = stub
    yield
    for name in names if missing else []:
        sys.modules.pop(name, None)


@pytest.fixture
def open_clip(torchvision_stub: None) -> ModuleType:
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    return importlib.import_module("open_clip.model")


def exported(path: Path, layout: Layout, changes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Writes a tiny model; images, token ids, and our logits for them."""
    model, words = tiny(**changes), tokenizer()
    size = model.config.image_size
    write(Weights("msclip", model, Preprocess(size, CLIP_MEAN, CLIP_STD), words), path, layout)
    images, ids = torch.randn(4, 3, size, size), words(CAPTIONS)
    return images, ids, logits(model, images, ids)


def logits(model: Any, images: Tensor, ids: Tensor) -> Tensor:
    """Of our models and of open_clip's, whose methods have the same names."""
    with torch.no_grad():
        image, text = model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True)
        product = model.logit_scale.exp() * image @ text.T
        return product if model.logit_bias is None else product + model.logit_bias


def close(got: Tensor, expected: Tensor) -> bool:
    return bool((got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1))


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("resnet", "sigmoid")])
def test_transformers_computes_our_logits_from_our_export(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    images, ids, expected = exported(tmp_path / "hf", "huggingface", MODELS[name])
    theirs, info = transformers.CLIPModel.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        got = theirs.eval()(input_ids=ids, pixel_values=images).logits_per_image
    assert close(got, expected)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_we_compute_the_logits_of_a_model_that_transformers_saved(tmp_path: Path, activation: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    common = {"hidden_act": activation, "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 256}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **common,
                "vocab_size": 600,
                "max_position_embeddings": 16,
                "num_attention_heads": 4,
                "eos_token_id": 2,
            },
            vision_config={**common, "image_size": 32, "patch_size": 16, "num_attention_heads": 2},
            projection_dim=48,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    found = read(tmp_path)
    images, ids = torch.randn(4, 3, 32, 32), tokenizer()(CAPTIONS)
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=images).logits_per_image
    assert found.model.config.activation == activation
    assert close(logits(found.model, images, ids), expected)


def test_transformers_reads_our_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    exported(tmp_path / "hf", "huggingface", {})
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    got = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=16, return_tensors="pt")["input_ids"]
    assert torch.equal(got, tokenizer()(CAPTIONS))


@pytest.mark.parametrize("name", MODELS)
def test_open_clip_computes_our_logits_from_our_export(tmp_path: Path, open_clip: ModuleType, name: str) -> None:
    images, ids, expected = exported(tmp_path / "oc", "open_clip", MODELS[name])
    settings = json.loads((tmp_path / "oc" / "open_clip_config.json").read_text())["model_cfg"]
    theirs = open_clip.CLIP(**settings).eval()
    theirs.load_state_dict(load_file(tmp_path / "oc" / "open_clip_model.safetensors"))
    assert close(logits(theirs, images, ids), expected)


@pytest.mark.parametrize("bias", [None, -10.0])
@pytest.mark.parametrize("custom", [False, True])
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_we_compute_the_logits_of_a_model_that_open_clip_made(
    tmp_path: Path, open_clip: ModuleType, custom: bool, quick_gelu: bool, bias: float | None
) -> None:
    kind = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    theirs = kind(
        embed_dim=48,
        vision_cfg={"image_size": 32, "patch_size": 16, "width": 64, "layers": 2, "head_width": 64},
        text_cfg={"context_length": 16, "vocab_size": 600, "width": 64, "heads": 1, "layers": 2},
        quick_gelu=quick_gelu,
        init_logit_bias=bias,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save({"epoch": 1, "name": "x", "state_dict": theirs.state_dict()}, tmp_path / "epoch_1.pt")
    found = read(tmp_path / "epoch_1.pt", {"activation": "quick_gelu" if quick_gelu else "gelu"})
    images, ids = torch.randn(4, 3, 32, 32), tokenizer()(CAPTIONS)
    assert found.layout == "open_clip"
    assert close(logits(found.model, images, ids), logits(theirs, images, ids))


@pytest.mark.parametrize("name", ["plain", "resnet"])
def test_open_clip_reads_our_openai_layout(tmp_path: Path, open_clip: ModuleType, name: str) -> None:
    images, ids, expected = exported(tmp_path / "x.pt", "openai", MODELS[name])
    state = torch.load(tmp_path / "x.pt")
    theirs = open_clip.build_model_from_openai_state_dict(dict(state)).eval().float()
    # It rounds to half precision while building; the names and what it infers are the question here.
    theirs.load_state_dict({n: tensor for n, tensor in state.items() if n not in SCALARS})
    assert close(logits(theirs, images, ids), expected)
