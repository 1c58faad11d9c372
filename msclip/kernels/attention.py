"""Self-attention over thousands of short sequences, the images and captions of a batch, where each fits one tile.

FlashAttention (arXiv 2205.14135) streams keys past queries because a long sequence does not fit on the chip. The keys and
values of an image of 50 tokens or a caption of 18 do, so one program takes one head of one sequence: the backward pass needs
neither stored statistics nor atomics nor a second sweep, and both passes read and write the rows of the joint stream where
they lie, queries, keys and values side by side as the projection left them. For the backward pass that projection alone is
saved. Longer images go through cuDNN, between the same rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from msclip.kernels import LONGEST

# A tile of 256 tokens would overflow the registers: the kernel was eight times slower.
WARPS = {32: 2, 64: 4, LONGEST: 8}
"""By the tokens of a tile."""
LOG2_E = 1.4426950408889634
QUERIES = 64
"""Rows of scores that a program holds at a time."""


@triton.jit
def _sequence(offsets, first_row, length, num_heads, PACKED: tl.constexpr):
    """Of this program: its sequence's first row, its length, and its head."""
    sequence, head = tl.program_id(0) // num_heads, tl.program_id(0) % num_heads
    if PACKED:
        start = tl.load(offsets + sequence)
        length = tl.load(offsets + sequence + 1) - start
        row = first_row + start.to(tl.int64)
    else:
        row = first_row + sequence.to(tl.int64) * length
    return row, length, head


