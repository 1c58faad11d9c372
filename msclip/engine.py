"""One training engine: plain PyTorch or DeepSpeed ZeRO 0 to 3 behind the same few verbs.

`train_step`, `full_state`, `averaged_state`, `load_full_state`; states are those of `engine_state.py`. Gradient accumulation
keeps the negatives of the whole global batch: features first, then their gradients micro batch by micro batch (GradCache,
arXiv 2101.06983).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from msclip.distributed import copy_from_first_rank, copy_stream, mean_over_ranks, rank
from msclip.ema import decay_at
from msclip.engine_state import EngineState
from msclip.errors import TrainingError, UserError
from msclip.health import check_step
from msclip.loss import ContrastiveResult, contrastive_loss
from msclip.optim import OptimConfig, build_optimizer, set_learning_rates
from msclip.stepper import PlainStepper, Stepper
from msclip.stepper_deepspeed import deepspeed_stepper, is_large
from msclip.timing import measured
from msclip.tokens import PackedText

Precision = Literal["fp32", "bf16"]


class MicroBatch(NamedTuple):
    """Pairs that go through the model together; image i belongs to caption i."""

    pixels: UInt8[Tensor, "batch size size 3"]
    text: PackedText

    def on(self, device: torch.device) -> "MicroBatch":
        """A copy on `device`; asynchronous from pinned memory."""
        return MicroBatch(self.pixels.to(device, non_blocking=True), self.text.to(device, non_blocking=True))

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All there are."""
        return self.pixels, self.text.ids, self.text.positions, self.text.padded, self.text.offsets


