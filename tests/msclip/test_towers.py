"""The towers against formulas written a second time from the papers' descriptions, with plain operations on named tensors."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import msclip
from msclip.config import ModelConfig
from msclip.presets import PRESETS
from msclip.sharing import SEPARATE, Sharing
from msclip.tokens import pack

CLIP_SIZES = {
    "clip_b32": (151_277_313, 87_849_216),
    "clip_b16": (149_620_737, 86_192_640),
    "clip_l14": (427_616_513, 303_966_208),
    "clip_l14_336": (427_944_193, 304_293_888),
    "clip_rn50": (102_007_137, 38_316_896),
    "clip_rn101": (119_688_033, 56_259_936),
    "clip_rn50x4": (178_300_601, 87_137_080),
    "clip_rn50x16": (290_979_217, 167_328_912),
    "clip_rn50x64": (623_258_305, 420_380_352),
}
RESNET: dict[str, Any] = {
    "image_tower": "modified_resnet",
    "resnet_blocks": (1, 2, 1, 2),
    "image_size": 96,
    "patch_size": 32,
    "width": 8,
    "layers": 0,
    "num_heads": 4,
    "stem": False,
    "branch_layers": (),
    "sharing": SEPARATE,
}
CBOW: dict[str, Any] = {"text_tower": "cbow", "text_layers": 0, "text_heads": 0, "text_width": 24, "sharing": SEPARATE}
VIT: dict[str, Any] = {"stem": False, "branch_layers": (), "sharing": SEPARATE, "patch_size": 16}


def tiny(**overrides: Any) -> msclip.Model:
    torch.manual_seed(0)
    return msclip.create_model("ms_clip_s_tiny", **overrides)


def disturbed(model: msclip.Model) -> msclip.Model:
    """The model in double precision with every weight and statistic away from its initial value."""
    model = model.double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and name != "logit_scale":
                tensor.copy_(tensor + 0.1 * torch.rand_like(tensor))
    return model


def captions(lengths: list[int]) -> Tensor:
    ids = torch.zeros(len(lengths), 16, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, 1000, (length,))
        row[0], row[length - 1] = 1022, 1023
    return ids


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return state[f"{name}.weight"] * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + state[f"{name}.bias"]


def linear(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | float = 0.0) -> Tensor:
    """One sequence: (queries, width) and (keys, width)."""
    out = []
    for qh, kh, vh in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        out.append(((qh @ kh.T) / qh.shape[-1] ** 0.5 + mask).softmax(-1) @ vh)
    return torch.cat(out, -1)


def transformer(x: Tensor, state: dict[str, Tensor], modality: str, config: ModelConfig, mask: Tensor | float) -> Tensor:
    heads = config.heads[modality]  # type: ignore[index]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        y = norm(x, state, f"{block}.ln1.{modality}", config.norm_eps)
        q, k, v = linear(y, state, f"{block}.attn.in_proj.{modality}").chunk(3, -1)
        x = x + linear(attend(q, k, v, heads, mask), state, f"{block}.attn.out_proj.{modality}")
        y = linear(norm(x, state, f"{block}.ln2.{modality}", config.norm_eps), state, f"{block}.mlp.{modality}.fc")
        y = y * torch.sigmoid(1.702 * y) if config.activation == "quick_gelu" else y * (1 + torch.erf(y / 2**0.5)) / 2
        x = x + linear(y, state, f"{block}.mlp.{modality}.proj")
    return x


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_vision_transformer_is_the_formula(activation: str) -> None:
    model = disturbed(tiny(**VIT, activation=activation))
    config, state = model.config, model.state_dict()
    image = torch.randn(3, 64, 64).double()
    patches = image.unfold(1, 16, 16).unfold(2, 16, 16).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = torch.cat([state["image_input.class_embedding"][None], patches @ state["image_input.patches.weight"].flatten(1).T])
    x = norm(x + state["image_input.positional_embedding"], state, "image_input.ln_pre", config.norm_eps)
    x = transformer(x, state, "image", config, 0.0)
    expected = norm(x[0], state, "final_norm.image", config.norm_eps) @ state["projection.image.weight"].T
    assert torch.allclose(model.encode_image(image[None], normalize=False)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_the_text_transformer_is_the_formula(activation: str) -> None:
    model = disturbed(tiny(**VIT, activation=activation))
    config, state = model.config, model.state_dict()
    ids = captions([9])
    x = state["text_input.token_embedding.weight"][ids[0]] + state["text_input.positional_embedding"]
    x = transformer(x, state, "text", config, torch.full((16, 16), -torch.inf).double().triu(1))
    expected = norm(x[8], state, "final_norm.text", config.norm_eps) @ state["projection.text.weight"].T
    assert torch.allclose(model.encode_text(ids, normalize=False)[0], expected, atol=1e-5, rtol=1e-5)


def resnet_formula(image: Tensor, state: dict[str, Tensor], config: ModelConfig) -> Tensor:
    state = {name.removeprefix("resnet."): tensor for name, tensor in state.items() if name.startswith("resnet.")}

    def convolve(x: Tensor, name: str, bn: str, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        side = weight.shape[-1]
        columns = nn.functional.unfold(x[None], side, padding=side // 2, stride=stride)[0]
        y = (weight.flatten(1) @ columns).unflatten(1, (x.shape[1] // stride, -1))
        mean, variance = state[f"{bn}.running_mean"], state[f"{bn}.running_var"]
        scale = state[f"{bn}.weight"] / (variance + 1e-5).sqrt()
        return (y - mean[:, None, None]) * scale[:, None, None] + state[f"{bn}.bias"][:, None, None]

    def halved(x: Tensor) -> Tensor:
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4

    x = convolve(image, "conv1", "bn1", stride=2).clamp(min=0)
    x = convolve(x, "conv2", "bn2").clamp(min=0)
    x = halved(convolve(x, "conv3", "bn3").clamp(min=0))
    for stage, count in enumerate(config.resnet_blocks):
        for block in range(count):
            name = f"stages.{stage}.{block}"
            y = convolve(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = convolve(y, f"{name}.conv2", f"{name}.bn2").clamp(min=0)
            if stage and not block:
                x, y = halved(x), halved(y)
            if not block:
                x = convolve(x, f"{name}.skip", f"{name}.skip_bn")
            x = (x + convolve(y, f"{name}.conv3", f"{name}.bn3")).clamp(min=0)
    cells = x.flatten(1).T
    cells = torch.cat([cells.mean(0, keepdim=True), cells]) + state["pool.positional_embedding"]
    q, k, v = (linear(cells, state, f"pool.{letter}_proj") for letter in "qkv")
    return linear(attend(q[:1], k, v, config.num_heads), state, "pool.out_proj")[0]


def test_the_modified_resnet_is_the_formula() -> None:
    model = disturbed(tiny(**RESNET))
    image = torch.randn(3, 96, 96).double()
    expected = resnet_formula(image, model.state_dict(), model.config)
    got = model.encode_image(image[None], normalize=False)[0]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_fresh_resnet_block_passes_its_input_on() -> None:
    model = tiny(**RESNET)
    assert model.resnet is not None
    x = torch.rand(2, 64, 6, 6)
    assert torch.equal(model.resnet.stages[1][1](x), x)  # type: ignore[index]


def test_the_feature_map_has_a_cell_for_32_pixels() -> None:
    model = tiny(**RESNET)
    assert model.resnet is not None
    assert model.resnet.feature_map(torch.randn(2, 3, 96, 96)).shape == (2, 256, 3, 3)


@pytest.mark.parametrize("name", CLIP_SIZES)
def test_openais_models_have_their_exact_number_of_parameters(name: str) -> None:
    model = msclip.create_model(name, device="meta")
    sizes = {key: p.numel() for key, p in model.named_parameters()}
    of_image = ("resnet.", "image_input.", "final_norm.image", "projection.image")
    visual = sum(n for key, n in sizes.items() if key.startswith(of_image) or (key.startswith("blocks.") and ".image." in key))
    assert (sum(sizes.values()), visual) == CLIP_SIZES[name]


def test_a_bag_of_words_of_512_in_1024_has_its_exact_size() -> None:
    model = msclip.create_model("clip_rn50", device="meta", text_tower="cbow", text_layers=0, text_heads=0)
    assert model.cbow is not None
    assert sum(p.numel() for p in model.cbow.parameters()) == 25_822_208


@pytest.mark.parametrize("ends", [False, True])
def test_a_bag_of_words_is_the_mean_of_its_words(ends: bool) -> None:
    model = disturbed(tiny(**CBOW, cbow_ends=ends))
    state = model.state_dict()
    ids = captions([7, 3])
    words = [row[:n] if ends else row[1 : n - 1] for row, n in zip(ids, (7, 3), strict=True)]
    means = torch.stack([state["cbow.token_embedding.weight"][w].mean(0) for w in words])
    expected = norm(means, state, "cbow.norm", 1e-12) @ state["cbow.projection.weight"].T
    assert torch.allclose(model.encode_text(ids, normalize=False), expected, atol=1e-9)


def test_a_bag_of_words_has_no_order_and_no_padding() -> None:
    model = tiny(**CBOW).eval()
    ids = captions([9])
    shuffled = ids.clone()
    shuffled[0, 1:8] = ids[0, 1:8].flip(0)
    shuffled[0, 9:] = 5
    assert torch.allclose(model.encode_text(ids), model.encode_text(shuffled), atol=1e-6)


def test_a_bag_without_words_is_finite_with_its_gradient() -> None:
    model = tiny(**CBOW)
    model.encode_text(captions([2, 5])).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.encode_text(captions([2]), normalize=False).abs().max() == 0


@pytest.mark.parametrize("image", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize(
    "text", [{}, {"text_width": 32, "text_heads": 1, "text_layers": 2}, CBOW], ids=["equal", "own", "cbow"]
)
def test_any_image_tower_stands_beside_any_text_tower(image: dict[str, Any], text: dict[str, Any]) -> None:
    model = tiny(**(image | text))
    images, ids = torch.randn(3, 3, model.config.image_size, model.config.image_size), captions([4, 16, 2])
    image_features, text_features, temperature = model(images, pack(ids))
    assert image_features.shape == text_features.shape == (3, 32)
    (temperature * image_features @ text_features.T).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    names = [name for group in model.parameter_groups().values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (RESNET | {"sharing": Sharing(layers="all")}, "needs two transformers.*modified_resnet"),
        (CBOW | {"sharing": Sharing(layers="none", out_proj=True)}, "needs two transformers.*cbow"),
        (RESNET | {"layers": 6}, "layers 0"),
        (RESNET | {"stem": True}, "stem false"),
        (RESNET | {"resnet_blocks": (1, 2)}, "resnet_blocks"),
        (RESNET | {"num_heads": 3}, "num_heads"),
        ({"resnet_blocks": (1, 1, 1, 1)}, "resnet_blocks"),
        (CBOW | {"text_layers": 6}, "text_layers 0"),
        ({"cbow_ends": True}, "cbow_ends"),
    ],
)
def test_a_tower_that_cannot_is_refused_by_name(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(msclip.UserError, match=words):
        tiny(**overrides)


def test_an_older_checkpoints_config_is_completed_with_defaults() -> None:
    values = PRESETS["ms_clip_s_b16"].to_dict()
    for name in ("activation", "image_tower", "resnet_blocks", "text_tower", "cbow_ends"):
        del values[name]
    assert ModelConfig.from_dict(values) == replace(ModelConfig(), patch_size=16)
