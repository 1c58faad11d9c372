"""A weighted sum over the patches of a map, each channel by itself, in one pass over a map that lies channels last.

y[b, i, j, c] = sum over u, v of x[b, i k + u, j k + v, c] w[c, u, v]: a depth-wise convolution whose kernel is its stride. A
row of a patch is then k * channels numbers in a row of memory.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 4096
"""Partial sums of the weights' gradient: enough to fill a GPU, few enough to add up at once."""


@triton.jit
def _forward(x, weight, out, side, K: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr):
    patch = tl.program_id(0).to(tl.int64)  # (image, i, j)
    v, c = tl.arange(0, K)[:, None], tl.arange(0, LANES)[None, :]
    inside = (c < CHANNELS) & (v < K)
    at = v * CHANNELS + c
    # One row of a patch after another; the next is a row of the map further on.
    first = (patch // side) * (K * side * K * CHANNELS) + (patch % side) * (K * CHANNELS)
    total = tl.zeros((K, LANES), tl.float32)
    for u in range(K):
        row = tl.load(x + first + u * (side * K * CHANNELS) + at, inside, 0.0).to(tl.float32)
        total += row * tl.load(weight + u * (K * CHANNELS) + at, inside, 0.0).to(tl.float32)
    channel = tl.arange(0, LANES)
    tl.store(out + patch * CHANNELS + channel, tl.sum(total, 0).to(out.dtype.element_ty), channel < CHANNELS)


@triton.jit
def _weight_gradient(
    x, gradient, partial, patches, each, side, K: tl.constexpr, CHANNELS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    u, part = tl.program_id(0), tl.program_id(1)
    v, c = tl.arange(0, K)[:, None], tl.arange(0, LANES)[None, :]
    inside = (c < CHANNELS) & (v < K)
    at = v * CHANNELS + c
    channel = tl.arange(0, LANES)
    total = tl.zeros((K, LANES), tl.float32)
    first = part.to(tl.int64) * each
    for patch in range(first, min(first + each, patches)):
        base = (patch // side) * (K * side * K * CHANNELS) + (patch % side) * (K * CHANNELS) + u * (side * K * CHANNELS)
        row = tl.load(x + base + at, inside, 0.0).to(tl.float32)
        back = tl.load(gradient + patch * CHANNELS + channel, channel < CHANNELS, 0.0).to(tl.float32)
        total += row * back[None, :]
    tl.store(partial + (part * K + u) * (K * CHANNELS) + at, total, inside)


def _rows(x: Tensor) -> Tensor:
    """A (images, channels, size, size) map as (images, size, size, channels) in memory; a copy if it lies otherwise."""
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("msclip::patch_sum", mutates_args=())
def patch_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Of x, (images, channels, side * k, side * k), and weight, (k, k, channels), the sums, (images, side, side, channels).

    k is a power of two. Sums are float32, the result is of x's type.
    """
    k, channels = weight.shape[0], weight.shape[2]
    x, side = _rows(x), x.shape[-1] // k
    out = x.new_empty(x.shape[0], side, side, channels)
    lanes = triton.next_power_of_2(channels)
    grid, weight = (x.shape[0] * side * side,), weight.contiguous()
    with torch.cuda.device_of(x):  # Triton starts kernels on the current GPU, wherever the tensors are
        _forward[grid](x, weight, out, side, K=k, CHANNELS=channels, LANES=lanes, num_warps=4)
    return out


@patch_sum.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    side = x.shape[-1] // weight.shape[0]
    return x.new_empty(x.shape[0], side, side, weight.shape[2])


@torch.library.custom_op("msclip::patch_sum_weight_gradient", mutates_args=())
def patch_sum_weight_gradient(gradient: Tensor, x: Tensor, k: int) -> Tensor:
    """The gradient of the weight, (k, k, channels) in float32."""
    x, side, channels = _rows(x), x.shape[-1] // k, x.shape[1]
    patches = gradient.numel() // channels
    each = triton.cdiv(patches * k, PROGRAMS)
    parts = triton.cdiv(patches, each)
    partial = x.new_empty(parts, k, k, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        _weight_gradient[(k, parts)](
            x, gradient.contiguous(), partial, patches, each, side,
            K=k, CHANNELS=channels, LANES=triton.next_power_of_2(channels), num_warps=4,
        )  # fmt: skip
    return partial.sum(0)


@patch_sum_weight_gradient.register_fake
def _(gradient: Tensor, x: Tensor, k: int) -> Tensor:
    return x.new_empty(k, k, x.shape[1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = ctx.saved_tensors
    k, side = weight.shape[0], gradient.shape[1]
    # Of plain operators, which a compiler fuses with what comes before in the backward pass.
    spread = gradient[:, :, None, :, None] * weight[None, None, :, None].to(gradient.dtype)  # (images, i, u, j, v, channels)
    to_x = spread.reshape(len(x), side * k, side * k, -1).permute(0, 3, 1, 2)
    return to_x, patch_sum_weight_gradient(gradient, x, k).to(weight.dtype)


patch_sum.register_autograd(_gradient, setup_context=_setup)
