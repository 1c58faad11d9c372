"""Training steps under DeepSpeed ZeRO 0 to 3 with PyTorch's AdamW, which needs no compiler on the nodes.

DeepSpeed's config is fixed here rather than opened to the user: learning rate, accumulation, precision and checkpoints are
ours, so that they mean the same with and without it. Weights stay float32 (autocast is the module's business); then
DeepSpeed's low-precision and master copies hold equal numbers, and a whole parameter can be read and written through either.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from msclip.distributed import rank
from msclip.ema import average_weights
from msclip.errors import UserError
from msclip.optim import OptimConfig, reset_moments
from msclip.stepper import WholeParameters, step_if_finite
from msclip.tokens import PackedText


def deepspeed_stepper(
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    config: OptimConfig,
    zero_stage: int,
    micro_batch_size: int,
    zero_options: Mapping[str, Any],
    units: Iterable[nn.Module] | None = None,
) -> "Zero0Stepper | PartitionedStepper":
    """Hands module and optimiser to DeepSpeed; under stage 3 the module's parameters are partitioned from now on.

    Those inside one of `units` are then gathered together, with one hook for all instead of one for each of its modules;
    without units, all parameters are.
    """
    refused = [name for name in zero_options if name == "stage" or name.startswith("offload")]
    if refused:
        raise UserError(
            f"zero_options cannot set {', '.join(refused)}: the stage is zero_stage, and offloading to CPU or disk is not "
            "supported; for more memory raise zero_stage or optim.accumulation_steps"
        )
    device = next(module.parameters()).device
    deepspeed = _import_deepspeed(device)
    from deepspeed.utils import set_z3_leaf_module

    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # DeepSpeed's 5e8 elements are all gradients of the paper's model and more: nothing would be sent before the last is known.
    bucket = min(int(3e7), sum(parameter.numel() for parameter in module.parameters()))
    # Where gradients travel beside the backward pass, DeepSpeed waits on the host for the last of them, and the GPU for the
    # host: within one host that costs more than it gains.
    beside = bool(zero_options.get("overlap_comm", _several_hosts()))
    zero: dict[str, Any] = {"reduce_bucket_size": bucket, "overlap_comm": beside}
    if zero_stage in (1, 2):
        zero["compute_grad_norm"] = False
    if zero_stage == 3:
        # They are put together for sending anyway. Beside the backward pass they need a place of their own until then:
        # DeepSpeed lets go of one of which this rank keeps no part, such as the temperature's, while it is being read.
        zero["contiguous_gradients"] = beside
        if units is None:
            zero["stage3_param_persistence_threshold"] = 0  # small ones kept whole would be gathered one by one
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": 0.0,  # done here: DeepSpeed would wait for the norm, and stage 0 apply one that is not finite
        "zero_optimization": zero | {**zero_options, "stage": zero_stage},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
    }
    if zero_stage == 3:
        module = _Whole(module) if units is None else module
        for unit in units or ():
            set_z3_leaf_module(unit, True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    if zero_stage == 0:
        return Zero0Stepper(engine, optimizer, config.clip_grad_norm)
    return (Zero3Stepper if zero_stage == 3 else PartitionedStepper)(engine, config.clip_grad_norm)


def is_large(model: nn.Module, zero_options: Mapping[str, Any]) -> bool:
    """Whether a model has more parameters than a rank may hold whole under stage 3, by DeepSpeed's bound."""
    return sum(parameter.numel() for parameter in model.parameters()) > zero_options.get("stage3_max_live_parameters", 1e9)


