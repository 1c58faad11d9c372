"""Triton's kernels against the plain functions they stand for, on Triton's interpreter; and what else is faster on a GPU.

Where PyTorch is a CPU build, as in CI, there is no Triton unless it is installed beside it.
"""

import copy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msclip
from msclip import kernels
from msclip.engine import MicroBatch, create_engine, read_metrics
from msclip.optim import OptimConfig
from msclip.stem import PatchEmbedding, window_product
from msclip.tokens import pack
from msclip.training import TrainingConfig

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed: it comes with PyTorch for GPUs")

ATTENTION = """
import torch
from msclip.kernels.attention import joint_attention
from msclip.layers import dense_attention, packed_attention
from msclip.tokens import pack

torch.manual_seed(0)
cases = [
    (3, 50, [1, 18, 77, 32, 33, 64, 65, 5], 2, 16, True),  # every tile, and the lengths at its edges
    (2, 128, [3, 4], 1, 32, False),  # captions that see all of themselves
    (0, 0, [7, 2], 2, 16, True),
    (2, 10, [], 2, 16, True),
]
for images, grid, lengths, heads, channels, causal in cases:
    ids = torch.zeros(len(lengths), 77, dtype=torch.long)
    for row, length in zip(ids, lengths):
        row[: length - 1], row[length - 1] = 1, 9
    text = pack(ids) if lengths else None
    offsets = text.offsets if text else torch.zeros(1, dtype=torch.int32)
    rows = images * grid + sum(lengths)
    qkv = torch.randn(rows, 3 * heads * channels).half().requires_grad_()
    mixed = joint_attention(qkv, offsets, images, grid, 77, heads, causal)
    gradient = torch.randn_like(mixed)
    mixed.backward(gradient)
    plain = qkv.detach().float().requires_grad_()
    parts = []
    if images:
        dense = plain[: images * grid].unflatten(0, (images, grid))
        parts.append(dense_attention(dense, heads).flatten(0, 1))
    if text:
        parts.append(packed_attention(plain[images * grid :], text, heads, causal))
    expected = torch.cat(parts)
    expected.backward(gradient.float())
    # Half precision keeps 11 bits: results of size 4 are rounded by up to 0.002.
    torch.testing.assert_close(mixed.float(), expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(qkv.grad.float(), plain.grad, rtol=1e-3, atol=4e-3)
"""

PATCH_SUM = """
import torch
from msclip.branch import PatchSum
from msclip.kernels.patch_sum import patch_sum

torch.manual_seed(0)
for images, channels, side, k in [(2, 3, 2, 4), (3, 6, 3, 2), (2, 5, 2, 1), (1, 48, 2, 16)]:
    module = PatchSum(channels, k)
    x = torch.randn(images, channels, side * k, side * k).to(memory_format=torch.channels_last).requires_grad_()
    expected = module(x)
    gradient = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, module.weight), gradient)
    y = patch_sum(x, module.weight.squeeze(1).permute(1, 2, 0)).permute(0, 3, 1, 2)
    found = torch.autograd.grad(y, (x, module.weight), gradient)
    for got, want in zip((y, *found), (expected, *wanted)):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
"""

NORM = """
import torch
from torch import nn
from msclip import kernels
from msclip.layers import add_norm, plain_add_norm
from msclip.sharing import Paired

torch.manual_seed(0)
cases = [
    (37, 21, 48, torch.float16, False),  # either part ends within a tile
    (9, 9, 768, torch.float32, False),
    (5, 0, 20, None, False),
    (1100, 700, 40, torch.float32, True),  # several programs; one pair of weights, whose gradients add up
    (3, 1, 4096, None, False),
]
for rows, split, width, delta_type, shared in cases:
    norm = Paired(lambda modality: nn.LayerNorm(width, eps=1e-12), shared)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    x = (torch.randn(rows, width) * 2 + 1).requires_grad_()
    delta = None if delta_type is None else torch.randn(rows, width).to(delta_type).requires_grad_()
    inputs = [tensor for tensor in (x, delta, *norm.parameters()) if tensor is not None]
    gradients = torch.randn(2, rows, width).unbind()
    kernels.usable = lambda device: True
    found = add_norm(x, delta, norm, split)
    expected = plain_add_norm(x, delta, norm, split)
    got = torch.autograd.grad(found, inputs, gradients, allow_unused=True, materialize_grads=True)
    want = torch.autograd.grad(expected, inputs, gradients, allow_unused=True, materialize_grads=True)
    for a, b in zip((*found, *got), (*expected, *want), strict=True):
        assert a.dtype == b.dtype
        rounding = {"rtol": 1e-3, "atol": 2e-3} if a.dtype == torch.float16 else {"rtol": 1e-5, "atol": 1e-4}
        torch.testing.assert_close(a, b, **rounding)
"""


