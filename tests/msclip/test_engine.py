"""The engine: one process against two, every ZeRO stage against plain PyTorch, resuming against going on."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from msclip import TrainingError, UserError
from msclip.engine import Engine, PixelModel, create_engine, read_metrics, seed_step
from msclip.loss import contrastive_loss
from msclip.optim import OptimConfig
from tests.msclip.two_ranks import SIGMOID, STAGES, STEPS, micro_batches, tiny_engine, tiny_model, train

State = tuple[dict[str, Tensor], dict[str, Tensor]]
NAMES = ("train/loss", "train/grad_norm", "train/temperature", "train/image_to_text_accuracy", "train/lr")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, so that equal runs are equal to the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def curve(metrics: list[dict[str, float]]) -> Tensor:
    return torch.tensor([[step[name] for name in (*NAMES, "train/logit_bias") if name in step] for step in metrics])


def same(a: State, b: State) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b, strict=True))


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Of the first update: AdamW's average after it holds a tenth of the gradient."""
    state = engine.full_state()[1]
    return {name.removeprefix("exp_avg/"): value * 10 for name, value in state.items() if name.startswith("exp_avg/")}


def test_a_step_reports_every_metric_as_a_number() -> None:
    (metrics,) = train(tiny_engine(tiny_model()), 1)
    assert metrics.keys() == {*NAMES, "train/text_to_image_accuracy"}
    assert all(isinstance(value, float) for value in metrics.values())
    assert metrics["train/temperature"] == pytest.approx(torch.e)
    assert metrics["train/lr"] == 1e-6


def test_the_sigmoid_loss_reports_and_learns_its_bias() -> None:
    metrics = train(tiny_engine(tiny_model(**SIGMOID), warmup_steps=0), 3)
    assert metrics[0].keys() == {*NAMES, "train/text_to_image_accuracy", "train/logit_bias"}
    biases = [step["train/logit_bias"] for step in metrics]
    assert biases[0] == -2
    assert biases[0] != biases[1] != biases[2]