@triton.jit
def _probabilities(q, k, log2_scale, query, key, length, CAUSAL: tl.constexpr):
    """Softmax of the scores, (queries, keys) in float32."""
    scores = tl.dot(q, tl.trans(k)) * log2_scale
    seen = (key < length)[None, :]
    if CAUSAL:
        seen = seen & (key[None, :] <= query[:, None])
    scores = tl.where(seen, scores, float("-inf"))
    weights = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _forward(
    qkv, mixed, offsets, first_row, length, num_heads, log2_scale,
    SHORTEST: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    row, length, head = _sequence(offsets, first_row, length, num_heads, PACKED)
    if (length > TILE) | (length < SHORTEST):
        return
    channel, width = tl.arange(0, HEAD)[None, :], num_heads * HEAD
    key = tl.arange(0, TILE)
    keys = qkv + row * (3 * width) + head * HEAD + key[:, None] * (3 * width) + channel
    k = tl.load(keys + width, (key < length)[:, None], 0.0)
    v = tl.load(keys + 2 * width, (key < length)[:, None], 0.0)
    for first in tl.static_range(0, TILE, QUERIES):
        query = first + tl.arange(0, QUERIES)
        inside = (query < length)[:, None]
        q = tl.load(qkv + row * (3 * width) + head * HEAD + query[:, None] * (3 * width) + channel, inside, 0.0)
        p = _probabilities(q, k, log2_scale, query, key, length, CAUSAL)
        out = mixed + row * width + head * HEAD + query[:, None] * width + channel
        tl.store(out, tl.dot(p.to(v.dtype), v).to(v.dtype), inside)


@triton.jit
def _backward(
    qkv, gradient, to_qkv, offsets, first_row, length, num_heads, log2_scale, scale,
    SHORTEST: tl.constexpr, TILE: tl.constexpr, QUERIES: tl.constexpr, HEAD: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    row, length, head = _sequence(offsets, first_row, length, num_heads, PACKED)
    if (length > TILE) | (length < SHORTEST):
        return
    channel, width = tl.arange(0, HEAD)[None, :], num_heads * HEAD
    place = row * (3 * width) + head * HEAD
    key = tl.arange(0, TILE)
    keys = place + key[:, None] * (3 * width) + channel
    k = tl.load(qkv + width + keys, (key < length)[:, None], 0.0)
    v = tl.load(qkv + 2 * width + keys, (key < length)[:, None], 0.0)
    to_k, to_v = tl.zeros((TILE, HEAD), tl.float32), tl.zeros((TILE, HEAD), tl.float32)
    for first in tl.static_range(0, TILE, QUERIES):
        query = first + tl.arange(0, QUERIES)
        inside = (query < length)[:, None]
        queries = place + query[:, None] * (3 * width) + channel
        q = tl.load(qkv + queries, inside, 0.0)
        back = tl.load(gradient + row * width + head * HEAD + query[:, None] * width + channel, inside, 0.0)
        p = _probabilities(q, k, log2_scale, query, key, length, CAUSAL)
        to_v += tl.dot(tl.trans(p.to(back.dtype)), back)  # rows beyond the sequence add nothing: their `back` is zero
        to_p = tl.dot(back, tl.trans(v))
        to_scores = (p * (to_p - tl.sum(p * to_p, 1)[:, None]) * scale).to(q.dtype)
        tl.store(to_qkv + queries, tl.dot(to_scores, k).to(q.dtype), inside)
        to_k += tl.dot(tl.trans(to_scores), q)
    tl.store(to_qkv + width + keys, to_k.to(k.dtype), (key < length)[:, None])
    tl.store(to_qkv + 2 * width + keys, to_v.to(v.dtype), (key < length)[:, None])


class Shape(NamedTuple):
    """What both passes are told about the rows."""

    offsets: Tensor
    images: int
    grid: int
    context: int
    num_heads: int
    causal: bool


def _launch(kernel: Any, tensors: tuple[Tensor, ...], numbers: tuple[float, ...], head: int, shape: Shape) -> None:
    """Runs a kernel over the images, then over the captions by length: programs of the other lengths end at once."""
    first_caption, captions = shape.images * shape.grid, len(shape.offsets) - 1

    def run(sequences: int, first_row: int, shortest: int, tile: int, causal: bool, packed: bool) -> None:
        with torch.cuda.device_of(tensors[0]):  # Triton starts kernels on the current GPU, wherever the tensors are
            kernel[(sequences * shape.num_heads,)](
                *tensors, shape.offsets, first_row, shape.grid, shape.num_heads, *numbers, SHORTEST=shortest, TILE=tile,
                QUERIES=min(tile, QUERIES), HEAD=head, CAUSAL=causal, PACKED=packed, num_warps=WARPS[tile],
            )  # fmt: skip

    if shape.images and shape.grid <= LONGEST:
        run(shape.images, 0, 1, max(32, triton.next_power_of_2(shape.grid)), causal=False, packed=False)
    shortest, tile = 1, 32
    while captions and shortest <= shape.context:
        run(captions, first_caption, shortest, tile, causal=shape.causal, packed=True)
        shortest, tile = tile + 1, 2 * tile


def joint_attention(
    qkv: Float[Tensor, "rows three_width"],
    offsets: Int[Tensor, "captions_1"],
    images: int,
    grid: int,
    context: int,
    num_heads: int,
    causal: bool,
) -> Float[Tensor, "rows width"]:
    """Every image's tokens see each other, and every caption's tokens those before them, or, if not `causal`, each other.

    The first images * grid rows are images; caption i is offsets[i] to offsets[i + 1] of the rest (int32), and no caption is
    longer than `context`, at most `LONGEST`; with longer images the GPU has to be a Hopper or newer. bf16 or fp16; a head has a
    power of two channels, at least 16.
    """
    return _attention(qkv, offsets, images, grid, context, num_heads, causal)[0]


@torch.library.custom_op("msclip::joint_attention", mutates_args=())
def _attention(
    qkv: Tensor, offsets: Tensor, images: int, grid: int, context: int, num_heads: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The result, and of long images what cuDNN wants back: the scores' logarithmic sums, and a seed and its offset."""
    width = qkv.shape[1] // 3
    head = width // num_heads
    mixed, nothing = qkv.new_empty(qkv.shape[0], width), qkv.new_empty(0)
    shape = Shape(offsets, images, grid, context, num_heads, causal)
    _launch(_forward, (qkv.contiguous(), mixed), (LOG2_E * head**-0.5,), head, shape)
    if grid <= LONGEST:
        return mixed, nothing, nothing.clone(), nothing.clone()
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*_dense(qkv, 3, shape), None, True)
    _dense(mixed, 1, shape)[0].copy_(found[0])
    return mixed, found[1], found[6], found[7]


def _dense(rows: Tensor, parts: int, shape: Shape) -> list[Tensor]:
    """The images of queries, keys and values (3 parts), or of anything in their places: each (images, heads, grid, head)."""
    dense = rows[: shape.images * shape.grid].view(shape.images, shape.grid, parts, shape.num_heads, -1)
    return [part.transpose(1, 2) for part in dense.unbind(2)]


@_attention.register_fake
def _(
    qkv: Tensor, offsets: Tensor, images: int, grid: int, context: int, num_heads: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mixed = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)
    if grid <= LONGEST:
        return mixed, qkv.new_empty(0), qkv.new_empty(0), qkv.new_empty(0)
    shape = Shape(offsets, images, grid, context, num_heads, causal)
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(*_dense(qkv, 3, shape), None, True)
    return mixed, found[1], found[6], found[7]


@torch.library.custom_op("msclip::joint_attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    offsets: Tensor,
    mixed: Tensor,
    sums: Tensor,
    seed: Tensor,
    seed_offset: Tensor,
    images: int,
    grid: int,
    context: int,
    num_heads: int,
    causal: bool,
) -> Tensor:
    """What `gradient`, of the result, is for `qkv`."""
    head = qkv.shape[1] // 3 // num_heads
    to_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    shape = Shape(offsets, images, grid, context, num_heads, causal)
    tensors = (qkv.contiguous(), gradient.contiguous(), to_qkv)
    _launch(_backward, tensors, (LOG2_E * head**-0.5, head**-0.5), head, shape)
    if grid > LONGEST:
        (back,), (result,) = _dense(tensors[1], 1, shape), _dense(mixed, 1, shape)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            back, *_dense(qkv, 3, shape), result, sums, seed, seed_offset, None, None, None, grid, grid, 0.0, False
        )
        dense = to_qkv[: images * grid].view(images, grid, 3, num_heads, head)
        torch.stack([part.transpose(1, 2) for part in found], dim=2, out=dense)
    return to_qkv


@_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, offsets, *ctx.shape = inputs
    long = inputs[3] > LONGEST
    # Where nothing is to be remembered the result is not kept either.
    ctx.save_for_backward(qkv, offsets, *(output if long else (output[1], *output[1:])))


def _gradient(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return _attention_backward(gradient, *ctx.saved_tensors, *ctx.shape), *[None] * 6


_attention.register_autograd(_gradient, setup_context=_setup)
