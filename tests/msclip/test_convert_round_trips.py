"""Out to another layout and back in: the same tensors to the last bit, the same settings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import msclip
from msclip.checkpoint import read
from msclip.config import ParallelFFN
from msclip.convert import huggingface, openai
from msclip.convert.ms_clip import infer_config, to_state_dict
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Layout, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer, Truncation
from msclip.presets import preset
from msclip.sharing import SEPARATE, Sharing
from tests.msclip.tiny_models import RESNET, equal, tiny, tokenizer

# The counts of OpenAI's nine files.
KEYS = {
    "clip_b32": 302,
    "clip_b16": 302,
    "clip_l14": 446,
    "clip_l14_336": 446,
    "clip_rn50": 489,
    "clip_rn101": 795,
    "clip_rn50x4": 669,
    "clip_rn50x16": 921,
    "clip_rn50x64": 1353,
}
PARTLY = Sharing(layers="last:2", ln2=True, out_proj=True)
STEM: dict[str, Any] = {"stem": True, "patch_size": 32, "image_size": 64}
BRANCHED: dict[str, Any] = {"layers": 6, "branch_layers": (1, 2, 3, 4, 5), "norm_eps": 1e-12, "sharing": Sharing("1,2")}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "other_epsilon_and_heads": {"norm_eps": 1e-12, "num_heads": 4, "text_heads": 2},
    "unequal_towers": {"text_width": 128, "text_heads": 2, "text_layers": 2},
    "all_shared": {"sharing": Sharing()},
    "partly_shared": {"sharing": PARTLY},
    "everything_shared": {"sharing": Sharing(ln1=True, ln2=True, final_norm=True, out_proj=True)},
    "resnet": RESNET,
    "sigmoid": {"loss": "sigmoid"},
}


def weights(model: msclip.Model, mean: tuple[float, float, float] = CLIP_MEAN) -> Weights:
    return Weights("msclip", model, Preprocess(model.config.image_size, mean, CLIP_STD), tokenizer())


def same_settings(a: msclip.ModelConfig, b: msclip.ModelConfig) -> bool:
    """All but what only fresh weights need."""
    return replace(a, logit_scale_init=0, token_std=0) == replace(b, logit_scale_init=0, token_std=0)


@pytest.mark.parametrize("layout", ["msclip", "open_clip", "huggingface"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_from_another_layout_as_it_was(tmp_path: Path, name: str, layout: Layout) -> None:
    if layout == "huggingface" and name in ("resnet", "sigmoid"):
        pytest.skip("a CLIPModel has neither a ResNet nor a bias")
    before = weights(tiny(**MODELS[name]), mean=(0.1, 0.2, 0.3))
    write(before, tmp_path / "there", layout)
    after = msclip.load(tmp_path / "there")
    assert equal(before.model, after.model)
    assert same_settings(before.model.config, after.config)
    assert after.preprocess == before.preprocess
    captions = ["A  dog runs", "birds over   the WATER"]
    assert before.tokenizer is not None
    assert torch.equal(after.tokenizer(captions), before.tokenizer(captions))


@pytest.mark.parametrize("layout", ["open_clip", "huggingface"])
@pytest.mark.parametrize("truncation", ["end", "official"])
def test_captions_that_are_too_long_are_cut_as_before(tmp_path: Path, layout: Layout, truncation: Truncation) -> None:
    settings = json.loads(tokenizer().to_json())
    before = Tokenizer.from_json(json.dumps({**settings, "truncation": truncation}))
    write(replace(weights(tiny()), tokenizer=before), tmp_path / "there", layout)
    long = "birds over the water " * 10
    assert torch.equal(msclip.load(tmp_path / "there").tokenizer(long), before(long))


@pytest.mark.parametrize("name", ["plain", "unequal_towers", "resnet"])
def test_a_model_comes_back_from_the_layout_of_openai(tmp_path: Path, name: str) -> None:
    before = weights(tiny(**MODELS[name]))
    write(before, tmp_path / "there.pt", "openai")
    after = read(tmp_path / "there.pt")
    assert after.layout == "openai"
    assert equal(before.model, after.model)
    assert same_settings(before.model.config, after.model.config)
    assert after.preprocess == before.preprocess


@pytest.mark.parametrize(
    "changes",
    [
        {"sharing": PARTLY},
        {"sharing": Sharing()},
        {"sharing": Sharing(attn=False, ffn=False, ln1=True)},
        *(
            {**kind, "sharing": sharing}
            for kind in (STEM, BRANCHED | {"text_layers": 6}, BRANCHED | {"stem": True, "text_layers": 6, "patch_size": 8})
            for sharing in (
                SEPARATE,
                Sharing("last:2"),
                Sharing("1,2", attn=False, ln2=True),
                Sharing("1", ffn=False, ln1=True, final_norm=True, out_proj=True),
                Sharing("none", out_proj=True),
            )
        ),
    ],
)
def test_a_model_comes_back_from_the_official_layout_however_much_it_shares(tmp_path: Path, changes: dict[str, Any]) -> None:
    before = weights(tiny(**{"norm_eps": 1e-12, **changes}))
    before = replace(before, preprocess=Preprocess(before.model.config.image_size))
    write(before, tmp_path / "there.pt", "ms_clip")
    after = read(tmp_path / "there.pt")
    assert after.layout == "ms_clip"
    assert equal(before.model, after.model)
    assert after.preprocess == before.preprocess


@pytest.mark.parametrize("name", ["plain", "unequal_towers"])
def test_random_half_precision_weights_of_openai_survive_the_way_over_hugging_face(tmp_path: Path, name: str) -> None:
    shapes = openai.write(weights(tiny(**MODELS[name])))
    torch.manual_seed(1)
    state = {n: t if n in openai.SCALARS else torch.randn(t.shape) for n, t in shapes.items()}
    for n in state:
        if n.endswith(("proj", "proj.weight", "projection", "in_proj_weight", "conv1.weight", "c_fc.weight")):
            state[n] = state[n].half()
    torch.save(state, tmp_path / "openai.pt")
    write(read(tmp_path / "openai.pt"), tmp_path / "hf", "huggingface")
    back = to_state_dict(read(tmp_path / "hf").model)
    assert back.keys() == state.keys() - set(openai.SCALARS)
    assert all(torch.equal(back[n], state[n].float()) for n in back)


@pytest.mark.parametrize("name", KEYS)
def test_the_names_of_openai_are_as_many_as_in_its_files(name: str) -> None:
    assert len(to_state_dict(msclip.create_model(name, device="meta"))) == KEYS[name]


@pytest.mark.parametrize("name", [name for name in KEYS if "rn" in name])
def test_a_resnet_is_known_by_its_shapes(name: str) -> None:
    inferred = infer_config(to_state_dict(msclip.create_model(name, device="meta")))
    assert same_settings(replace(inferred, norm_eps=1e-5), preset(name))


def test_towers_trained_apart_after_the_export_are_read_as_separate(tmp_path: Path) -> None:
    write(weights(tiny(sharing=Sharing())), tmp_path / "hf", "huggingface")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name in tensors:
        if name.startswith("text_model"):
            tensors[name] = tensors[name] + 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    after = read(tmp_path / "hf").model
    assert not after.config.sharing.anything
    assert torch.equal(
        huggingface.from_official(to_state_dict(after))["text_projection.weight"], tensors["text_projection.weight"]
    )


@pytest.mark.parametrize("layout", ["open_clip", "huggingface", "openai"])
def test_settings_that_change_no_embedding_do_not_stand_in_the_way(tmp_path: Path, layout: Layout) -> None:
    model = tiny(dropout=0.1, patch_dropout=0.5, checkpoint_blocks=True, freeze_image="all", logit_scale_learned=False)
    write(weights(model), tmp_path / "there", layout)
    assert equal(model, read(tmp_path / "there").model)


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({"stem": True, "sharing": Sharing(layers="last:2")}, "huggingface", r"model\.stem.*--to ms_clip"),
        ({"layers": 6, "branch_layers": (1, 2, 3, 4, 5)}, "open_clip", r"branch_layers \[1, 2, 3, 4, 5\].*adapters"),
        ({"text_tower": "cbow", "text_layers": 0, "text_heads": 0}, "open_clip", "cbow.*mean of word vectors"),
        (RESNET, "huggingface", "has no ResNet"),
        *(({"loss": "sigmoid"}, layout, "loss sigmoid") for layout in ("huggingface", "openai")),
        ({"loss": "sigmoid", "norm_eps": 1e-12, "sharing": Sharing()}, "ms_clip", "loss sigmoid"),
        ({"activation": "gelu"}, "openai", "activation quick_gelu; this model has gelu"),
        ({"num_heads": 2}, "openai", r"num_heads 1; this model has 2"),
        ({}, "ms_clip", "has none"),
        ({"sharing": Sharing()}, "ms_clip", r"norm_eps 1e-12; this model has 1e-05"),
        ({"text_tower": "cbow", "text_layers": 0, "text_heads": 0}, "ms_clip", "text_tower cbow"),
        (RESNET, "ms_clip", "has none"),
        ({"sharing": Sharing(), "parallel_ffn": ParallelFFN("after")}, "huggingface", "parallel_ffn"),
        ({**BRANCHED, "adapter_bn": "after_pw"}, "ms_clip", "adapter_bn after_pw"),
        ({**STEM, "norm_eps": 1e-12, "patch_size": 16}, "ms_clip", r"without a branch.*model\.patch_size 32 .* instead of 16"),
        ({"causal": False}, "open_clip", "causal False"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_with_the_reason(
    tmp_path: Path, changes: dict[str, Any], layout: Layout, reason: str
) -> None:
    with pytest.raises(msclip.UserError, match=reason):
        write(weights(tiny(**changes)), tmp_path / "there", layout)
    assert list(tmp_path.iterdir()) == []


def test_sharing_that_equal_copies_do_not_tell_is_refused_where_nothing_else_tells_it(tmp_path: Path) -> None:
    fresh = msclip.build(tiny(norm_eps=1e-12, sharing=Sharing(ln1=True)).config)  # its norms still are the identity
    with pytest.raises(msclip.UserError, match=r"once trained.*ln1=False.*ln1=True"):
        write(replace(weights(fresh), preprocess=Preprocess(32)), tmp_path / "there", "ms_clip")


def test_a_layout_of_tensors_alone_is_refused_a_normalisation_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(msclip.UserError, match="image mean"):
        write(weights(tiny(), mean=(0.5, 0.5, 0.5)), tmp_path / "there", "openai")
