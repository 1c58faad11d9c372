"""A training state as whole float32 tensors by the model's own names, read from and written to whatever holds it.

So a checkpoint knows nothing of ZeRO stages or world sizes. Every method is collective: all ranks call it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from msclip.distributed import copy_from_first_rank, first_ranks_object, mean_over_ranks, rank
from msclip.ema import move_towards
from msclip.errors import UserError
from msclip.optim import AVERAGE, MOMENTS
from msclip.stepper import Stepper

Tensors = Mapping[str, Tensor]


class EngineState:
    """Weights, buffers and AdamW's averages, and where wanted the moving average of weights and buffers."""

    def __init__(self, model: nn.Module, stepper: Stepper, shapes: Mapping[str, torch.Size], averaged: bool):
        """`shapes` are the parameters' own, which ZeRO stage 3 hides; the average starts from the weights as they are."""
        self._stepper, self._shapes, self._averaged = stepper, shapes, averaged
        self._device = next(model.parameters()).device
        self._parameters = dict(model.named_parameters())
        persistent = model.state_dict().keys() - self._parameters.keys()
        self._buffers = {name: buffer for name, buffer in model.named_buffers() if name in persistent}
        self._average_buffers: dict[str, Tensor] = {}
        stepper.reset_moments(0, averaged)
        self._restart_buffer_average()

    def _restart_buffer_average(self) -> None:
        if self._averaged:
            self._average_buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}

    def average(self, decay: float) -> None:
        """Moves the average towards the weights as they are.

        Running statistics of BatchNorm are averaged as the weights are whose activations they describe; its counters are
        copied.
        """
        self._stepper.average(decay)
        move_towards(list(self._average_buffers.values()), list(self._buffers.values()), decay)

    @torch.no_grad()
    def read(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `Engine.full_state`."""
        model_state: dict[str, Tensor] = {}
        optimizer_state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            self._keep_parameter(model_state, name)
            if parameter.requires_grad:
                for key in MOMENTS:
                    _keep(optimizer_state, f"{key}/{name}", self._stepper.moment(parameter, key))
        _keep_buffers(model_state, self._buffers)
        _keep(optimizer_state, "step", torch.tensor(step))
        return model_state, optimizer_state

    @torch.no_grad()
    def read_average(self) -> dict[str, Tensor]:
        """See `Engine.averaged_state`."""
        state: dict[str, Tensor] = {}
        if self._averaged:
            for name, parameter in self._parameters.items():
                if parameter.requires_grad:
                    _keep(state, name, self._stepper.moment(parameter, AVERAGE))
                else:  # what is not learned is its own average
                    self._keep_parameter(state, name)
            _keep_buffers(state, self._average_buffers)
        return state

    def _keep_parameter(self, state: dict[str, Tensor], name: str) -> None:
        parameter = self._parameters[name]
        with self._stepper.whole(parameter, write=False):
            _keep(state, name, parameter.data.float())

    @torch.no_grad()
    def write(self, model_state: Tensors, optimizer_state: Tensors, average: Tensors, step: int) -> None:
        """See `Engine.load_full_state`."""
        mine = self._mismatch(model_state, optimizer_state, average, step) if rank() == 0 else None
        complaint, has_average = first_ranks_object((mine, bool(average)))
        if complaint:
            raise UserError(complaint)
        for name, parameter in self._parameters.items():
            value = self._received(model_state, name, self._shapes[name])
            with self._stepper.whole(parameter, write=True):
                parameter.data.copy_(value)
        for name, buffer in self._buffers.items():
            buffer.copy_(self._received(model_state, name, buffer.shape, buffer.dtype))
        self._stepper.written()
        self._stepper.reset_moments(step, self._averaged)
        self._restart_buffer_average()
        for key in MOMENTS:
            self._write_moments(optimizer_state, key, f"{key}/")
        if has_average:
            self._write_moments(average, AVERAGE, "")
            for name, buffer in self._average_buffers.items():
                buffer.copy_(self._received(average, name, buffer.shape, buffer.dtype))

    def _write_moments(self, state: Tensors, key: str, prefix: str) -> None:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                self._stepper.set_moment(parameter, key, self._received(state, prefix + name, self._shapes[name]))

    def _received(self, state: Tensors, name: str, shape: torch.Size, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rank 0's tensor, on every rank's device."""
        if rank() == 0:
            return copy_from_first_rank(state[name].to(self._device, dtype, copy=True))
        return copy_from_first_rank(torch.empty(shape, dtype=dtype, device=self._device))

    def _mismatch(self, model_state: Tensors, optimizer_state: Tensors, average: Tensors, step: int) -> str | None:
        trained = {name: self._shapes[name] for name, p in self._parameters.items() if p.requires_grad}
        whole: dict[str, Any] = {**self._shapes, **{name: buffer.shape for name, buffer in self._buffers.items()}}
        moments = {f"{key}/{name}": shape for key in MOMENTS for name, shape in trained.items()}
        for what, state, shapes in (
            ("model", model_state, whole),
            ("optimizer", optimizer_state, moments | {"step": torch.Size()}),
            ("averaged", average, whole if average else {}),
        ):
            found = {name: tuple(value.shape) for name, value in state.items()}
            expected = {name: tuple(shape) for name, shape in shapes.items()}
            differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
            if differing:
                name = differing[0]
                return (
                    f"the checkpoint's {what} state does not fit this model: {len(differing)} tensors differ, the first is "
                    f"{name} (checkpoint: {found.get(name, 'absent')}, here: {expected.get(name, 'absent')}). Resume "
                    "with the configuration the checkpoint was made with."
                )
        if (updates := int(optimizer_state["step"])) != step:
            return (
                f"the checkpoint of step {step} holds the optimizer state of step {updates}: its files do not belong together"
            )
        return None


def _keep(state: dict[str, Tensor], name: str, value: Tensor) -> None:
    if rank() == 0:
        state[name] = value.detach().to("cpu", copy=True).contiguous()


def _keep_buffers(state: dict[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """BatchNorm's running statistics differ between ranks: they are averaged first, on the ranks too."""
    for name, buffer in buffers.items():
        if buffer.is_floating_point():
            buffer.copy_(mean_over_ranks(buffer))
        _keep(state, name, buffer)
