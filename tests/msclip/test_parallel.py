"""Modules beside the layers, the ways to read a caption, and the fixed temperature."""

from typing import Any

import pytest
import torch
from torch import Tensor

import msclip
from msclip.config import ModelConfig, ParallelAttention, ParallelFFN
from msclip.exports import load_weights
from msclip.presets import PRESETS, SPECTRUM
from msclip.sharing import SEPARATE, Sharing
from msclip.tokens import pack
from tests.msclip.two_ranks import tiny_engine, tiny_model, train

MODULES: dict[str, dict[str, Any]] = {
    "ffn_after": {"parallel_ffn": ParallelFFN("after")},
    "ffn_parallel_of_text": {"parallel_ffn": ParallelFFN("parallel", modalities=("text",), hidden=256)},
    "ffn_pooled": {"parallel_ffn": ParallelFFN("pooled")},
    "attention_after": {"parallel_attention": ParallelAttention("after", hidden=64, num_heads=2)},
    "attention_parallel_of_some": {"parallel_attention": ParallelAttention("parallel", layers="2,4", hidden=16)},
    "attention_pooled_of_image": {"parallel_attention": ParallelAttention("pooled", modalities=("image",))},
    "both": {"parallel_ffn": ParallelFFN("after", layers="all"), "parallel_attention": ParallelAttention("parallel")},
}
READINGS: dict[str, dict[str, Any]] = {
    "both_ways": {"causal": False},
    "class_token": {"causal": False, "text_pool": "cls"},
}


def tiny(**overrides: Any) -> msclip.Model:
    torch.manual_seed(0)
    return msclip.create_model("ms_clip_s_tiny", **overrides)


def woken(model: msclip.Model) -> msclip.Model:
    """The model with modules beside its layers that have an effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def captions(lengths: list[int]) -> Tensor:
    ids = torch.zeros(len(lengths), 16, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 1000, (length,))
        row[0], row[length - 1] = 1022, 1023
    return ids


def parameters(model: msclip.Model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", MODULES)
def test_a_fresh_model_with_modules_equals_the_one_without(variant: str) -> None:
    with_modules, without = tiny(**MODULES[variant]).eval(), tiny().eval()
    loaded = with_modules.load_state_dict(without.state_dict(), strict=False)
    assert loaded.missing_keys
    assert not loaded.unexpected_keys
    images, ids = torch.randn(2, 3, 64, 64), captions([7, 16])
    for got, expected in zip(with_modules(images, pack(ids)), without(images, pack(ids)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("variant", MODULES)
def test_woken_modules_change_exactly_the_modalities_that_have_them(variant: str) -> None:
    model = woken(tiny(**MODULES[variant]))
    images, ids = torch.randn(2, 3, 64, 64), captions([7, 16])
    before = model.encode_image(images), model.encode_text(ids)
    of = {
        name: p for name, p in model.named_parameters() if name.startswith("pooled.") or "parallel." in name or "after." in name
    }
    with torch.no_grad():
        for p in of.values():
            p.zero_()
    after = model.encode_image(images), model.encode_text(ids)
    changed = tuple(not torch.allclose(x, y, atol=1e-4) for x, y in zip(before, after, strict=True))
    setting = next(iter(MODULES[variant].values()))
    assert changed == ("image" in setting.modalities, "text" in setting.modalities)


@pytest.mark.parametrize("variant", MODULES | READINGS)
def test_the_joint_forward_equals_encoding_each_modality_alone(variant: str) -> None:
    model = woken(tiny(**(MODULES | READINGS)[variant])).double()
    images, ids = torch.randn(3, 3, 64, 64).double(), captions([16, 2, 9])
    image, text, _ = model(images, pack(ids))
    assert torch.allclose(image, model.encode_image(images), atol=1e-5)
    assert torch.allclose(text, model.encode_text(ids), atol=1e-5)
    (image.sum() + text.sum()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name != "logit_scale")


def token_states(model: msclip.Model, ids: Tensor) -> Tensor:
    """What leaves the last block, the only caption's tokens."""
    seen: list[Tensor] = []
    hook = model.blocks[-1].register_forward_hook(lambda module, args, out: seen.append(out))
    model.encode_text(ids)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("variant", MODULES)
def test_a_token_never_sees_a_later_one(variant: str) -> None:
    model = woken(tiny(**MODULES[variant]))
    ids = captions([9])
    other = ids.clone()
    other[0, 5] = 1 + ids[0, 5] % 900
    a, b = token_states(model, ids), token_states(model, other)
    assert torch.allclose(a[:5], b[:5], atol=1e-6)
    assert not torch.allclose(a[5:], b[5:], atol=1e-3)


@pytest.mark.parametrize("variant", READINGS)
def test_without_the_causal_mask_a_token_sees_its_caption_and_no_other(variant: str) -> None:
    overrides = READINGS[variant] | {"parallel_attention": ParallelAttention("after")}
    model = woken(tiny(**overrides))
    ids = captions([9, 16, 2, 5])
    other = ids.clone()
    other[0, 5] = 1 + ids[0, 5] % 900
    assert not torch.allclose(token_states(model, ids[:1])[0], token_states(model, other[:1])[0], atol=1e-3)
    alone = torch.cat([model.encode_text(row[None]) for row in ids])
    assert torch.allclose(model.encode_text(ids), alone, atol=1e-5)
    other = ids.clone()
    other[3, 5:] = 7
    assert torch.equal(model.encode_text(ids), model.encode_text(other))