@needs_triton
@pytest.mark.parametrize("script", [ATTENTION, PATCH_SUM, NORM], ids=["attention", "patch_sum", "norm"])
def test_a_kernel_equals_the_plain_function(script: str) -> None:
    # The interpreter has to be chosen before Triton is imported.
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("lacking", [None, "triton", "compiler", "headers"])
def test_kernels_are_built_where_triton_a_compiler_and_pythons_headers_are(
    lacking: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(kernels, "find_spec", lambda name: None if lacking == "triton" else name)
    monkeypatch.setattr(shutil, "which", lambda name: None if lacking == "compiler" else name)
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    if lacking != "headers":
        (tmp_path / "Python.h").touch()
    buildable = kernels._buildable()
    assert buildable == (lacking is None)
    monkeypatch.setattr(kernels, "BUILDABLE", buildable)
    wanted, cuda = TrainingConfig(compiled=True), torch.device("cuda")
    if lacking:
        assert not TrainingConfig().compiles(cuda)
        with pytest.raises(msclip.UserError, match="python3-dev"):
            wanted.compiles(cuda)
    else:
        assert wanted.compiles(cuda)


@pytest.mark.parametrize(("size", "stride", "images"), [(8, 2, 3), (9, 2, 1), (7, 1, 2)])
def test_the_matrix_product_of_windows_is_the_convolution(size: int, stride: int, images: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(images, 3, size, size)
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    expected = F.conv2d(x, weight, stride=stride, padding=1)
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = window_product(x.contiguous(memory_format=layout), weight, stride)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        (got,) = torch.autograd.grad(found.square().sum(), weight)
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_the_patch_embedding_is_the_convolution_that_its_weights_are_saved_as() -> None:
    torch.manual_seed(0)
    embedding, x = PatchEmbedding(6, 4), torch.randn(2, 3, 12, 12)
    expected = nn.Conv2d.forward(embedding, x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embedding(x), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Counts what torch.compile is given; it does all but generate code, which wants a GPU."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend=counter, fullgraph=True))
    torch._dynamo.reset()
    return counter


def test_the_compiled_parts_compute_the_same_and_are_compiled_once(counter: Any) -> None:
    torch.manual_seed(0)
    small: Any = {
        "width": 32,
        "text_width": 32,
        "num_heads": 2,
        "text_heads": 2,
        "layers": 3,
        "text_layers": 3,
        "embed_dim": 16,
    }
    plain = msclip.create_model("ms_clip_stem_b32", image_size=32, context_length=12, sharing={"layers": "last:2"}, **small)
    compiled = msclip.build(plain.config)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_parts()
    images, frames = torch.randn(3, 3, 32, 32), []
    for lengths in ([4, 7, 12], [3, 5, 11], [12, 2, 2], [1, 2, 1]):
        ids = torch.zeros(3, 12, dtype=torch.long)
        for row, length in zip(ids, lengths, strict=True):
            row[: length - 1], row[length - 1] = 1, 9
        results = []
        for model in (plain, compiled):
            model.zero_grad()
            image, text, _ = model(images, pack(ids))
            (image @ text.T).square().sum().backward()
            gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
            results.append((image.detach(), text.detach(), gradients))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    # The input, a layer of both kinds of tokens, a layer of text. Plain attention looks at the longest caption, once more each.
    assert frames[0] == 3
    assert frames[1] == frames[3] <= 5


def test_a_copy_of_a_model_compiled_by_units_has_weights_of_its_own(counter: Any) -> None:
    torch.manual_seed(0)
    model = msclip.create_model(
        "ms_clip_s_tiny", image_size=32, layers=2, text_layers=2, stem=False, branch_layers=(), sharing={"layers": "all"}
    )
    model.compile_parts(by_unit=True)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.01)
    plain = msclip.build(model.config)
    plain.load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(other.encode_image(images), plain.encode_image(images), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model.encode_image(images), other.encode_image(images), atol=1e-3)
    assert counter.frame_count


@pytest.fixture
def bans() -> Iterator[Callable[[], list[bool]]]:
    """PyTorch's settings that `save_memory` turns off; on again afterwards."""
    from torch._functorch import config

    names = [f"ban_recompute_{name}" for name in ("materialized_backward", "used_far_apart", "long_fusible_chains")]
    with config.patch(dict.fromkeys(names, True)):
        yield lambda: [getattr(config, name) for name in names]


def test_a_compiled_engine_trains_like_a_plain_one(counter: Any, bans: Callable[[], list[bool]]) -> None:
    assert all(bans())
    generator = torch.Generator().manual_seed(0)
    # The longest caption is the same in both parts: plain attention would be compiled again.
    ids = torch.tensor([[1, 5, 5, 9], [1, 9, 0, 0], [1, 5, 5, 9], [9, 0, 0, 0]])
    pixels = torch.randint(256, (4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    batch = [MicroBatch(pixels[rows], pack(ids[rows])) for rows in (slice(2), slice(2, 4))]
    observed = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = msclip.create_model(
            "ms_clip_s_tiny", image_size=32, layers=3, text_layers=3, branch_layers=(), checkpoint_blocks=True,
            sharing={"layers": "last:2"},
        )  # fmt: skip
        engine = create_engine(
            model, OptimConfig(warmup_steps=0, accumulation_steps=2), mean=(0.5,) * 3, std=(0.5,) * 3, total_steps=9,
            micro_batch_size=2, device="cpu", compiled=compiled, save_memory=compiled,
        )  # fmt: skip
        metrics = [read_metrics(engine.train_step(engine.prepare(batch))) for _ in range(2)]
        observed.append((metrics, engine.full_state()[0]))
    # Pixels, the input, and two kinds of layer, each with and without gradients.
    assert counter.frame_count == 2 * (1 + 1 + 2)
    assert not any(bans())
    torch.testing.assert_close(observed[1], observed[0], rtol=1e-4, atol=1e-5)


def test_memory_is_saved_only_of_a_compiled_model() -> None:
    with pytest.raises(msclip.UserError, match=r"training\.compiled must be true or null, got false"):
        TrainingConfig(save_memory=True, compiled=False)


def test_nothing_is_compiled_on_a_cpu_unless_asked_for_and_no_memory_saved() -> None:
    cpu = torch.device("cpu")
    assert not TrainingConfig().compiles(cpu)
    assert TrainingConfig(compiled=True).compiles(cpu)
    with pytest.raises(msclip.UserError, match=r"training\.save_memory .* on cpu"):
        create_engine(
            msclip.create_model("ms_clip_s_tiny"), OptimConfig(), mean=(0.5,) * 3, std=(0.5,) * 3, total_steps=9,
            micro_batch_size=2, device=cpu, save_memory=True,
        )  # fmt: skip


def test_all_kinds_of_layer_of_one_model_are_compiled(counter: Any) -> None:
    # Shared or not, frozen or not, of both encoders or of one: five, each with and without gradients for accumulation.
    sharing: Any = {"layers": "1,3"}
    model = msclip.create_model(
        "ms_clip_s_tiny", image_size=32, layers=4, text_layers=5, stem=False, branch_layers=(), sharing=sharing,
        freeze_image="first:2",
    )  # fmt: skip
    model.compile_parts()
    ids = torch.tensor([[1, 5, 9, 0], [1, 9, 0, 0]])
    for learning in (False, True):
        with torch.set_grad_enabled(learning):  # past PyTorch's limit, fullgraph makes an error of what is left as it is
            model(torch.randn(2, 3, 32, 32), pack(ids))
    assert counter.frame_count == 2 * (1 + 5)
