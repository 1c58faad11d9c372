"""A residual and the LayerNorm after it over the joint stream, image rows by one pair of weights and caption rows by another.

Two LayerNorms over parts of a matrix are two small passes to PyTorch, then a copy that joins them; backward, each part's
gradient is first spread over the whole matrix, and the two are added to the residual's. Here the rows are read once and written
once in either direction. A row's statistics cost nothing beside its traffic, so they are computed twice rather than kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048
"""Of a tile, which is as many whole rows as that makes."""
NUMBERS_A_WARP = 1024
"""With more a thread's registers overflow; with fewer, warps wait for each other."""
PROGRAMS = 528
"""Partial sums of the weights' gradients: enough to fill a GPU, few enough to add up at once."""


@triton.jit
def _standardised(total, inside, eps, WIDTH: tl.constexpr):
    """Rows with mean 0 and variance 1, zero where not `inside`, and what they were divided by, inverted."""
    centred = tl.where(inside, total - (tl.sum(total, 1) / WIDTH)[:, None], 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    return centred * scale[:, None], scale


@triton.jit(do_not_specialize=["split", "rows", "image_tiles"])
def _forward(
    x, delta, total, normed, image_weight, image_bias, text_weight, text_bias, split, rows, image_tiles, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.arange(0, LANES)
    if part < image_tiles:
        row, end = part * TILE + tl.arange(0, TILE), split
        weight, bias = tl.load(image_weight + lane, lane < WIDTH, 0.0), tl.load(image_bias + lane, lane < WIDTH, 0.0)
    else:
        row, end = split + (part - image_tiles) * TILE + tl.arange(0, TILE), rows
        weight, bias = tl.load(text_weight + lane, lane < WIDTH, 0.0), tl.load(text_bias + lane, lane < WIDTH, 0.0)
    inside = (row < end)[:, None] & (lane < WIDTH)[None, :]
    at = row.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADDED:
        value += tl.load(delta + at, inside, 0.0).to(tl.float32)
    value = value.to(total.dtype.element_ty)
    tl.store(total + at, value, inside)
    standard, _ = _standardised(value.to(tl.float32), inside, eps, WIDTH)
    tl.store(normed + at, (standard * weight[None, :] + bias[None, :]).to(normed.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["split", "rows", "image_parts", "each"])
def _backward(
    total, to_total, to_normed, image_weight, text_weight, to_x, to_delta, partial, split, rows, image_parts, each, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    part, lane = tl.program_id(0), tl.arange(0, LANES)
    if part < image_parts:
        first, limit = part * each, split
        weight = tl.load(image_weight + lane, lane < WIDTH, 0.0).to(tl.float32)
    else:
        first, limit = split + (part - image_parts) * each, rows
        weight = tl.load(text_weight + lane, lane < WIDTH, 0.0).to(tl.float32)
    end = tl.minimum(first + each, limit)
    to_weight, to_bias = tl.zeros((TILE, LANES), tl.float32), tl.zeros((TILE, LANES), tl.float32)
    for start in range(first, end, TILE):
        row = start + tl.arange(0, TILE)
        inside = (row < end)[:, None] & (lane < WIDTH)[None, :]
        at = row.to(tl.int64)[:, None] * WIDTH + lane[None, :]
        standard, scale = _standardised(tl.load(total + at, inside, 0.0).to(tl.float32), inside, eps, WIDTH)
        back = tl.load(to_normed + at, inside, 0.0).to(tl.float32)
        to_weight += back * standard
        to_bias += back
        back = back * weight[None, :]
        along, mean = tl.sum(back * standard, 1) / WIDTH, tl.sum(back, 1) / WIDTH
        back = (back - mean[:, None] - standard * along[:, None]) * scale[:, None]
        back += tl.load(to_total + at, inside, 0.0).to(tl.float32)
        tl.store(to_x + at, back.to(to_x.dtype.element_ty), inside)
        if TWICE:
            tl.store(to_delta + at, back.to(to_delta.dtype.element_ty), inside)
    place = partial + part * (2 * WIDTH) + lane
    tl.store(place, tl.sum(to_weight, 0), lane < WIDTH)
    tl.store(place + WIDTH, tl.sum(to_bias, 0), lane < WIDTH)


def _tile(width: int) -> dict[str, int]:
    lanes = triton.next_power_of_2(width)
    rows = max(1, NUMBERS // lanes)
    return {"WIDTH": width, "LANES": lanes, "TILE": rows, "num_warps": max(1, rows * lanes // NUMBERS_A_WARP)}


@torch.library.custom_op("msclip::add_norm", mutates_args=())
def add_norm(
    x: Tensor,
    delta: Tensor | None,
    image_weight: Tensor,
    image_bias: Tensor,
    text_weight: Tensor,
    text_bias: Tensor,
    split: int,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Of x and delta, (rows, width), the sum, and its LayerNorm in `dtype`.

    The first `split` rows are normalised with the image's weights, the others with the text's. Rows are at most
    `kernels.WIDEST` wide. Without `delta` the first result is a copy of x.
    """
    total, normed = _results(x, delta, dtype)
    x = x.contiguous()
    added = x if delta is None else delta.contiguous()
    tile = _tile(x.shape[1])
    image_tiles, text_tiles = triton.cdiv(split, tile["TILE"]), triton.cdiv(len(x) - split, tile["TILE"])
    weights = (image_weight, image_bias, text_weight, text_bias)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current GPU, wherever the tensors are
        _forward[(image_tiles + text_tiles,)](
            x, added, total, normed, *weights, split, len(x), image_tiles, eps, ADDED=delta is not None, **tile
        )
    return total, normed


def _results(x: Tensor, delta: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kind = x.dtype if delta is None else torch.promote_types(x.dtype, delta.dtype)
    return x.new_empty(x.shape, dtype=kind), x.new_empty(x.shape, dtype=dtype)


@add_norm.register_fake
def _(
    x: Tensor, delta: Tensor | None, iw: Tensor, ib: Tensor, tw: Tensor, tb: Tensor, split: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _results(x, delta, dtype)


@torch.library.custom_op("msclip::add_norm_backward", mutates_args=())
def _add_norm_backward(
    to_total: Tensor,
    to_normed: Tensor,
    total: Tensor,
    image_weight: Tensor,
    text_weight: Tensor,
    split: int,
    eps: float,
    delta_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of delta where its type is another (else nothing), and of the weights and biases, (4, width)."""
    to_x, to_delta = torch.empty_like(total), total.new_empty(_second(total, delta_dtype), dtype=delta_dtype)
    rows, width = total.shape
    tile = _tile(width)
    each = triton.cdiv(rows, PROGRAMS * tile["TILE"]) * tile["TILE"]
    image_parts, text_parts = triton.cdiv(split, each), triton.cdiv(rows - split, each)
    partial = total.new_empty(image_parts + text_parts, 2, width, dtype=torch.float32)
    with torch.cuda.device_of(total):
        _backward[(image_parts + text_parts,)](
            total, to_total.contiguous(), to_normed.contiguous(), image_weight, text_weight, to_x, to_delta, partial,
            split, rows, image_parts, each, eps, TWICE=delta_dtype != total.dtype, **tile,
        )  # fmt: skip
    return to_x, to_delta, torch.cat([partial[:image_parts].sum(0), partial[image_parts:].sum(0)])


def _second(total: Tensor, delta_dtype: torch.dtype) -> tuple[int, ...]:
    return tuple(total.shape) if delta_dtype != total.dtype else (0,)


@_add_norm_backward.register_fake
def _(
    to_total: Tensor, to_normed: Tensor, total: Tensor, iw: Tensor, tw: Tensor, split: int, eps: float, delta_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    to_delta = total.new_empty(_second(total, delta_dtype), dtype=delta_dtype)
    return torch.empty_like(total), to_delta, total.new_empty(4, total.shape[1], dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, delta, image_weight, _, text_weight, _, ctx.split, ctx.eps, _ = inputs
    ctx.x_dtype, ctx.delta_dtype = x.dtype, None if delta is None else delta.dtype
    ctx.save_for_backward(output[0], image_weight, text_weight)


def _gradient(ctx: Any, to_total: Tensor, to_normed: Tensor) -> tuple[Tensor | None, ...]:
    total, image_weight, text_weight = ctx.saved_tensors
    kind = ctx.delta_dtype or total.dtype
    to_x, to_delta, rest = _add_norm_backward(to_total, to_normed, total, image_weight, text_weight, ctx.split, ctx.eps, kind)
    if kind == total.dtype:
        to_delta = to_x
    weights = (gradient.to(image_weight.dtype) for gradient in rest.unbind(0))
    return to_x.to(ctx.x_dtype), None if ctx.delta_dtype is None else to_delta, *weights, None, None, None


add_norm.register_autograd(_gradient, setup_context=_setup)
