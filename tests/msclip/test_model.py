"""The model: sizes, sharing by identity, and the joint forward against encoding each modality by itself."""

from typing import Any

import pytest
import torch

import msclip
from msclip.branch import Adapter
from msclip.config import ModelConfig
from msclip.presets import PRESETS
from msclip.sharing import Paired, Sharing
from msclip.tokens import pack
from tests.msclip.two_ranks import tiny_engine, train

# B/32 and B/16, width 768, embedding 512.
SIZES = {
    "separate": (211_302_913, 209_646_337),
    "clip": (151_277_313, 149_620_737),
    "mixed": (154_633_729, 152_977_153),
    "hybrid": (182_954_497, 181_297_921),
    "shared": (125_853_697, 124_197_121),
    "shared_ln": (126_248_449, 124_591_873),
    "ms_clip": (126_285_313, 124_628_737),
    "ms_clip_last11": (133_370_113, 131_713_537),
    "ms_clip_last10": (140_454_913, 138_798_337),
    "ms_clip_last8": (154_624_513, 152_967_937),
    "ms_clip_last6": (168_794_113, 167_137_537),
    "ms_clip_last4": (182_963_713, 181_307_137),
    "ms_clip_last2": (197_133_313, 195_476_737),
    "ms_clip_stem": (128_436_721, 128_549_617),
    "ms_clip_branch": (130_256_593, 128_582_737),
    "ms_clip_s": (132_408_001, 132_503_617),
}
# Every way the two encoders can differ at a size that runs in milliseconds.
SMALL: dict[str, dict[str, Any]] = {
    "ms_clip_s": {},
    "patch_16": {"patch_size": 16},
    "other_adapters": {"adapter_bn": "after_pw"},
    "no_stem": {"stem": False},
    "no_branch": {"branch_layers": ()},
    "ms_clip": {"stem": False, "branch_layers": (), "sharing": Sharing(layers="all")},
    "norms_too": {"sharing": Sharing(layers="last:5", ln1=True, ln2=True, final_norm=True, out_proj=True)},
    "ffn_of_some": {"sharing": Sharing(layers="2,4", attn=False)},
    "separate": {"sharing": Sharing(layers="none", attn=False, ffn=False)},
    "narrow_text": {"sharing": Sharing(layers="none", attn=False, ffn=False), "text_width": 32, "text_heads": 1},
    "shallow_text": {"sharing": Sharing(layers="1,2"), "text_layers": 3},
}


def captions(lengths: list[int], context: int = 16, end: int = 511) -> torch.Tensor:
    """Random ids below the end token, which stands last."""
    ids = torch.zeros(len(lengths), context, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, end, (length,))
        row[length - 1] = end
    return ids


@pytest.mark.parametrize("name", SIZES)
def test_the_spectrum_of_sharing_has_its_exact_numbers_of_parameters(name: str) -> None:
    for size, expected in zip((32, 16), SIZES[name], strict=True):
        model = msclip.create_model(f"{name}_b{size}", device="meta")
        assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("adapter_bn", "sizes"), [("after_dw", (1_219_488, 1_202_208)), ("after_pw", (1_224_192, 1_206_912))])
def test_adapters_of_either_order_have_their_exact_numbers_of_parameters(adapter_bn: str, sizes: tuple[int, int]) -> None:
    for name, adapters in zip(("ms_clip_s_b32", "ms_clip_s_b16"), sizes, strict=True):
        model = msclip.create_model(name, device="meta", adapter_bn=adapter_bn)
        assert model.branch is not None
        assert sum(p.numel() for p in model.branch.adapters.parameters()) == adapters
        rest = sum(p.numel() for p in model.parameters()) - adapters
        assert rest == {"ms_clip_s_b32": 132_408_001 - 1_219_488, "ms_clip_s_b16": 132_503_617 - 1_202_208}[name]


