"""Learning rates that shrink towards the input: exact factors, and how far the weights then move."""

from typing import Any

import pytest
import torch

import msclip
from msclip.layer_decay import levels_below_top
from msclip.optim import OptimConfig, parameter_groups, set_learning_rates
from msclip.sharing import Sharing
from tests.msclip.test_towers import CBOW, tiny
from tests.msclip.tiny_models import RESNET
from tests.msclip.two_ranks import tiny_engine, tiny_model, train

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ms_clip_s": ("ms_clip_s_b32", {}),
    "clip": ("clip_b32", {}),
    "shared": ("shared_b16", {}),
    "resnet": ("clip_rn50", {}),
    "uneven": ("ms_clip_b32", {"text_layers": 8, "sharing": Sharing(layers="first:4")}),
    "parallel": ("ms_clip_b32", {"parallel_ffn": msclip.config.ParallelFFN(placement="after")}),
    "pooled": ("ms_clip_b32", {"parallel_ffn": msclip.config.ParallelFFN(placement="pooled")}),
}
LEVELS = [
    ("ms_clip_s", "image_input.patches.conv1.weight", 13),  # the stem: patch embedding and layer 0 in one
    ("ms_clip_s", "image_input.class_embedding", 13),
    ("ms_clip_s", "text_input.token_embedding.weight", 13),
    ("ms_clip_s", "blocks.0.attn.in_proj.text.weight", 12),
    ("ms_clip_s", "blocks.1.attn.in_proj.shared.weight", 11),
    ("ms_clip_s", "blocks.11.ln2.image.bias", 1),
    ("ms_clip_s", "branch.stages.0.conv.weight", 10),  # fused in before layers 2, 4, 6, 8 and 10
    ("ms_clip_s", "branch.stages.4.bn3.weight", 2),
    ("ms_clip_s", "branch.adapters.4.branch_proj.weight", 2),
    ("ms_clip_s", "final_norm.text.weight", 0),
    ("ms_clip_s", "projection.image.weight", 0),
    ("ms_clip_s", "logit_scale", 0),
    ("clip", "image_input.patches.weight", 13),
    ("clip", "blocks.0.mlp.image.fc.weight", 12),
    ("shared", "blocks.5.ln1.shared.weight", 7),
    ("shared", "projection.shared.weight", 0),
    ("resnet", "resnet.conv1.weight", 5),
    ("resnet", "resnet.bn3.bias", 5),
    ("resnet", "resnet.stages.0.0.conv1.weight", 4),
    ("resnet", "resnet.stages.3.2.bn3.weight", 1),
    ("resnet", "resnet.pool.positional_embedding", 0),
    ("resnet", "blocks.11.attn.in_proj.text.weight", 1),
    ("uneven", "text_input.positional_embedding", 9),
    ("uneven", "image_input.positional_embedding", 13),
    ("uneven", "blocks.7.attn.in_proj.text.weight", 1),
    ("uneven", "blocks.7.attn.in_proj.image.weight", 5),
    ("uneven", "blocks.3.attn.in_proj.shared.weight", 9),  # 9 of 12 for images, 5 of 8 for text
    ("uneven", "blocks.3.ln1.text.weight", 5),
    ("parallel", "blocks.2.after.ffn.image.norm.weight", 10),
    ("pooled", "pooled.ffn.text.mlp.proj.weight", 0),
]


@pytest.mark.parametrize(("model", "name", "level"), LEVELS)
def test_a_parameter_has_the_rate_of_its_layer(model: str, name: str, level: int) -> None:
    preset, overrides = MODELS[model]
    built = msclip.create_model(preset, device="meta", **overrides)
    config = OptimConfig(layer_decay=0.7)
    (group,) = (
        group for group in parameter_groups(built, config) if any(p is built.get_parameter(name) for p in group["params"])
    )
    assert group["lr_scale"] == pytest.approx(0.7**level)


@pytest.mark.parametrize("variant", [{}, CBOW, {"parallel_ffn": msclip.config.ParallelFFN(placement="parallel")}])
def test_with_layer_decay_every_parameter_is_still_in_one_group_of_its_kind(variant: dict[str, Any]) -> None:
    model = tiny(**variant)
    plain, decayed = (parameter_groups(model, OptimConfig(layer_decay=decay)) for decay in (1.0, 0.5))
    kinds = [{id(p): group["name"] for group in groups for p in group["params"]} for groups in (plain, decayed)]
    assert kinds[0] == kinds[1]
    assert sum(len(group["params"]) for group in decayed) == len(list(model.parameters()))
    assert len(plain) <= 3 < len(decayed)


def test_a_bag_of_words_and_a_resnet_have_levels_of_their_own() -> None:
    model = tiny(**CBOW)
    assert levels_below_top("cbow.token_embedding.weight", model.config) == 1
    assert levels_below_top("cbow.projection.weight", model.config) == 0
    resnet = msclip.build(msclip.ModelConfig(**RESNET))
    levels = {levels_below_top(name, resnet.config) for name, _ in resnet.named_parameters() if name.startswith("resnet")}
    assert levels == {0, 1, 2, 3, 4, 5}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_factor_holds_at_every_step_of_a_schedule(schedule: Any) -> None:
    config = OptimConfig(lr=1e-3, lr_shared=5e-4, warmup_steps=10, schedule=schedule, layer_decay=0.5)
    groups = parameter_groups(tiny_model(), config)
    for step in (0, 5, 10, 60, 100):
        top = set_learning_rates(groups, step, config, 100)
        assert {group["lr"] / (group["lr_scale"] * top) for group in groups if group["name"] != "shared"} == {1.0}
        shared = [group["lr"] / group["lr_scale"] for group in groups if group["name"] == "shared"]
        assert shared == pytest.approx([shared[0]] * len(shared))


@pytest.mark.parametrize("stage", [None, 1])
def test_deeper_layers_move_less_by_the_formula(stage: int | None) -> None:
    # Adam's first step moves every element by its rate, whatever the gradient; a decay of weights would add to that.
    model = tiny_model(freeze_text="first:1")
    engine = tiny_engine(
        model, stage, warmup_steps=0, layer_decay=0.5, weight_decay=0, weight_decay_shared=0, eps=1e-30, temperature_max=100
    )
    before = engine.full_state()[0]
    train(engine, 1)
    after = engine.full_state()[0]
    for name, parameter in model.named_parameters():
        moved = (after[name] - before[name]).abs().max().item()
        # A tenth of a thousandth: a weight of size 1 and its movement are rounded to float32.
        expected = 1e-3 * 0.5 ** levels_below_top(name, model.config) if parameter.requires_grad else 0.0
        assert moved == pytest.approx(expected, abs=1e-6), name
    assert torch.equal(after["blocks.0.mlp.shared.fc.weight"], before["blocks.0.mlp.shared.fc.weight"])  # frozen with text
