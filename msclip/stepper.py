"""What an engine asks of whoever runs its passes and holds its optimiser, and the answer of plain PyTorch.

Plain PyTorch serves one process, or several that average their gradients in one all-reduce. Several are for small machines
and for tests; at scale use DeepSpeed, which partitions memory and can reduce gradients during the backward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from msclip.distributed import mean_over_ranks, world_size
from msclip.ema import average_weights
from msclip.optim import reset_moments
from msclip.tokens import PackedText


class Stepper(Protocol):
    """What differs between plain PyTorch and DeepSpeed. Gradients are averaged over ranks."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimiser's groups, whose `lr` may be written."""
        ...

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the `PixelModel`."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds a micro batch's gradient; called accumulation_steps times before `apply`."""
        ...

    def apply(self) -> tuple[Tensor, Tensor]:
        """The gradient's norm before clipping, and whether it is finite: only then are weights updated. Nobody waits for it."""
        ...

    def discard(self) -> None:
        """In place of `apply`: the gradients go, and nothing is updated."""
        ...

    def cap(self, parameter: nn.Parameter, maximum: float) -> None:
        """Elementwise upper bound of a parameter, without waiting for the device."""
        ...

    def whole(self, parameter: nn.Parameter, write: bool) -> AbstractContextManager[None]:
        """Inside, `parameter.data` is the whole tensor; collective. With `write`, all ranks set it to the same."""
        ...

    def written(self) -> None:
        """To be called after parameters were written."""
        ...

    def average(self, decay: float) -> None:
        """Moves the average of the weights towards them, without waiting for the device."""
        ...

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """The whole of one of AdamW's averages, or of the weight's own; collective."""
        ...

    def reset_moments(self, step: int, averaged: bool) -> None:
        """AdamW as after `step` updates, averages zero; with `averaged`, the weights' own average starts from them."""
        ...

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """Overwrites what `moment` reads with a whole tensor."""
        ...


def step_if_finite(optimizer: torch.optim.Optimizer, norm: Tensor, step: Callable[[], object]) -> Tensor:
    """Runs `step`, which ends in `optimizer.step`, so that a norm that is not finite changes nothing; returns whether it is.

    By what fused AdamW asks for mixed precision: where `found_inf` is 1 it leaves everything as it is. Nobody waits.
    """
    finite = norm.isfinite()
    optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
    step()
    return finite


class WholeParameters:
    """State access where every rank holds all parameters and all of AdamW's averages."""

    def __init__(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None):
        self._optimizer = optimizer
        self._clip_grad_norm = float("inf") if clip_grad_norm is None else clip_grad_norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """See `Stepper`, also for the other methods."""
        return self._optimizer.param_groups

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def _clip_and_step(self, step: Callable[[], object]) -> tuple[Tensor, Tensor]:
        """See `Stepper.apply`; `step` is the optimiser's."""
        norm = nn.utils.clip_grad_norm_(self._trained(), self._clip_grad_norm)
        return norm, step_if_finite(self._optimizer, norm, step)

    @torch.no_grad()
    def cap(self, parameter: nn.Parameter, maximum: float) -> None:
        parameter.clamp_(max=maximum)

    @contextmanager
    def whole(self, parameter: nn.Parameter, write: bool) -> Iterator[None]:
        yield

    def written(self) -> None:
        """The parameters are the only copy."""

    def average(self, decay: float) -> None:
        average_weights(self._optimizer, decay)

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self._optimizer.state[parameter][key]

    def reset_moments(self, step: int, averaged: bool) -> None:
        reset_moments(self._optimizer, self._trained(), step, averaged)

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self._optimizer.state[parameter][key].copy_(value)


class PlainStepper(WholeParameters):
    """Forward, backward and update with nothing but PyTorch."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None):
        super().__init__(optimizer, clip_grad_norm)
        self._module = module

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        return self._module(pixels, text)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def apply(self) -> tuple[Tensor, Tensor]:
        self._average_gradients()
        norm, finite = self._clip_and_step(self._optimizer.step)
        self._optimizer.zero_grad(set_to_none=True)
        return norm, finite

    def discard(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def _average_gradients(self) -> None:
        if world_size() == 1:
            return
        gradients = [parameter.grad for parameter in self._trained() if parameter.grad is not None]
        means = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, mean in zip(gradients, means.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))