def test_the_class_token_is_the_first() -> None:
    model = woken(tiny(**READINGS["class_token"]))
    ids = captions([9])
    first = token_states(model, ids)[:1]
    expected = model.projection(model.final_norm(first, 0), 0)
    assert torch.allclose(model.encode_text(ids, normalize=False), expected, atol=1e-6)


def test_modules_beside_layers_have_their_exact_sizes() -> None:
    plain = parameters(msclip.create_model("ms_clip_b32", device="meta"))
    norm = 2 * 768
    for overrides, one in (
        ({"parallel_ffn": ParallelFFN("after", hidden=64)}, 99_136),
        ({"parallel_ffn": ParallelFFN("after", hidden=3072)}, 4_722_432),
        ({"parallel_attention": ParallelAttention("parallel", hidden=768, num_heads=12)}, 2_362_368),
    ):
        model = msclip.create_model("ms_clip_b32", device="meta", **overrides)
        assert parameters(model) - plain == 24 * (one + norm)
    pooled = msclip.create_model("ms_clip_b32", device="meta", parallel_ffn=ParallelFFN("pooled", hidden=3072))
    assert parameters(pooled) - plain == 2 * (4_722_432 + norm)


@pytest.mark.parametrize("name", [f"{name}_b32" for name in SPECTRUM])
def test_every_point_of_the_spectrum_takes_modules_of_its_modalities_own(name: str) -> None:
    beside = {
        "parallel_ffn": ParallelFFN("after", layers="all"),
        "parallel_attention": ParallelAttention("parallel", layers="all"),
    }
    model = msclip.create_model(name, device="meta", **beside)
    plain = {key for key, _ in msclip.create_model(name, device="meta").named_parameters()}
    added = {key for key, _ in model.named_parameters()} - plain
    layers = 24 - model.config.stem  # the stem leaves the image nothing to stand beside at layer 0
    assert len(added) == layers * 2 * 6
    groups = model.parameter_groups()
    assert not added & set(groups["shared"])
    assert sum(key in added for key in groups["own"]) == layers * 2 * 2  # two matrices each; norms and biases do not decay


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"text_pool": "cls"}, "causal false"),
        ({"parallel_ffn": ParallelFFN("after", hidden=0)}, "parallel_ffn.hidden"),
        ({"parallel_attention": ParallelAttention("after", num_heads=3)}, "parallel_attention.hidden"),
        ({"parallel_attention": ParallelAttention("after", num_heads=0)}, "number of heads"),
        ({"parallel_ffn": ParallelFFN("after", modalities=())}, "parallel_ffn.modalities"),
        ({"parallel_ffn": ParallelFFN("after", layers="last:13")}, "parallel_ffn.layers"),
        ({"parallel_ffn": ParallelFFN("pooled", layers="all")}, "no meaning"),
        ({"parallel_ffn": ParallelFFN("after", layers="0")}, "image encoder"),
        ({"sharing": SEPARATE, "parallel_attention": ParallelAttention("after")}, "parallel_attention.layers 'shared'"),
        ({"sharing": Sharing(layers="none", out_proj=True), "parallel_ffn": ParallelFFN("parallel")}, "such as all"),
        ({"sharing": SEPARATE, "text_tower": "cbow", "text_layers": 0, "text_heads": 0, "causal": False}, "causal"),
        (
            {"sharing": SEPARATE, "text_tower": "cbow", "text_layers": 0, "text_heads": 0}
            | {"parallel_ffn": ParallelFFN("after", layers="all")},
            "those with a transformer",
        ),
    ],
)
def test_a_module_that_would_have_no_place_is_refused_by_name(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(msclip.UserError, match=words):
        tiny(**overrides)


def test_a_fixed_temperature_is_not_learned_after_loading_either() -> None:
    model = tiny(logit_scale_learned=False, logit_scale_init=2.659)
    again = msclip.build(model.config, device="meta")
    load_weights(again, model.state_dict(), "memory")
    assert not again.logit_scale.requires_grad
    assert all(p.requires_grad for name, p in again.named_parameters() if name != "logit_scale")


@pytest.mark.parametrize("variant", MODULES | READINGS)
def test_the_new_settings_survive_plain_values(variant: str) -> None:
    config = tiny(**(MODULES | READINGS)[variant]).config
    assert ModelConfig.from_dict(config.to_dict()) == config


def test_sections_may_be_given_as_plain_values() -> None:
    model = tiny(parallel_ffn={"placement": "after", "hidden": 8}, sharing={"ln1": True})
    assert model.config.parallel_ffn == ParallelFFN("after", hidden=8)
    assert model.config.sharing.layers == PRESETS["ms_clip_s_tiny"].sharing.layers


def test_training_keeps_a_fixed_temperature_and_moves_every_module() -> None:
    model = tiny_model(
        logit_scale_learned=False,
        dropout=0.1,
        parallel_ffn=ParallelFFN("after"),
        parallel_attention=ParallelAttention("pooled"),
        **READINGS["class_token"],
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    metrics = train(tiny_engine(model), 4)
    assert len({m["train/temperature"] for m in metrics}) == 1
    unmoved = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert unmoved == {"logit_scale"}