@pytest.mark.parametrize("adapter_bn", ["after_dw", "after_pw"])
def test_an_adapter_normalises_where_it_is_told_to(adapter_bn: Any) -> None:
    torch.manual_seed(0)
    adapter = Adapter(channels=4, width=6, kernel_size=2, norm_eps=1e-12, bn=adapter_bn).train()
    tokens, feature = torch.randn(3, 5, 6), torch.randn(3, 4, 4, 4)
    fused = adapter(tokens, adapter.project(feature))

    def normalised(x: torch.Tensor) -> torch.Tensor:
        mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()

    grid = tokens[:, 1:].transpose(1, 2).reshape(3, 6, 2, 2)
    grid = normalised(torch.nn.functional.conv2d(grid, adapter.grid_conv.weight, padding=1, groups=6))
    patches = torch.nn.functional.conv2d(feature, adapter.branch_conv.weight, stride=2, groups=4)
    if adapter_bn == "after_dw":
        feature = torch.nn.functional.conv2d(normalised(patches), adapter.branch_proj.weight)
    else:
        feature = normalised(torch.nn.functional.conv2d(patches, adapter.branch_proj.weight))
    rows = torch.cat([tokens[:, :1], (grid + feature).flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(fused, torch.nn.functional.layer_norm(rows, (6,), eps=1e-12), rtol=0, atol=1e-5)


def test_what_clip_shares_in_the_spectrum_is_nothing_and_what_ms_clip_shares_is_85_million() -> None:
    shared = {
        name: sum(model.get_parameter(key).numel() for key, _ in model.named_parameters() if ".shared." in key)
        for name in ("clip_b32", "separate_b32", "ms_clip_b32", "ms_clip_s_b32", "shared_ln_b32")
        for model in [msclip.create_model(name, device="meta")]
    }
    assert list(shared.values()) == [0, 0, 85_017_600, 77_932_800, 85_054_464]


@pytest.mark.parametrize("variant", SMALL)
def test_the_joint_forward_equals_encoding_each_modality_alone(variant: str) -> None:
    torch.manual_seed(0)
    model = msclip.create_model("ms_clip_s_tiny", **SMALL[variant]).double().eval()
    images, ids = torch.randn(3, 3, 64, 64).double(), captions([1, 16, 5, 2, 9])
    weights = torch.randn(8, model.config.embed_dim).double()

    def gradients(image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (torch.cat([image, text]) * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    image, text, _ = model(images, pack(ids))
    joint = gradients(image, text)
    image_alone, text_alone = model.encode_image(images), model.encode_text(ids)
    alone = gradients(image_alone, text_alone)
    assert torch.allclose(image, image_alone, atol=1e-5)
    assert torch.allclose(text, text_alone, atol=1e-5)
    assert joint.keys() == alone.keys()
    assert len(joint) == sum(1 for _ in model.parameters()) - 1  # all but the temperature
    for name in joint:
        assert torch.allclose(joint[name], alone[name], atol=1e-5), name


def test_in_float32_the_joint_forward_is_within_1e_5_too() -> None:
    torch.manual_seed(1)
    model = msclip.create_model("ms_clip_s_tiny").train()
    images, ids = torch.randn(4, 3, 64, 64), captions([4, 16, 1, 7])
    image, text, _ = model(images, pack(ids))
    assert torch.allclose(image, model.encode_image(images), atol=1e-5)
    assert torch.allclose(text, model.encode_text(ids), atol=1e-5)


def test_tokens_after_the_end_token_change_nothing() -> None:
    model = msclip.create_model("ms_clip_s_tiny").eval()
    ids = captions([5, 8])
    noisy = ids.clone()
    noisy[0, 5:], noisy[1, 8:] = 17, 23
    assert torch.equal(model.encode_text(ids), model.encode_text(noisy))


def test_a_caption_does_not_see_its_neighbours() -> None:
    model = msclip.create_model("ms_clip_s_tiny").eval()
    ids = captions([5, 16, 2])
    alone = torch.cat([model.encode_text(row[None]) for row in ids])
    assert torch.allclose(model.encode_text(ids), alone, atol=1e-6)


def test_text_norms_never_see_image_tokens() -> None:
    model = msclip.create_model("ms_clip_s_tiny")
    seen: list[int] = []
    for block in model.blocks:
        block.get_submodule("ln1.text").register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    ids = captions([5, 8])
    model(torch.randn(2, 3, 64, 64), pack(ids))
    assert seen == [13] * 6


@pytest.mark.parametrize("variant", SMALL)
def test_exactly_the_parts_named_are_shared(variant: str) -> None:
    model = msclip.create_model("ms_clip_s_tiny", **SMALL[variant])
    model.encode_image(torch.randn(1, 3, 64, 64), normalize=False).sum().backward()
    by_image = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.encode_text(captions([5]), normalize=False).sum().backward()
    by_text = {name for name, p in model.named_parameters() if p.grad is not None}
    config, sharing = model.config, model.config.sharing
    parts = {"attn.in_proj": sharing.attn, "attn.out_proj": sharing.attn, "mlp": sharing.ffn, "ln1": sharing.ln1}
    parts["ln2"] = sharing.ln2
    expected = {
        name
        for name, _ in model.named_parameters()
        if (name.startswith("blocks.") and int(name.split(".")[1]) in config.shared_layers)
        and any(f".{part}." in name and shared for part, shared in parts.items())
    } | {name for name, _ in model.named_parameters() if name.startswith(("final_norm.shared", "projection.shared"))}
    assert by_image & by_text == expected
    assert by_image | by_text == {name for name, _ in model.named_parameters()} - {"logit_scale"}


def test_the_gradient_of_a_shared_tensor_is_the_sum_of_both_modalities() -> None:
    model = msclip.create_model("ms_clip_s_tiny").double().eval()
    images, ids = torch.randn(2, 3, 64, 64).double(), captions([5, 3])
    name = "blocks.3.mlp.shared.fc.weight"
    grads = []
    for image, text in ((True, False), (False, True), (True, True)):
        model.zero_grad(set_to_none=True)
        loss = images.new_zeros(())
        if image:
            loss = loss + model.encode_image(images, normalize=False).square().sum()
        if text:
            loss = loss + model.encode_text(ids, normalize=False).square().sum()
        loss.backward()
        grad = model.get_parameter(name).grad
        assert grad is not None
        grads.append(grad)
    assert torch.allclose(grads[0] + grads[1], grads[2])


@pytest.mark.parametrize("variant", ["ms_clip_s", "norms_too", "ffn_of_some"])
def test_shared_parts_are_one_object_and_updated_once_through_training(variant: str) -> None:
    model = msclip.create_model("ms_clip_s_tiny", **SMALL[variant], vocab_size=512)
    pairs = {name: part for name, part in model.named_modules() if isinstance(part, Paired) and part.is_shared}
    assert pairs
    engine = tiny_engine(model)
    updated = [p.data_ptr() for group in engine._stepper.param_groups for p in group["params"]]
    assert len(updated) == len(set(updated)) == len(list(model.parameters()))
    train(engine, 10)
    assert all(part.part("image") is part.part("text") for part in pairs.values())
    assert not any(f"{name}.image" in key or f"{name}.text" in key for name in pairs for key in model.state_dict())


@pytest.mark.parametrize("variant", SMALL)
def test_every_parameter_is_in_one_group(variant: str) -> None:
    model = msclip.create_model("ms_clip_s_tiny", **SMALL[variant])
    names = [name for group in model.parameter_groups().values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_configs_survive_plain_values(name: str) -> None:
    assert ModelConfig.from_dict(PRESETS[name].to_dict()) == PRESETS[name]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"image_size": 225}, "image_size"),
        ({"num_heads": 7}, "num_heads"),
        ({"text_width": 512, "text_heads": 8}, "equal widths"),
        ({"sharing": Sharing(layers="all")}, "last:11"),
        ({"sharing": Sharing(layers="last:13")}, "beyond"),
        ({"sharing": Sharing(layers="some")}, "last:N"),
        ({"sharing": Sharing(layers="last:-2")}, "last:N"),
        ({"branch_layers": (0, 2, 4, 6, 8)}, "branch_layers"),
        ({"patch_size": 14}, "patch_size"),
        ({"depth": 3}, "depth"),
        ({"loss": "siglip"}, "model.loss must be softmax or sigmoid, got 'siglip'"),
        ({"logit_bias_init": -5.0}, "logit_bias_init is a setting of model.loss sigmoid"),
        ({"loss": "sigmoid", "logit_bias_init": float("nan")}, "logit_bias_init must be finite"),
        ({"adapter_bn": "after_pw", "branch_layers": ()}, "adapter_bn is a setting of the parallel branch"),
        ({"activation": "relu"}, "model.activation must be quick_gelu or gelu"),
    ],
)
def test_a_contradiction_is_refused_by_name(overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(msclip.UserError, match=words):
        msclip.create_model("ms_clip_s_b32", device="meta", **overrides)


def test_the_sigmoid_loss_adds_a_bias_and_nothing_else() -> None:
    torch.manual_seed(0)
    plain = msclip.create_model("ms_clip_s_tiny").eval()
    torch.manual_seed(0)
    biased = msclip.create_model("ms_clip_s_tiny", loss="sigmoid", logit_bias_init=-3.5).eval()
    assert biased.state_dict().keys() - plain.state_dict().keys() == {"logit_bias"}
    images, text = torch.randn(2, 3, 64, 64), pack(captions([5, 8]))
    (image, caption, temperature), (same_image, same_caption, scale) = plain(images, text), biased(images, text)
    assert torch.equal(image, same_image)
    assert torch.equal(caption, same_caption)
    assert scale.tolist() == [temperature.item(), -3.5]
    assert "logit_bias" in biased.parameter_groups()["no_decay"]


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.zeros(0, 16, dtype=torch.long), r"B at least 1.*\(0, 16\)"),
        (torch.zeros(2, 0, dtype=torch.long), r"L from 1 to 16.*\(2, 0\)"),
        (torch.ones(2, 17, dtype=torch.long), r"L from 1 to 16.*\(2, 17\)"),
        (torch.ones(16, dtype=torch.long), r"shape \(B, L\).*\(16,\)"),
        (torch.ones(2, 16), "whole numbers.*float32"),
        (torch.tensor([[1, -1, 511]]), "from 0 to below vocab_size 1024, got -1 to 511"),
        (torch.tensor([[1, 1024]]), "below vocab_size 1024, got 1 to 1024"),
    ],
)
def test_ids_that_are_no_captions_are_refused_by_name(ids: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        msclip.create_model("ms_clip_s_tiny").encode_text(ids)


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(0, 3, 64, 64), r"B at least 1, got \(0, 3, 64, 64\)"),
        (torch.zeros(3, 64, 64), r"got \(3, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "floating-point.*uint8"),
        (torch.zeros(1, 3, 32, 32), r"\(B, 3, 64, 64\), got \(1, 3, 32, 32\)"),
    ],
)
def test_what_is_no_batch_of_images_is_refused_by_name(images: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        msclip.create_model("ms_clip_s_tiny").encode_image(images)


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(msclip.UserError, match="ms_clip_s_b32"):
        msclip.create_model("ms_clip_xl")
