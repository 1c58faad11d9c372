"""The few collective operations of training; with one process, or without a process group, each is the identity.

`gather_with_grad` carries gradients: the backward of an all-gather is a reduce-scatter that sums. The official MS-CLIP gathers
without gradients and puts the live tensor back in its own slot, which divides the encoders' gradient by the number of ranks.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from msclip.timing import measured

# torch 2.13 renamed the two tensor collectives and warns about the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def world_size() -> int:
    """Number of training processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which training process this is, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty((world_size() * x.shape[0], *x.shape[1:]))
        with measured("communication", x.device):
            _all_gather(gathered, x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.new_empty((gradient.shape[0] // world_size(), *gradient.shape[1:]))
        with measured("communication", gradient.device):
            _reduce_scatter(own, gradient.contiguous())
        return own


def gather_with_grad(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "all_rows dim"]:
    """Rows of all ranks in rank order; every rank must hold the same number of rows.

    The gradient of a rank's rows is the sum of what all ranks' losses send them.
    """
    return x if world_size() == 1 else _Gather.apply(x)


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which batches travel to a GPU, beside its work."""
    return torch.cuda.Stream(device)


def all_gather_objects(value: Any) -> list[Any]:
    """One picklable value from every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def first_ranks_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank; between the hosts, so a GPU is not waited for."""
    if world_size() == 1:
        return flag
    value = torch.tensor(int(flag))
    with measured("communication", value.device):
        dist.all_reduce(value, dist.ReduceOp.MAX, group=_host_group(dist.group.WORLD))
    return bool(value)


@lru_cache(maxsize=1)
def _host_group(world: Any) -> Any:
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


@torch.no_grad()
def mean_over_ranks(values: Tensor) -> Tensor:
    """Elementwise mean of a floating-point tensor over the ranks; not differentiable, does not wait for the device."""
    if world_size() == 1:
        return values
    total = values.clone()
    with measured("communication", values.device):
        dist.all_reduce(total)
    return total / world_size()


@torch.no_grad()
def copy_from_first_rank(values: Tensor) -> Tensor:
    """Overwrites `values` with rank 0's and returns it."""
    if world_size() > 1:
        dist.broadcast(values, src=0)
    return values