class _Whole(nn.Module):
    """A module that owns all parameters of another, which it hides: DeepSpeed's hooks find no parts in it.

    So all parameters are gathered at once, gradients leave as they come, and what is inside may be compiled.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self._run = [module]  # in a list: not a submodule
        for number, parameter in enumerate(module.parameters()):
            self.register_parameter(f"parameter_{number}", parameter)

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        return self._run[0](pixels, text)


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it guesses, aloud
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # demanded even where no launcher set it
    try:
        import deepspeed
        import deepspeed.ops
        import deepspeed.utils.nvtx
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError(
            f"zero_stage needs DeepSpeed, which cannot be imported ({error}): pip install deepspeed, or set zero_stage to "
            "null to train with plain PyTorch"
        ) from error
    logger.setLevel(logging.WARNING)
    logger.addFilter(_worth_reading)
    # DeepSpeed's own calls to two names that torch 2.13 deprecates.
    deprecated = r".torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor). is deprecated"
    warnings.filterwarnings("ignore", deprecated, FutureWarning)
    deepspeed.utils.nvtx.enable_nvtx = False  # marks for a profiler, thousands a step
    # A communication kernel that initialize() compiles on CPU machines, for 40 s, and that training does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _several_hosts() -> bool:
    # LOCAL_WORLD_SIZE: torchrun and Ray Train set it; without them one host is meant.
    return dist.get_world_size() > int(os.environ.get("LOCAL_WORLD_SIZE") or dist.get_world_size())


def _worth_reading(record: logging.LogRecord) -> bool:
    # Stage 3 misses tensors inside a module's `Tokens`; harmless, since modules that own parameters take plain tensors.
    return "unknown inputs or outputs type" not in record.getMessage()


class _DeepSpeedPasses:
    """Forward and backward through DeepSpeed's engine, which reduces gradients at the last micro batch (stages 0, 1) or
    at each (2, 3)."""

    def __init__(self, engine: Any):
        self._engine = engine

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        return self._engine(pixels, text)

    def backward(self, loss: Tensor) -> None:
        # Undivided: our loss is the mean of the whole global batch already.
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()  # only counts the micro batch


class Zero0Stepper(_DeepSpeedPasses, WholeParameters):
    """Stage 0: nothing is partitioned; DeepSpeed all-reduces gradients into `.grad`."""

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None):
        _DeepSpeedPasses.__init__(self, engine)
        WholeParameters.__init__(self, optimizer, clip_grad_norm)

    def apply(self) -> tuple[Tensor, Tensor]:
        """DeepSpeed would apply any gradient, so the optimiser sees to it that it is finite."""
        return self._clip_and_step(self._engine.step)

    def discard(self) -> None:
        """By a step that updates nothing, so that DeepSpeed counts micro batches from 0 again."""
        step_if_finite(self._optimizer, torch.tensor(torch.nan), self._engine.step)


class PartitionedStepper(_DeepSpeedPasses):
    """Stages 1 and 2: every rank has all parameters, and of AdamW's averages (2: of gradients too) its part.

    AdamW updates flat float32 partitions, one a parameter group and rank, also under stage 3.
    """

    def __init__(self, engine: Any, clip_grad_norm: float | None):
        super().__init__(engine)
        self._zero, self._clip_grad_norm = engine.optimizer, clip_grad_norm

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    @torch.no_grad()
    def apply(self) -> tuple[Tensor, Tensor]:
        own: list[Tensor] = [part for parts in self._zero.averaged_gradients.values() for part in parts]
        square = nn.utils.get_total_norm(own).square()
        dist.all_reduce(square)
        norm = square.sqrt()
        if self._clip_grad_norm is not None:
            # Never by NaN: stage 3 keeps these buffers, and what only pads them is written once, at the start.
            torch._foreach_mul_(own, (self._clip_grad_norm / (norm + 1e-6)).clamp(max=1).nan_to_num(1.0))
        return norm, step_if_finite(self._zero.optimizer, norm, self._engine.step)

    def discard(self) -> None:
        """By a step that updates nothing: DeepSpeed keeps gradients and counts where `zero_grad` does not reach."""
        step_if_finite(self._zero.optimizer, torch.tensor(torch.nan), self._engine.step)

    @torch.no_grad()
    def cap(self, parameter: nn.Parameter, maximum: float) -> None:
        if (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]  # this rank's part of it
            mapping.get_hp_fragment().clamp_(max=maximum)
        parameter.data.clamp_(max=maximum)

    @contextmanager
    def whole(self, parameter: nn.Parameter, write: bool) -> Iterator[None]:
        yield

    def written(self) -> None:
        self._zero.refresh_fp32_params()

    def average(self, decay: float) -> None:
        average_weights(self._zero.optimizer, decay)

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def reset_moments(self, step: int, averaged: bool) -> None:
        """Partitions' averages, and the parameters' views of them, which DeepSpeed makes once."""
        reset_moments(self._zero.optimizer, self._zero.single_partition_of_fp32_groups, step, averaged)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)


class Zero3Stepper(PartitionedStepper):
    """Stage 3: parameters are partitioned too."""

    def __init__(self, engine: Any, clip_grad_norm: float | None):
        super().__init__(engine, clip_grad_norm)
        # This stage has no setting to leave the norm, which `apply` takes, alone: DeepSpeed is shown one it need not wait for.
        self._zero._get_norm_groups = lambda: [torch.zeros(())]
        stream = self._zero.reduce_and_partition_stream  # None on CPUs
        self._in_order = stream is None or stream == torch.cuda.current_stream(engine.device)
        if stream is not None and self._in_order:
            # The host need not wait for gradients that travel in the order of everything else, nor, between one parameter
            # and the next of a gather, for all that was before it.
            stream.synchronize = lambda: None
            coordinator = self._zero.parameter_offload.get_param_coordinator()
            coordinator._PartitionedParameterCoordinator__max_ongoing_fetch_events = sys.maxsize

    def forward(self, pixels: Tensor, text: PackedText) -> tuple[Tensor, Tensor, Tensor]:
        if not self._in_order:
            # DeepSpeed's stream for gathers does not wait for what has just written the partitions.
            torch.cuda.current_stream(self._engine.device).synchronize()
        return super().forward(pixels, text)

    @torch.no_grad()
    def cap(self, parameter: nn.Parameter, maximum: float) -> None:
        from deepspeed.utils import safe_get_local_fp32_param

        safe_get_local_fp32_param(parameter).clamp_(max=maximum)
        _partition(parameter).clamp_(max=maximum)
        parameter.data.clamp_(max=maximum)  # empty unless it is small enough to stay whole

    @contextmanager
    def whole(self, parameter: nn.Parameter, write: bool) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0 if write else None):
            yield

    def reset_moments(self, step: int, averaged: bool) -> None:
        reset_moments(self._zero.optimizer, self._zero.fp32_partitioned_groups_flat, step, averaged)

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        """DeepSpeed's own setter overruns a tensor whose size is no multiple of the ranks: partitions are padded."""
        from deepspeed.utils import safe_set_local_optimizer_state

        size = _partition(parameter).numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank() * size : (rank() + 1) * size], key)


def _partition(parameter: nn.Parameter) -> Tensor:
    """This rank's padded part of a parameter, under stage 3."""
    return parameter.ds_tensor.data  # type: ignore[attr-defined]
