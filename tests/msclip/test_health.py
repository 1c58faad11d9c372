"""When training stops, and what the message says."""

import math

import pytest
import torch

from msclip import TrainingError
from msclip.health import check_step

GOOD: dict[str, torch.Tensor | float] = {
    "train/loss": 2.0,
    "train/grad_norm": torch.tensor(0.5),
    "train/lr": 1e-3,
    "train/temperature": 14.0,
}


def test_finite_metrics_pass() -> None:
    check_step(GOOD, 3)


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_training_with_the_facts(name: str, value: float) -> None:
    with pytest.raises(TrainingError, match=rf"step 3: {name} is {value}.*rate 0\.001, temperature 14\).*optim\.lr"):
        check_step(GOOD | {name: value}, 3)


def test_the_bias_of_the_sigmoid_loss_is_among_the_facts() -> None:
    with pytest.raises(TrainingError, match=r"temperature 14, bias -9\.5\)"):
        check_step(GOOD | {"train/loss": math.nan, "train/logit_bias": -9.5}, 3)
