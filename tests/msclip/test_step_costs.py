"""What a training step costs, counted and not timed: a change that makes it dearer has to say so here.

Operations and bytes are those of the tiny preset on the CPU. The GPU's are others, but what doubles one mostly doubles both.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import msclip
from msclip.engine import Engine, MicroBatch, create_engine
from msclip.optim import OptimConfig
from msclip.tokens import pack

PAIRS = 8


class Costs(NamedTuple):
    """Of one optimiser step."""

    flops: int
    """Of matrix products, convolutions and attention, forward and backward; torch's counter has a multiply-add for two."""
    mebibytes: float
    """Read and written by all operators that are no views."""
    operators: int
    """How many of them."""


class Traffic(TorchDispatchMode):
    """Counts operators, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        returned = [value.alias_info for value in func._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in returned):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.operators += 1
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def step(name: str, **overrides: Any) -> tuple[Engine, list[MicroBatch]]:
    """An engine after one step, and a batch with captions of 4 to 11 tokens."""
    torch.manual_seed(0)
    model = msclip.create_model(name, **overrides)
    config = model.config
    engine = create_engine(
        model,
        OptimConfig(warmup_steps=0),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        total_steps=9,
        micro_batch_size=PAIRS,
        device="cpu",
    )
    ids = torch.zeros(PAIRS, config.context_length, dtype=torch.long)
    for i in range(PAIRS):
        ids[i, : 4 + i] = 5
        ids[i, 3 + i] = config.vocab_size - 1
    pixels = torch.randint(256, (PAIRS, config.image_size, config.image_size, 3), dtype=torch.uint8)
    batch = [MicroBatch(pixels, pack(ids))]
    engine.train_step(batch)
    return engine, batch


def costs(name: str, **overrides: Any) -> Costs:
    engine, batch = step(name, **overrides)
    with FlopCounterMode(display=False) as counter:
        engine.train_step(batch)
    with Traffic() as traffic:
        engine.train_step(batch)
    return Costs(int(counter.get_total_flops()), traffic.bytes / 2**20, traffic.operators)


@pytest.mark.parametrize(
    ("overrides", "known"),
    [
        ({}, Costs(216_023_040, 101.4, 3008)),
        ({"stem": False, "branch_layers": ()}, Costs(202_334_208, 102.5, 1652)),
    ],
    ids=["ms_clip_s", "ms_clip"],
)
def test_a_step_is_no_dearer_than_it_was(overrides: dict[str, Any], known: Costs) -> None:
    now = costs("ms_clip_s_tiny", **overrides)
    assert now.flops == known.flops
    # Versions of PyTorch differ in how a backward pass is cut into operators.
    assert now.mebibytes < 1.03 * known.mebibytes
    assert now.operators < 1.03 * known.operators


def test_a_longer_context_costs_nothing_but_its_table() -> None:
    short, long = costs("ms_clip_s_tiny"), costs("ms_clip_s_tiny", context_length=64)
    assert long.flops == short.flops
    table = 48 * 64 * 4 / 2**20
    assert long.mebibytes - short.mebibytes < 40 * table  # AdamW, its gradient, and the check that it is finite


def test_sharing_saves_no_arithmetic_but_traffic() -> None:
    shared = costs("ms_clip_s_tiny")
    apart = costs("ms_clip_s_tiny", sharing={"layers": "none", "attn": False, "ffn": False})
    assert shared.flops == apart.flops
    assert shared.mebibytes < 0.95 * apart.mebibytes
    assert shared.operators < apart.operators
