"""What a model costs, against the published tables."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import msclip
from msclip import describe
from msclip.config import ParallelFFN
from msclip.convert.ms_clip import to_state_dict
from msclip.convert.weights import CLIP_MEAN, CLIP_STD, Weights
from msclip.convert.write import write
from msclip.data.images import Preprocess
from msclip.presets import preset
from msclip.sharing import Sharing
from msclip.tokens import pack
from tests.msclip.tiny_models import RESNET, SIZES, tiny


@pytest.mark.parametrize(
    ("name", "shared", "image", "text", "image_work", "text_work"),
    [
        ("ms_clip_s_b32", 77_932_800, 8_954_304, 45_520_896, 5.13, 6.65),
        ("ms_clip_s_b16", 77_932_800, 9_049_920, 45_520_896, 18.16, 6.65),
        ("clip_b32", 0, 87_849_216, 63_428_096, 4.41, 2.98),
    ],
)
def test_parameters_and_multiply_adds_are_those_of_the_published_models(
    name: str, shared: int, image: int, text: int, image_work: float, text_work: float
) -> None:
    costs = describe.measure(preset(name))
    assert (costs.shared, costs.image, costs.text, costs.total) == (shared, image, text, shared + image + text + 1)
    assert round(costs.image_multiply_adds / 1e9, 2) == image_work
    assert round(costs.text_multiply_adds / 1e9, 2) == text_work


@pytest.mark.parametrize(
    "changes",
    [
        RESNET,
        {**SIZES, "text_tower": "cbow", "text_layers": 0, "text_heads": 0},
        {**SIZES, "sharing": Sharing(), "parallel_ffn": ParallelFFN("after")},
        {**SIZES, "causal": False, "text_pool": "cls"},
        {**SIZES, "patch_dropout": 0.5, "checkpoint_blocks": True, "freeze_image": "first:1"},
    ],
    ids=["resnet", "cbow", "parallel", "cls", "fine-tuned"],
)
def test_every_kind_of_model_can_be_described(changes: dict[str, object]) -> None:
    config = msclip.ModelConfig(**changes)  # type: ignore[arg-type]
    costs = describe.measure(config, 2)
    assert costs.shared + costs.image + costs.text + 1 == costs.total
    assert min(costs.image, costs.text, costs.image_multiply_adds, costs.activation_bytes) > 0
    assert f"{costs.total:,}" in describe.table("x", costs, 2)


def test_activations_on_the_meta_device_are_those_of_a_real_pass() -> None:
    model = tiny(sharing=Sharing()).train()
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros(8, 16, dtype=torch.long)
    ids[:, -1] = 1
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(torch.randn(8, 3, 32, 32), pack(ids))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    real = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
    del outputs
    # Attention keeps its scores on one device and not on another.
    assert describe.measure(model.config, 8).activation_bytes == pytest.approx(real, rel=0.2)


@pytest.mark.parametrize("text_width", [64, 128], ids=["both modalities at once", "one after the other"])
def test_of_layers_that_are_computed_again_one_stands_beside_what_is_kept(text_width: int) -> None:
    def saved(layers: int) -> int:
        config = msclip.ModelConfig(**{**SIZES, "text_width": text_width, "layers": layers, "text_layers": layers})
        recomputed = replace(config, checkpoint_blocks=True)
        return describe.measure(config, 4).activation_bytes - describe.measure(recomputed, 4).activation_bytes

    one_more = saved(4) - saved(3)  # is what one layer keeps, of both modalities
    assert one_more > 0
    if text_width == 64:
        assert saved(3) == 2 * one_more
    else:  # of the last layer, only the modality that keeps more is there at a time
        assert 2 * one_more < saved(3) < 2.5 * one_more


def test_one_image_of_one_cell_can_be_described() -> None:
    config = preset("ms_clip_s_tiny", image_size=32)
    one, two = (describe.measure(config, batch).activation_bytes for batch in (1, 2))
    assert 0.9 * two < 2 * one < 1.1 * two


def test_the_moving_average_counts_what_is_learned() -> None:
    costs = describe.measure(msclip.ModelConfig(**SIZES, freeze_text="all"))
    (line,) = (line for line in describe.table("x", costs, 1).splitlines() if "optim.ema_decay" in line)
    assert f"{4 * costs.learned / 2**20:.1f} MiB" in line


def test_a_file_of_any_layout_can_be_described(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny(sharing=Sharing())
    write(Weights("msclip", model, Preprocess(32, CLIP_MEAN, CLIP_STD), None), tmp_path / "hf", "huggingface")
    assert describe.main([str(tmp_path / "hf"), "--batch", "4"]) == 0
    shown = capsys.readouterr().out
    assert f"{sum(p.numel() for p in model.parameters()):,}" in shown
    assert "batch 4" in shown


def test_the_activation_of_a_lone_file_can_be_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(to_state_dict(tiny()), tmp_path / "x.pt")
    assert describe.main([str(tmp_path / "x.pt"), "--activation", "gelu"]) == 0
    assert "gelu, LayerNorm" in capsys.readouterr().out
    assert describe.main([str(tmp_path / "x.pt")]) == 2
    assert "--activation" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["no_such_model"], ["ms_clip_s_tiny", "--batch", "0"]])
def test_a_mistake_is_one_paragraph_and_status_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert describe.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
