"""Schedules by hand values, and who is decayed how."""

import math
from typing import Any

import pytest
import torch

from msclip import UserError
from msclip.config import ModelConfig
from msclip.optim import OptimConfig, build_optimizer, learning_rate, parameter_groups, set_learning_rates
from tests.msclip.two_ranks import tiny_model


def test_warm_up_is_linear_from_a_small_start_to_the_peak() -> None:
    config = OptimConfig(lr=1e-3, warmup_steps=10)
    rates = [learning_rate(step, 1e-3, config, 100) for step in range(11)]
    assert rates[0] == 1e-6
    assert rates[5] == pytest.approx((1e-6 + 1e-3) / 2)
    assert rates[10] == 1e-3


@pytest.mark.parametrize(("schedule", "middle", "end"), [("cosine", 0.505, 0.01), ("linear", 0.505, 0.01), ("constant", 1, 1)])
def test_schedules_pass_through_their_middle_and_end(schedule: Any, middle: float, end: float) -> None:
    config = OptimConfig(lr=1.0, min_lr=0.01, warmup_steps=20, schedule=schedule)
    assert learning_rate(20, 1.0, config, 120) == 1.0
    assert learning_rate(70, 1.0, config, 120) == pytest.approx(middle)
    assert learning_rate(120, 1.0, config, 120) == pytest.approx(end)
    assert learning_rate(500, 1.0, config, 120) == pytest.approx(end)


def test_cosine_leaves_the_peak_slower_than_linear() -> None:
    cosine, linear = (OptimConfig(lr=1.0, min_lr=0, warmup_steps=0, schedule=s) for s in ("cosine", "linear"))
    assert learning_rate(25, 1.0, cosine, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(25, 1.0, linear, 100) == pytest.approx(0.75)


def test_every_parameter_is_in_one_group_with_the_decay_of_its_kind() -> None:
    model = tiny_model(batch_norm=True)
    optimizer = build_optimizer(model, OptimConfig())
    where = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(where) == sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    decays = {name: where[id(parameter)]["weight_decay"] for name, parameter in model.named_parameters()}
    assert decays["blocks.2.attn.in_proj.shared.weight"] == 0.2
    assert decays["blocks.2.attn.in_proj.shared.bias"] == 0
    assert decays["logit_scale"] == decays["text_input.token_embedding.weight"] == 0
    assert decays["projection.image.weight"] == 0.05


def test_shared_weights_may_have_a_rate_of_their_own() -> None:
    config = OptimConfig(lr=1e-3, lr_shared=5e-4, warmup_steps=0, min_lr=0, schedule="linear")
    groups = parameter_groups(tiny_model(), config)
    assert set_learning_rates(groups, 50, config, 100) == pytest.approx(5e-4)
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx({"shared": 2.5e-4, "own": 5e-4, "no_decay": 5e-4})


def test_a_frozen_parameter_is_not_optimised() -> None:
    model = tiny_model()
    model.logit_scale.requires_grad_(False)
    trained = [p for group in parameter_groups(model, OptimConfig()) for p in group["params"]]
    assert all(p is not model.logit_scale for p in trained)
    assert len(trained) == len(list(model.parameters())) - 1


class Forgetful(torch.nn.Linear):
    config = ModelConfig()

    def parameter_groups(self) -> dict[str, list[str]]:
        return {"shared": [], "own": ["weight"], "no_decay": []}


def test_what_would_misalign_others_stands_last_in_its_group() -> None:
    groups = parameter_groups(tiny_model(batch_norm=True, loss="sigmoid"), OptimConfig())
    for group in groups:
        odd = [parameter.numel() % 4 != 0 for parameter in group["params"]]
        assert odd == sorted(odd)
    assert [parameter.numel() for parameter in groups[-1]["params"]][-2:] == [1, 1]  # temperature and bias


def test_a_parameter_that_no_group_lists_is_an_error() -> None:
    with pytest.raises(ValueError, match="bias"):
        parameter_groups(Forgetful(2, 2), OptimConfig())


DECAYS: list[dict[str, Any]] = [{"layer_decay": 0.0}, {"layer_decay": 1.1}, {"ema_decay": 0.0}, {"ema_decay": 1.0}]


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"min_lr": 1.0}, {"warmup_steps": -1}, {"accumulation_steps": 0}, {"clip_grad_norm": 0.0}, *DECAYS]
)
def test_a_setting_out_of_range_is_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        OptimConfig(**wrong)