def normalised(
    pixels: UInt8[Tensor, "batch size size 3"], mean: Tensor, std: Tensor, dtype: torch.dtype
) -> Float[Tensor, "batch 3 size size"]:
    """Images of `dtype`, computed in float32, channels last in memory."""
    return ((pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std).to(dtype)


class Prepared(NamedTuple):
    """Micro batches whose way to the device has begun."""

    micro_batches: Sequence[MicroBatch]
    arrived: torch.cuda.Event | None
    """When they are there; None for a device that copies at once."""


class PixelModel(nn.Module):
    """The module an engine runs: pixels in, normalised there, float32 features out.

    Autocast is entered here because DeepSpeed switches one around its engine off. Weights stay float32.
    """

    mean: Float[Tensor, "3 1 1"]
    std: Float[Tensor, "3 1 1"]

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], precision: Precision, compiled: bool = False
    ):
        super().__init__()
        self.model = model
        self._normalised = torch.compile(normalised) if compiled else normalised
        self.autocast = precision == "bf16"
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(
        self, pixels: UInt8[Tensor, "batch size size 3"], text: PackedText
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"], Float[Tensor, "scale"]]:
        """Unit image and caption features, and the temperature, which a bias follows where the model has one."""
        images = self._normalised(pixels, self.mean, self.std, torch.bfloat16 if self.autocast else torch.float32)
        with torch.autocast(pixels.device.type, dtype=torch.bfloat16, enabled=self.autocast):
            image_features, text_features, scale = self.model(images, text)
        return image_features.float(), text_features.float(), scale.float()


class _Verdict(NamedTuple):
    """Whether a step's update was applied, on its way from the device."""

    flag: Tensor
    known: torch.cuda.Event | None
    metrics: Mapping[str, Tensor | float]
    step: int

    @staticmethod
    def of(applied: Tensor, metrics: Mapping[str, Tensor | float], step: int) -> "_Verdict":
        if not applied.is_cuda:
            return _Verdict(applied, None, metrics, step)
        flag = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(applied, non_blocking=True)
        known = torch.cuda.Event()
        known.record(torch.cuda.current_stream(applied.device))
        return _Verdict(flag, known, metrics, step)

    def applied(self) -> bool:
        if self.known is not None:
            self.known.synchronize()
        return bool(self.flag)


class Engine:
    """A model in training. Every method is collective: all ranks call it."""

    def __init__(
        self,
        module: PixelModel,
        stepper: Stepper,
        shapes: Mapping[str, torch.Size],
        config: OptimConfig,
        total_steps: int,
        device: torch.device,
        seed: int,
    ):
        self.module, self.model, self.device = module, module.model, device
        self.step = 0
        """Updates applied so far; the next `train_step` is number `step`."""
        self._stepper, self._config = stepper, config
        self._total_steps, self._seed = total_steps, seed
        self._unsettled: _Verdict | None = None
        self._parameters = dict(self.model.named_parameters())
        self._state = EngineState(self.model, stepper, shapes, averaged=config.ema_decay is not None)

    def prepare(self, micro_batches: Sequence[MicroBatch]) -> Prepared:
        """Starts the copy of a step's micro batches to the device, beside what the device is doing.

        From pinned memory, which may be written again once `copy_stream` has got there.
        """
        if self.device.type != "cuda":
            return Prepared([micro_batch.on(self.device) for micro_batch in micro_batches], None)
        with torch.cuda.stream(copy_stream(self.device)):
            there = [micro_batch.on(self.device) for micro_batch in micro_batches]
            arrived = torch.cuda.Event()
            arrived.record()
        return Prepared(there, arrived)

    def train_step(self, batch: Prepared | Sequence[MicroBatch]) -> dict[str, Tensor | float]:
        """One update from this rank's share of a global batch, as accumulation_steps micro batches of equal size.

        `batch` is best what `prepare` returned while the step before was under way.

        Returns metrics, means over the ranks, for `read_metrics`: they stay on the device, so that this call need not wait
        for it. `train/temperature` and, for the sigmoid loss, `train/logit_bias` are those of the loss, before the update.
        A gradient that is not finite is not applied. That is found out on the device, so that it is `settle` which raises
        `TrainingError`, on all ranks; the next call asks it before it applies anything. Training may go on from there; only
        the moving averages, of weights and in BatchNorm, have counted that step.
        """
        prepared = batch if isinstance(batch, Prepared) else self.prepare(batch)
        if len(prepared.micro_batches) != self._config.accumulation_steps:
            raise ValueError(f"expected {self._config.accumulation_steps} micro batches, got {len(prepared.micro_batches)}")
        lr = set_learning_rates(self._stepper.param_groups, self.step, self._config, self._total_steps)
        seed_step(self._seed, self.step, rank())
        self.module.train()
        with measured("copy", self.device):
            on_device = self._arrived(prepared)
        result, scale = self._accumulate(on_device) if len(on_device) > 1 else self._backward(on_device[0])
        try:
            self.settle()
        except TrainingError:
            self._stepper.discard()  # the gradients of the step that has begun meanwhile
            raise
        means = mean_over_ranks(torch.stack(result).detach())
        grad_norm, applied = self._stepper.apply()
        metrics: dict[str, Tensor | float] = {
            "train/loss": means[0],
            "train/image_to_text_accuracy": means[1],
            "train/text_to_image_accuracy": means[2],
            **dict(zip(("train/temperature", "train/logit_bias"), scale, strict=False)),
            "train/grad_norm": grad_norm,
            "train/lr": lr,
        }
        self._unsettled = _Verdict.of(applied, metrics, self.step)
        logit_scale = self._parameters.get("logit_scale")
        if logit_scale is not None and logit_scale.requires_grad:
            self._stepper.cap(logit_scale, float(np.log(self._config.temperature_max)))
        self.step += 1
        if self._config.ema_decay is not None:
            self._state.average(decay_at(self.step, self._config.ema_decay))
        return metrics

    def settle(self) -> None:
        """Waits until the last step is done; raises `TrainingError` if its gradient was not finite, and not applied."""
        verdict, self._unsettled = self._unsettled, None
        if verdict is not None and not verdict.applied():
            self.step = verdict.step
            check_step(read_metrics(verdict.metrics), verdict.step)
            raise AssertionError("an update was withheld although its gradient is finite")

    @staticmethod
    def _arrived(prepared: Prepared) -> Sequence[MicroBatch]:
        if prepared.arrived is not None:
            stream = torch.cuda.current_stream(prepared.micro_batches[0].pixels.device)
            stream.wait_event(prepared.arrived)
            for micro_batch in prepared.micro_batches:
                for tensor in micro_batch.tensors:
                    tensor.record_stream(stream)
        return prepared.micro_batches

    def _backward(self, micro_batch: MicroBatch) -> tuple[ContrastiveResult, Tensor]:
        image_features, text_features, scale = self._stepper.forward(*micro_batch)
        result = contrastive_loss(image_features, text_features, *scale.split(1))
        self._stepper.backward(result.loss)
        return result, scale.detach().clone()

    def _accumulate(self, micro_batches: Sequence[MicroBatch]) -> tuple[ContrastiveResult, Tensor]:
        """The loss of all micro batches together; a rank's rows are its micro batches in order."""
        random_states, outputs = [], []
        with torch.no_grad(), _running_statistics_kept(self.module):
            for micro_batch in micro_batches:
                random_states.append(_random_state(self.device))
                outputs.append(self._stepper.forward(*micro_batch))
        images, texts, scales = (list(part) for part in zip(*outputs, strict=True))
        leaves = [torch.cat(images), torch.cat(texts), scales[0].clone()]
        for leaf in leaves:
            leaf.requires_grad_()
        result = contrastive_loss(leaves[0], leaves[1], *leaves[2].split(1))
        image_grad, text_grad, scale_grad = torch.autograd.grad(result.loss, leaves)
        by_micro_batch = zip(
            micro_batches, random_states, image_grad.chunk(len(images)), text_grad.chunk(len(images)), strict=True
        )
        for micro_batch, state, to_images, to_texts in by_micro_batch:
            _set_random_state(self.device, state)  # dropout as in the first pass
            image_features, text_features, scale = self._stepper.forward(*micro_batch)
            # A scalar with exactly these gradients; that of temperature and bias is shared out: each pass has its own.
            surrogate = (image_features * to_images).sum() + (text_features * to_texts).sum()
            self._stepper.backward(surrogate + (scale * scale_grad).sum() / len(images))
        return result, leaves[2].detach()

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Model and optimiser as float32 CPU tensors on rank 0; empty dicts elsewhere.

        The model's by parameter and buffer name; the optimiser's as `exp_avg/NAME`, `exp_avg_sq/NAME` and `step`, the
        number of updates behind the averages. BatchNorm's running statistics differ between ranks: they are averaged
        first, on the ranks too, so that a resumed run and the one that went on hold the same.
        """
        self.settle()
        return self._state.read(self.step)

    def averaged_state(self) -> dict[str, Tensor]:
        """The moving average of the model's state, in the same form; empty where `optim.ema_decay` is null."""
        return self._state.read_average()

    def load_full_state(
        self,
        model_state: Mapping[str, Tensor],
        optimizer_state: Mapping[str, Tensor],
        step: int,
        averaged_state: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Continues from `full_state` of any ZeRO stage and world size; `train_step` goes on with number `step`.

        Only rank 0's dicts are read; other ranks may pass empty ones. Without `averaged_state` the moving average, if there
        is one, starts anew from `model_state`. `UserError` on all ranks if they do not fit.
        """
        self._state.write(model_state, optimizer_state, averaged_state or {}, step)
        self.step, self._unsettled = step, None


def create_engine(
    model: nn.Module,
    config: OptimConfig,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    total_steps: int,
    micro_batch_size: int,
    device: torch.device | str,
    zero_stage: int | None = None,
    precision: Precision = "fp32",
    seed: int = 0,
    zero_options: Mapping[str, Any] | None = None,
    compiled: bool = False,
    save_memory: bool = False,
) -> Engine:
    """Puts `model` on `device`, with rank 0's weights, and makes it trainable.

    `zero_stage` None is plain PyTorch; 0 to 3 is DeepSpeed, which in a process without process group makes one of its own.
    `mean` and `std` normalise pixels scaled to 0..1. `micro_batch_size` is pairs a forward pass on one rank.
    `seed`, with step and rank, decides dropout. `zero_options` are further entries of DeepSpeed's `zero_optimization`.
    `compiled` compiles the model's parts for the GPU, with `save_memory` as told by `Model.compile_parts`.
    The model has `parameter_groups()` and takes (images, text) to (image features, text features, temperature and bias if it
    has one). Stage 3 gathers the parameters of all of it at once if they are no more than DeepSpeed's
    `stage3_max_live_parameters` (1e9), of a larger one unit by unit, if it has `units()`. Outside of `train_step` that model
    has no weights: `full_state` collects them.
    """
    if precision not in ("fp32", "bf16"):
        raise UserError(f"precision must be fp32 or bf16, got {precision}")
    if zero_stage not in (None, 0, 1, 2, 3):
        raise UserError(f"zero_stage must be null, 0, 1, 2 or 3, got {zero_stage}")
    if save_memory and not compiled:
        raise UserError(
            f"training.save_memory is for a compiled model, which training.compiled null does not mean on {device}; got "
            "training.save_memory true. For any model there is model.checkpoint_blocks"
        )
    device = torch.device(device)
    zero_options = dict(zero_options or {})
    units: list[nn.Module] | None = None  # all of the model is one
    if zero_stage == 3 and is_large(model, zero_options):
        units = getattr(model, "units", list)()
    if compiled:
        model.compile_parts(save_memory, by_unit=units is not None)  # type: ignore[operator]
    module = PixelModel(model, mean, std, precision, compiled).to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        copy_from_first_rank(tensor.data)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config)  # type: ignore[arg-type]
    stepper: Stepper
    if zero_stage is None:
        if zero_options:
            raise UserError(f"zero_options need a zero_stage, got {zero_options} with zero_stage null")
        stepper = PlainStepper(module, optimizer, config.clip_grad_norm)
    else:
        stepper = deepspeed_stepper(module, optimizer, config, zero_stage, micro_batch_size, zero_options, units)
    return Engine(module, stepper, shapes, config, total_steps, device, seed)


def read_metrics(metrics: Mapping[str, Tensor | float]) -> dict[str, float]:
    """Metrics of `train_step` as numbers; waits for the device, once."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    values = torch.stack([value.float() for value in tensors.values()]).tolist() if tensors else []
    read = dict(zip(tensors, values, strict=True))
    return {name: read[name] if name in read else float(value) for name, value in metrics.items()}


def seed_step(seed: int, step: int, rank: int) -> None:
    """Makes torch's randomness in a step a function of these three, so that no generator state needs saving."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but does not count it."""
    counting = [part for part in module.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    for part in counting:
        part.track_running_stats = False
    try:
        yield
    finally:
        for part in counting:
            part.track_running_stats = True
