"""The moving average of the weights by hand values, over every ZeRO stage, and through a resumption."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from msclip import UserError
from msclip.ema import decay_at
from tests.msclip.two_ranks import STAGES, STEPS, tiny_engine, tiny_model, train

State = dict[str, Tensor]


def close(a: State, b: State) -> bool:
    """Equal but for the order of sums over two processes."""
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], rtol=0, atol=1e-5) for name in a)


def test_the_decay_rises_from_two_elevenths_to_its_limit() -> None:
    assert [decay_at(n, 0.999) for n in (1, 10, 90)] == pytest.approx([2 / 11, 11 / 20, 0.91])
    assert decay_at(8989, 0.999) < 0.999 == decay_at(8991, 0.999)
    assert decay_at(1, 0.1) == 0.1


def test_the_average_of_weights_and_running_statistics_is_the_recurrence_by_hand() -> None:
    engine = tiny_engine(tiny_model(batch_norm=True), ema_decay=0.3, warmup_steps=0)
    expected = engine.full_state()[0]
    for n in range(1, 5):
        train(engine, 1)
        now = engine.full_state()[0]
        decay = min(0.3, (1 + n) / (10 + n))
        for name, value in now.items():
            counter = not value.is_floating_point()
            expected[name] = value if counter else decay * expected[name] + (1 - decay) * value
    average = engine.averaged_state()
    assert average.keys() == expected.keys() == engine.model.state_dict().keys()
    for name, value in average.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-7)
    assert not torch.equal(average["projection.image.weight"], now["projection.image.weight"])
    assert not torch.equal(average["branch.stages.0.bn.running_mean"], now["branch.stages.0.bn.running_mean"])


def test_training_is_the_same_to_the_last_bit_with_and_without_an_average() -> None:
    with_average, without = tiny_engine(tiny_model(), ema_decay=0.9), tiny_engine(tiny_model())
    assert train(with_average, 3) == train(without, 3)
    assert without.averaged_state() == {}


def test_a_resumed_average_equals_the_unbroken_one_to_the_last_bit() -> None:
    options: dict[str, Any] = {"ema_decay": 0.3, "layer_decay": 0.8}
    unbroken = tiny_engine(tiny_model(batch_norm=True, dropout=0.1), **options)
    train(unbroken, 2)
    state, average = unbroken.full_state(), unbroken.averaged_state()
    resumed = tiny_engine(tiny_model(batch_norm=True, dropout=0.1, seed=3), **options)
    resumed.load_full_state(*state, step=2, averaged_state=average)
    train(unbroken, 3)
    train(resumed, 3)
    a, b = unbroken.averaged_state(), resumed.averaged_state()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_without_a_saved_average_it_starts_from_the_weights_of_the_checkpoint() -> None:
    without = tiny_engine(tiny_model(batch_norm=True))
    train(without, 1)
    state = without.full_state()
    engine = tiny_engine(tiny_model(batch_norm=True, seed=4), ema_decay=0.9)
    engine.load_full_state(*state, step=1)
    average = engine.averaged_state()
    assert all(torch.equal(average[name], state[0][name]) for name in state[0])


def test_a_frozen_weight_is_its_own_average_and_the_temperature_is_averaged_as_capped() -> None:
    model = tiny_model(freeze_text="first:1")
    engine = tiny_engine(model, ema_decay=0.3, temperature_max=2.0)
    before = engine.full_state()[0]
    train(engine, 1)
    average = engine.averaged_state()
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen
    assert all(torch.equal(average[name], before[name]) for name in frozen)
    # The logarithm was 1 and is cut to ln 2 after the update.
    assert average["logit_scale"].item() == pytest.approx(2 / 11 + 9 / 11 * math.log(2))


def test_an_average_of_another_model_is_refused_with_the_difference() -> None:
    engine = tiny_engine(tiny_model(), ema_decay=0.9)
    state, average = engine.full_state(), engine.averaged_state()
    del average["logit_scale"]
    with pytest.raises(UserError, match=r"averaged state.*1 tensors differ.*logit_scale \(checkpoint: absent"):
        engine.load_full_state(*state, step=0, averaged_state=average)


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_of_two_ranks_under_any_stage_is_that_of_one_process(
    stage: int | None, one_finetuning: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    observed = two_ranks[0]["finetuning", stage]
    for mine, theirs in zip(observed["end"], one_finetuning["end"], strict=True):
        assert close(mine, theirs)
    assert two_ranks[1]["finetuning", stage]["end"] == ({}, {}, {})
    weights, _, average = observed["end"]
    assert not close(weights, average)


@pytest.mark.parametrize("stage", STAGES)
def test_an_average_goes_on_on_two_ranks_under_any_stage_and_back(
    stage: int | None, one_finetuning: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    observed = two_ranks[0]["finetuning", stage]
    half, end = one_finetuning["half"], one_finetuning["end"]
    assert all(torch.equal(observed["loaded"][name], half[2][name]) for name in half[2])
    assert close(observed["resumed"][2], end[2])

    engine = tiny_engine(tiny_model(seed=9), ema_decay=0.3, layer_decay=0.5, warmup_steps=0)
    weights, moments, average = observed["half"]
    engine.load_full_state(weights, moments, STEPS // 2, average)
    train(engine, STEPS // 2)
    assert close(engine.averaged_state(), end[2])


def test_averages_of_running_statistics_are_those_of_all_ranks(two_ranks: list[dict[Any, Any]]) -> None:
    (_, _, plain, plain_average), (_, _, _, sharded_average) = (two_ranks[0]["batch_norm", stage] for stage in (None, 2))
    means = [name for name in plain if name.endswith("running_mean")]
    assert means
    for name in means:
        torch.testing.assert_close(sharded_average[name], plain_average[name], rtol=0, atol=1e-5)
        assert not torch.equal(plain_average[name], plain[name])