@pytest.mark.parametrize("model", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_training_lowers_the_loss(model: dict[str, Any]) -> None:
    engine = tiny_engine(tiny_model(**model), warmup_steps=0)
    losses = [read_metrics(engine.train_step(micro_batches(0)))["train/loss"] for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_under_any_stage_train_like_one_process(
    stage: int | None, one_process: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    for observed in two_ranks:
        torch.testing.assert_close(curve(observed["stage", stage]["metrics"]), curve(one_process["metrics"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_state_of_one_process_continues_on_two_ranks_under_any_stage(
    stage: int | None, one_process: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    assert same(two_ranks[0]["stage", stage]["loaded"], one_process["half"])
    assert two_ranks[1]["stage", stage]["loaded"] == ({}, {})
    for observed in two_ranks:
        torch.testing.assert_close(
            curve(observed["stage", stage]["resumed"]), curve(one_process["metrics"][STEPS // 2 :]), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("stage", STAGES)
def test_state_of_two_ranks_under_any_stage_continues_in_one_process(
    stage: int | None, one_process: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    engine = tiny_engine(tiny_model(seed=9))
    model_state, optimizer_state = two_ranks[0]["stage", stage]["half"]
    engine.load_full_state(model_state, optimizer_state, STEPS // 2)
    torch.testing.assert_close(curve(train(engine, STEPS // 2)), curve(one_process["metrics"][STEPS // 2 :]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_not_finite_stops_all_ranks_and_leaves_no_trace(
    stage: int | None, two_ranks: list[dict[Any, Any]]
) -> None:
    for observed in two_ranks:
        assert f"step {STEPS // 2}: train/loss is nan" in observed["stage", stage]["error"]
    assert two_ranks[0]["stage", stage]["untouched"]


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_with_the_sigmoid_loss_train_like_one_process(stage: int | None, two_ranks: list[dict[Any, Any]]) -> None:
    expected = curve(train(tiny_engine(tiny_model(**SIGMOID)), 3))
    assert expected.shape[1] == len(NAMES) + 1
    for observed in two_ranks:  # from stage 1 on with accumulation
        torch.testing.assert_close(curve(observed["sigmoid", stage]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stage", "by_unit"), [(2, False), (3, False), (3, True)])
def test_accumulating_ranks_keep_the_negatives_of_the_global_batch(
    stage: int, by_unit: bool, one_process: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    expected = curve(one_process["metrics"][:3])
    for observed in two_ranks:
        torch.testing.assert_close(curve(observed["accumulated", stage, by_unit]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_unit", [False, True])
def test_a_compiled_model_whose_parameters_come_and_go_trains_the_same(
    by_unit: bool, one_process: dict[str, Any], two_ranks: list[dict[Any, Any]]
) -> None:
    for observed in two_ranks:
        metrics, frames = observed["compiled", by_unit]
        torch.testing.assert_close(curve(metrics), curve(one_process["metrics"][:3]), rtol=0, atol=1e-5)
        # Pixels, and a layer; once more where it has met a longest caption of another length. As a whole also the input.
        assert 2 <= frames <= (3 if by_unit else 4)


@pytest.mark.parametrize("by_unit", [False, True])
@pytest.mark.parametrize("model", ["apart", "frozen"])
def test_stage_3_trains_layers_that_run_once_for_each_modality_and_above_frozen_ones(
    model: str, by_unit: bool, two_ranks: list[dict[Any, Any]]
) -> None:
    for observed in two_ranks:
        expected = curve(observed[model, None, False])
        torch.testing.assert_close(curve(observed[model, 3, by_unit]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_unit", [False, True])
def test_stage_3_gathers_every_parameter_once_for_both_modalities(by_unit: bool, two_ranks: list[dict[Any, Any]]) -> None:
    for observed in two_ranks:
        sent, numbers = observed["gathering", by_unit]
        assert numbers <= sent <= numbers + 100  # each parameter is padded to a multiple of the ranks


@pytest.mark.parametrize("stage", STAGES)
def test_shared_parts_stay_one_object_once_in_the_optimiser_under_any_stage(
    stage: int | None, two_ranks: list[dict[Any, Any]]
) -> None:
    for observed in two_ranks:
        assert observed["finetuning", stage]["shares_at_first"]
        assert observed["finetuning", stage]["shares_at_last"]


def test_the_gradient_of_a_shared_weight_is_the_sum_of_both_modalities_under_any_stage(
    two_ranks: list[dict[Any, Any]],
) -> None:
    model = tiny_model().train()
    module = PixelModel(model, (0.5,) * 3, (0.25,) * 3, "fp32")
    weights = {name: parameter for name, parameter in model.named_parameters() if ".shared.weight" in name}
    parts = []
    for kept in (0, 1):  # the loss through one modality's features alone
        features = [x if i == kept else x.detach() for i, x in enumerate(module(*micro_batches(0)[0]))]
        loss = contrastive_loss(features[0], features[1], features[2]).loss
        parts.append(torch.autograd.grad(loss, list(weights.values())))
    norm = train(tiny_engine(tiny_model()), 1)[0]["train/grad_norm"]
    for stage in STAGES:
        found = two_ranks[0]["finetuning", stage]["first"]
        for name, of_images, of_texts in zip(weights, *parts, strict=True):
            assert of_images.norm() > 1e-3 < of_texts.norm(), name
            clipped = (of_images + of_texts) * min(1, 0.3 / norm)  # 0.3: clip_grad_norm
            torch.testing.assert_close(found[f"exp_avg/{name}"] * 10, clipped, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_averaged_over_ranks_when_saved(two_ranks: list[dict[Any, Any]]) -> None:
    (plain, *_), (sharded, own, saved, _) = (two_ranks[0]["batch_norm", stage] for stage in (None, 2))
    torch.testing.assert_close(curve(sharded), curve(plain), rtol=0, atol=1e-5)
    others = two_ranks[1]["batch_norm", 2][1]
    means = [name for name in own if name.endswith("running_mean")]
    assert means
    for name in means:
        assert not torch.equal(own[name], others[name])
        torch.testing.assert_close(saved[name], (own[name] + others[name]) / 2)
    assert all(saved[name] == 2 for name in own if name.endswith("num_batches_tracked"))


def test_zero_needs_no_launcher_in_a_process_of_its_own(one_process: dict[str, Any]) -> None:
    metrics = train(tiny_engine(tiny_model(), stage=1), STEPS)
    torch.testing.assert_close(curve(metrics), curve(one_process["metrics"]), rtol=0, atol=1e-5)


def test_a_resumed_run_equals_the_unbroken_one_to_the_last_bit() -> None:
    unbroken = tiny_engine(tiny_model(batch_norm=True, dropout=0.1))
    train(unbroken, 2)
    state = unbroken.full_state()
    resumed = tiny_engine(tiny_model(batch_norm=True, seed=3, dropout=0.1))
    resumed.load_full_state(*state, step=2)
    assert train(unbroken, 3) == train(resumed, 3)
    assert same(unbroken.full_state(), resumed.full_state())


def test_saved_state_is_a_copy() -> None:
    engine = tiny_engine(tiny_model())
    state = engine.full_state()
    kept = {name: value.clone() for name, value in state[0].items()}
    train(engine, 2)
    assert same((kept, {}), (state[0], {}))
    assert state[1]["exp_avg/logit_scale"] == 0
    assert state[1]["step"] == 0


@pytest.mark.parametrize("model", [{}, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_has_the_gradient_of_the_whole_batch(parts: int, model: dict[str, Any]) -> None:
    whole, split = tiny_engine(tiny_model(**model)), tiny_engine(tiny_model(**model), accumulation_steps=parts)
    train(whole, 1)
    train(split, 1, parts=parts)
    assert ("logit_bias" in gradients(whole)) == bool(model)
    torch.testing.assert_close(gradients(split), gradients(whole), rtol=0, atol=1e-5)


def test_accumulation_with_batch_norm_and_dropout_equals_one_graph_over_all_micro_batches() -> None:
    reference = tiny_model(batch_norm=True, dropout=0.2)
    module = PixelModel(reference, (0.5,) * 3, (0.25,) * 3, "fp32").train()
    parts = micro_batches(0, parts=2)
    seed_step(0, 0, rank=0)  # as the engine does
    images, texts, temperatures = zip(*(module(*part) for part in parts), strict=True)
    contrastive_loss(torch.cat(images), torch.cat(texts), temperatures[0]).loss.backward()

    engine = tiny_engine(tiny_model(batch_norm=True, dropout=0.2), accumulation_steps=2, clip_grad_norm=None)
    engine.train_step(parts)
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    torch.testing.assert_close(gradients(engine), expected, rtol=0, atol=1e-5)
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, reference.get_buffer(name)), name


def test_bf16_keeps_weights_and_features_in_float32() -> None:
    model = tiny_model()
    kinds: list[torch.dtype] = []
    product = model.get_submodule("blocks.0.mlp.shared.fc")
    product.register_forward_hook(lambda module, args, output: kinds.append(output.dtype))
    options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "total_steps": 2, "micro_batch_size": 8, "device": "cpu"}
    engine = create_engine(model, OptimConfig(), precision="bf16", **options)
    loss = read_metrics(engine.train_step(micro_batches(0)))["train/loss"]
    exact = train(tiny_engine(tiny_model()), 1)[0]["train/loss"]
    assert kinds == [torch.bfloat16]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {feature.dtype for feature in engine.module(*micro_batches(0)[0])} == {torch.float32}
    assert loss != exact
    assert loss == pytest.approx(exact, abs=0.01)


def test_pixels_are_normalised_by_the_given_mean_and_deviation() -> None:
    seen: list[Tensor] = []

    class Recorder(nn.Module):
        def forward(self, images: Tensor, text: Any) -> tuple[Tensor, Tensor, Tensor]:
            seen.append(images)
            return (torch.ones(1, 1),) * 3

    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 2, 2, 3)
    PixelModel(Recorder(), (0.1, 0.2, 0.5), (1.0, 0.5, 0.25), "fp32")(pixels, micro_batches(0)[0].text)
    assert seen[0].shape == (1, 3, 2, 2)
    torch.testing.assert_close(seen[0][0, :, 1, 0], torch.tensor([-0.1, 0.0, 2.0]))


def test_temperature_is_capped_from_the_first_update_on() -> None:
    temperatures = [step["train/temperature"] for step in train(tiny_engine(tiny_model(), temperature_max=2.0), 3)]
    assert temperatures[0] == pytest.approx(torch.e)
    assert max(temperatures[1:]) <= 2.0 + 1e-6


def test_a_fixed_temperature_stays() -> None:
    model = tiny_model()
    model.logit_scale.requires_grad_(False)
    engine = tiny_engine(model, accumulation_steps=2)
    assert [step["train/temperature"] for step in train(engine, 2, parts=2)] == pytest.approx([torch.e, torch.e])
    assert "exp_avg/logit_scale" not in engine.full_state()[1]


def test_a_faulty_batch_stops_the_next_step_and_leaves_no_trace() -> None:
    engine, unharmed = tiny_engine(tiny_model()), tiny_engine(tiny_model())
    train(engine, 1)
    before, std = engine.full_state(), engine.module.std.clone()
    engine.module.std.zero_()
    train(engine, 1)  # nobody has looked yet
    engine.module.std.copy_(std)
    with pytest.raises(TrainingError, match="step 1"):
        train(engine, 1)
    assert same(before, engine.full_state())
    expected = train(unharmed, 2)[1:]
    assert train(engine, 1) == expected
    assert same(engine.full_state(), unharmed.full_state())
    engine.module.std.zero_()
    train(engine, 1)
    with pytest.raises(TrainingError, match="step 2"):
        engine.full_state()
    train(engine, 1)
    engine.module.std.copy_(std)
    engine.load_full_state(*before, step=1)  # goes on from before the fault
    assert train(engine, 1) == expected


def test_state_of_another_model_is_refused_with_the_difference() -> None:
    state = tiny_engine(tiny_model()).full_state()
    with pytest.raises(
        UserError, match=r"model state.*text_input\.token_embedding\.weight \(checkpoint: \(512, 64\), here: \(600"
    ):
        tiny_engine(tiny_model(vocab_size=600)).load_full_state(*state, step=0)
    with pytest.raises(UserError, match="optimizer state"):
        tiny_engine(tiny_model()).load_full_state(state[0], {}, step=0)
    with pytest.raises(UserError, match="step 4 holds the optimizer state of step 0"):
        tiny_engine(tiny_model()).load_full_state(*state, step=4)


def test_the_number_of_micro_batches_must_be_the_configured_one() -> None:
    with pytest.raises(ValueError, match="expected 2 micro batches, got 1"):
        tiny_engine(tiny_model(), accumulation_steps=2).train_step(micro_batches(0))


def test_deepspeed_has_what_stage_3_replaces() -> None:
    zero = tiny_engine(tiny_model(), stage=3)._stepper._zero  # type: ignore[attr-defined]
    assert callable(type(zero)._get_norm_groups)
    assert hasattr(zero, "reduce_and_partition_stream")
    assert zero.parameter_offload.get_param_coordinator()._PartitionedParameterCoordinator__max_ongoing_fetch_events > 0


def test_zero_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="pip install deepspeed"):
        tiny_engine(tiny_model(), stage=1)


@pytest.mark.parametrize(
    ("setting", "value"), [("zero_stage", 4), ("precision", "fp16"), ("zero_options", {"overlap_comm": False})]
)
def test_settings_the_engine_does_not_have_are_refused(setting: str, value: Any) -> None:
    options: dict[str, Any] = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "total_steps": 2, "micro_batch_size": 8, "device": "cpu"}
    with pytest.raises(UserError, match=setting):
        create_engine(tiny_model(), OptimConfig(), **(options | {setting: value}))


def test_random_numbers_of_a_step_depend_on_seed_step_and_rank() -> None:
    def draw(*where: int) -> float:
        seed_step(*where)
        return torch.rand(()).item()

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(1, 3, 2)}) == 5
