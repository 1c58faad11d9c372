"""Training steps under DeepSpeed ZeRO 0 to 3 with PyTorch's AdamW, which needs no compiler on the nodes.

DeepSpeed's config is fixed here rather than opened to the user: learning rate, accumulation, precision and checkpoints are
ours, so that they mean the same with and without it. Weights stay float32 (autocast is the module's business); then
DeepSpeed's low-precision and master copies hold equal numbers, and a whole parameter can be read and written through either.
"""

import logging
import os
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
from msclip.stepper import WholeParameters
from msclip.tokens import PackedText


def deepspeed_stepper(
    module: nn.Module,
    optimizer: torch.optim.AdamW,
    config: OptimConfig,
    zero_stage: int,
    micro_batch_size: int,
    zero_options: Mapping[str, Any],
    units: Iterable[nn.Module] = (),
) -> "Zero0Stepper | ZeroStepper":
    """Hands module and optimiser to DeepSpeed; under stage 3 the module's parameters are partitioned from now on.

    Those inside one of `units` are then gathered together, with one hook for all instead of one for each of its modules.
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
    settings = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": config.accumulation_steps,
        "gradient_clipping": config.clip_grad_norm or 0.0,  # 0: no limit
        "zero_optimization": {"reduce_bucket_size": bucket, "overlap_comm": True, **zero_options, "stage": zero_stage},
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a step
    }
    if zero_stage == 0:
        settings["gradient_clipping"] = 0.0  # clipped here, because stage 0 would apply a gradient that is not finite
    if zero_stage == 3:
        for unit in units:
            set_z3_leaf_module(unit, True)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    return Zero0Stepper(engine, optimizer, config.clip_grad_norm) if zero_stage == 0 else ZeroStepper(engine)


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # or it guesses, aloud
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # demanded even where no launcher set it
    try:
        import deepspeed
        import deepspeed.ops
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
    # A communication kernel that initialize() compiles on CPU machines, for 40 s, and that training does not need.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


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

    def apply(self) -> tuple[Tensor, bool | Tensor]:
        """DeepSpeed would apply any gradient, so it is asked only when that is finite, or where the optimiser sees to it."""
        return self._clip_and_step(self._engine.step)


class ZeroStepper(_DeepSpeedPasses):
    """Stages 1 to 3: AdamW updates flat float32 partitions, one a parameter group and rank."""

    def __init__(self, engine: Any):
        super().__init__(engine)
        self._zero = engine.optimizer
        self._sharded = engine.zero_optimization_stage() == 3  # parameters too, not only AdamW's averages

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._zero.param_groups

    def apply(self) -> tuple[Tensor, bool]:
        """DeepSpeed itself looks at the norm and discards a gradient that is not finite."""
        self._engine.step()
        # A tensor on the device, but the number inf where the gradient was discarded.
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), device=self._engine.device)
        return norm, self._engine.was_step_applied()

    @torch.no_grad()
    def cap(self, parameter: nn.Parameter, maximum: float) -> None:
        if self._sharded:
            from deepspeed.utils import safe_get_local_fp32_param

            safe_get_local_fp32_param(parameter).clamp_(max=maximum)
            _partition(parameter).clamp_(max=maximum)
        elif (mapping := parameter._hp_mapping) is not None:  # type: ignore[attr-defined]  # this rank's part of it
            mapping.get_hp_fragment().clamp_(max=maximum)
        parameter.data.clamp_(max=maximum)  # under stage 3 empty unless it is small enough to stay whole

    @contextmanager
    def whole(self, parameter: nn.Parameter, write: bool) -> Iterator[None]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0 if write else None, enabled=self._sharded):
            yield

    def written(self) -> None:
        self._zero.refresh_fp32_params()

    def average(self, decay: float) -> None:
        average_weights(self._zero.optimizer, decay)

    def moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key)

    def reset_moments(self, step: int, averaged: bool) -> None:
        """Partitions' averages, and for stages 1 and 2 the parameters' views of them, which DeepSpeed makes once."""
        zero = self._zero
        if self._sharded:
            reset_moments(zero.optimizer, zero.fp32_partitioned_groups_flat, step, averaged)
        else:
            reset_moments(zero.optimizer, zero.single_partition_of_fp32_groups, step, averaged)
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not self._sharded:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # The full setter of stage 3 overruns a tensor whose size is no multiple of the ranks: partitions are padded.
        size = _partition(parameter).numel()
        padded = F.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
        safe_set_local_optimizer_state(parameter, padded[rank() * size : (rank() + 1) * size], key)


def _partition(parameter: nn.Parameter) -> Tensor:
    """This rank's padded part of a parameter, under stage 3."""
    return parameter.ds_tensor.data  # type: ignore[attr-defined]
