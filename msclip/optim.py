"""AdamW over groups of parameters, and a learning rate that is a function of the step and of the depth.

No scheduler object exists: the rate of a step follows from the config alone, so nothing about it needs saving. Weight decay
differs between shared and modality-specific weights, as in the official MS-CLIP config (its trainer is unreleased).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from msclip.config import ModelConfig
from msclip.errors import UserError
from msclip.layer_decay import levels_below_top

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's two averages, by torch's names."""
AVERAGE = "ema"
"""The weights' own average, which stands beside them in the optimiser's state; see `ema.py`."""


@dataclass(frozen=True)
class OptimConfig:
    """How weights are updated. Defaults are MS-CLIP-S B/32's official config where that says anything."""

    lr: float = 1.6e-3
    """Peak learning rate at the global batch in use: the official 1e-4 a GPU times 16 GPUs of 256 pairs (batch 4096)."""
    lr_shared: float | None = None
    """Peak learning rate of the weights that both modalities share; null = lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates. The official config names none, so these are torch's."""
    eps: float = 1e-8
    """AdamW's epsilon; torch's."""
    weight_decay: float = 0.05
    """Decoupled decay of weights that belong to one modality. Norms, biases, embeddings and temperature have none."""
    weight_decay_shared: float = 0.2
    """Decoupled decay of weights that both modalities share."""
    warmup_steps: int = 2000
    """Steps of linear warm-up from 1e-6. The official config asks for 5 epochs."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate from the end of the warm-up to the last step."""
    min_lr: float = 1e-5
    """Learning rate at the last step of the cosine and linear schedules."""
    clip_grad_norm: float | None = None
    """Longest gradient, over all parameters together; a longer one is scaled down to it. Null = no limit, as official."""
    layer_decay: float = 1.0
    """Factor of the learning rate, warm-up and min_lr included, from one layer to the next below it (arXiv 2003.10555,
    2106.08254): the head has the full rate, the input the smallest. For fine-tuning; 1 = the same rate everywhere."""
    ema_decay: float | None = None
    """What a step leaves of the moving average of the weights, such as 0.999; in the first steps less, min(ema_decay,
    (1 + step) / (10 + step)). Each checkpoint then has the average beside the weights. Null = no average."""
    temperature_max: float = 100.0
    """Cap of the learned temperature exp(logit_scale), as CLIP's."""
    accumulation_steps: int = 1
    """Micro batches a step. Negatives still come from the whole global batch (GradCache, arXiv 2101.06983); costs a
    second forward pass."""

    def __post_init__(self) -> None:
        if self.schedule != "constant" and self.min_lr > min(self.lr, self.lr_shared or self.lr):
            raise UserError(f"optim.min_lr must not exceed optim.lr and lr_shared, got {self.min_lr} and {self.lr}")
        for name, low in (("warmup_steps", 0), ("accumulation_steps", 1)):
            if getattr(self, name) < low:
                raise UserError(f"optim.{name} must be at least {low}, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps > 0:
            raise UserError(f"optim.betas must be from 0 to below 1 and optim.eps positive, got {self.betas} and {self.eps}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"optim.layer_decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"optim.ema_decay must be above 0 and below 1, or null for no average, got {self.ema_decay}")
        for name in ("weight_decay", "weight_decay_shared", "min_lr"):
            if not getattr(self, name) >= 0:
                raise UserError(f"optim.{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "temperature_max", "clip_grad_norm", "lr_shared"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"optim.{name} must be greater than 0, got {value}")


WARMUP_START = 1e-6  # the official config's


def learning_rate(step: int, base: float, config: OptimConfig, total_steps: int) -> float:
    """Rate of update number `step` (from 0) of a parameter group whose peak is `base`; min_lr from `total_steps` on."""
    if step < config.warmup_steps:
        start = min(WARMUP_START, base)
        return start + (base - start) * step / config.warmup_steps
    if config.schedule == "constant":
        return base
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    remaining = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.min_lr + (base - config.min_lr) * remaining


class Grouped(Protocol):
    """What the optimiser asks of a model."""

    config: ModelConfig

    def parameter_groups(self) -> dict[str, list[str]]:
        """Parameter names by `shared`, `own` and `no_decay`, each parameter once."""
        ...

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Each parameter once."""
        ...


def parameter_groups(model: Grouped, config: OptimConfig) -> list[dict[str, Any]]:
    """AdamW's groups; a frozen parameter is in none, every other in exactly one.

    A group has its peak rate without layer-wise decay in `base_lr` and the factor of its layer in `lr_scale`.
    """
    parameters = dict(model.named_parameters())
    names = model.parameter_groups()
    listed = sorted(name for group in names.values() for name in group)
    if listed != sorted(parameters):
        raise ValueError(f"parameter groups and parameters differ in {set(listed) ^ set(parameters) or 'repetitions'}")
    lr_shared = config.lr if config.lr_shared is None else config.lr_shared
    rates = {"shared": lr_shared, "own": config.lr, "no_decay": config.lr}
    decays = {"shared": config.weight_decay_shared, "own": config.weight_decay, "no_decay": 0.0}
    groups: dict[tuple[str, int], dict[str, Any]] = {}
    for kind in ("shared", "own", "no_decay"):
        for name in names[kind]:
            if not parameters[name].requires_grad:
                continue
            level = levels_below_top(name, model.config) if config.layer_decay < 1 else 0
            scale = config.layer_decay**level
            rate = {"lr": rates[kind] * scale, "base_lr": rates[kind], "lr_scale": scale}
            group = groups.setdefault((kind, level), {"params": [], "name": kind, "weight_decay": decays[kind], **rate})
            group["params"].append(parameters[name])
    for group in groups.values():
        # DeepSpeed lays a group end to end, and compiled kernels read 16 bytes at once: what would misalign others comes last.
        group["params"].sort(key=lambda parameter: parameter.numel() % 4 != 0)
    return list(groups.values())


def build_optimizer(model: Grouped, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW, fused: the variant that can be told on the device to leave everything as it is (see `stepper.py`)."""
    return torch.optim.AdamW(parameter_groups(model, config), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rates(groups: list[dict[str, Any]], step: int, config: OptimConfig, total_steps: int) -> float:
    """Writes each group's rate for update number `step`; returns the one of the head."""
    for group in groups:
        group["lr"] = group["lr_scale"] * learning_rate(step, group["base_lr"], config, total_steps)
    return learning_rate(step, config.lr, config, total_steps)


def reset_moments(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor], step: int, averaged: bool) -> None:
    """AdamW's state as after `step` updates, with averages of zero, for tensors the optimiser updates.

    AdamW would make the same state lazily at its first update; made now, it can be loaded into, and memory that is too
    small shows before training starts. `step` is a float32 scalar on the device. With `averaged` the state also holds the
    average of the weights, which starts from them.
    """
    for parameter in parameters:
        counter = torch.tensor(float(step), dtype=torch.float32, device=parameter.device)
        optimizer.state[parameter] = {"step": counter} | {key: torch.zeros_like(parameter) for key in MOMENTS}
        if averaged:
            optimizer.state[parameter][AVERAGE] = parameter.detach().clone()
