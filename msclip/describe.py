"""`python -m msclip.describe NAME|PATH`: what a model costs, before anything of its size is allocated.

Multiply-adds are counted by torch's FlopCounterMode on the meta device (it counts each twice), captions at their full context;
activations are the tensors that autograd keeps. Both come from the model's own forward pass, so they cannot drift from it.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from msclip.branch import PatchSum
from msclip.checkpoint import read
from msclip.config import ModelConfig
from msclip.errors import UserError
from msclip.model import Model, build
from msclip.presets import list_models, preset
from msclip.tokens import PackedText, Tokens, pack

WEIGHT_BYTES, LEARNING_BYTES, AVERAGE_BYTES = 4, 12, 4
"""A parameter in float32; for one that is learned also its gradient and AdamW's two moments, and its moving average if any."""
OWNERS = {
    "shared": "shared",
    **dict.fromkeys(("image", "image_input", "resnet", "branch"), "image"),
    **dict.fromkeys(("text", "text_input", "cbow"), "text"),
}
"""Whom a parameter serves, by the one part of its name that says it."""


@dataclass(frozen=True)
class Costs:
    """Counts of one model; bytes are those of float32."""

    config: ModelConfig
    shared: int
    """Parameters that serve both modalities."""
    image: int
    """Parameters of images alone."""
    text: int
    """Parameters of captions alone."""
    total: int
    """All, each once, temperature and bias included."""
    learned: int
    """Those that are not frozen."""
    image_multiply_adds: int
    text_multiply_adds: int
    """Of a caption of full length."""
    image_tokens: int
    activation_bytes: int
    """What the backward pass of one batch needs; with layers computed again, where it needs most."""

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, optimiser and activations on one device without ZeRO."""
        return WEIGHT_BYTES * self.total + LEARNING_BYTES * self.learned + self.activation_bytes


def count_parameters(model: Model) -> dict[str, int]:
    """Numbers of parameters by whom they serve: `shared`, `image` and `text`; each once, temperature and bias left out."""
    counts = {"shared": 0, "image": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if not name.startswith("logit_"):
            (owner,) = {OWNERS[part] for part in name.split(".") if part in OWNERS}
            counts[owner] += parameter.numel()
    return counts


def measure(config: ModelConfig, batch: int = 1) -> Costs:
    """The costs of a model for batches of `batch` images and as many captions of full length."""
    model = build(config, device="meta").eval()
    images = torch.empty(batch, 3, config.image_size, config.image_size, device="meta")
    ids = torch.zeros(batch, config.context_length, dtype=torch.long)
    ids[:, -1] = 1  # the largest id ends a caption
    text = pack(ids).to("meta")
    counts = count_parameters(model)
    one_text = pack(ids[:1]).to("meta")
    return Costs(
        config,
        counts["shared"],
        counts["image"],
        counts["text"],
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        _multiply_adds(model, lambda: model.encode_image(images[:1])),
        _multiply_adds(model, lambda: model.encode_text(one_text)),
        (config.image_size // config.patch_size) ** 2 + 1,
        _activation_bytes(model, images, text),
    )


def _multiply_adds(model: Model, forward: Callable[[], Tensor]) -> int:
    sums = []
    # PatchSum is a depth-wise convolution written as a sum, which the counter does not know.
    hooks = [
        part.register_forward_pre_hook(lambda _, inputs: sums.append(inputs[0].numel()))
        for part in model.modules()
        if isinstance(part, PatchSum)
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    for hook in hooks:
        hook.remove()
    return int(counter.get_total_flops()) // 2 + sum(sums)


def _activation_bytes(model: Model, images: Tensor, text: PackedText) -> int:
    kept = _kept_bytes(model, images, text).total()
    if not model.config.checkpoint_blocks:
        return kept
    # What is inside a layer is computed again for one layer at a time, and stands beside what was kept of all of them.
    whole = build(replace(model.config, checkpoint_blocks=False), device="meta")
    return kept + max((count for call, count in _kept_bytes(whole, images, text).items() if call), default=0)


def _kept_bytes(model: Model, images: Tensor, text: PackedText) -> Counter[int]:
    """Bytes that autograd keeps for the backward pass, by the call of a layer (from 1) that they are inside of, 0 for none.

    Weights and buffers are left out, and a layer's input is outside of it.
    """
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}
    calls = inside = 0

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, (inside, storage))
        return tensor

    def enter(_: nn.Module, inputs: tuple[Tensor, Tokens]) -> None:
        nonlocal calls, inside
        inside = 0
        if inputs[0].requires_grad:
            keep(inputs[0])
        inside = calls = calls + 1

    def leave(*_: object) -> None:
        nonlocal inside
        inside = 0

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    model.train()
    for part in model.modules():
        if isinstance(part, _BatchNorm):
            part.eval()  # keeps as much, and takes a single number a channel: one image whose grid is one cell
    for block in model.blocks:
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = model(images, text)
    del features
    counts: Counter[int] = Counter()
    for key, (call, storage) in kept.items():
        counts[call] += 0 if key in own else storage.nbytes()
    return counts


def table(name: str, costs: Costs, batch: int) -> str:
    """The costs as lines of a table."""
    config = costs.config
    towers = f"{config.image_tower} and {config.text_tower}, {config.activation}, LayerNorm epsilon {config.norm_eps:g}"
    rows = [
        ("model", name),
        ("towers", towers),
        ("input", f"{config.image_size} x {config.image_size} pixels; captions of {config.context_length} tokens"),
        ("parameters", f"{costs.total:,}"),
        ("  shared by both", f"{costs.shared:,}"),
        ("  of images alone", f"{costs.image:,}"),
        ("  of captions alone", f"{costs.text:,}"),
        ("multiply-adds, an image", f"{costs.image_multiply_adds / 1e9:.2f} G"),
        ("multiply-adds, a caption", f"{costs.text_multiply_adds / 1e9:.2f} G"),
        ("tokens, an image", f"{costs.image_tokens:,}"),
        ("tokens, a caption", f"{config.context_length:,}"),
        ("memory, weights", f"{_size(WEIGHT_BYTES * costs.total)} in float32"),
        (f"memory, training, batch {batch:,}", f"about {_size(costs.training_bytes)} in float32 on one device, without ZeRO"),
        ("  with optim.ema_decay", f"about {_size(AVERAGE_BYTES * costs.learned)} more"),
        ("  of it activations", f"about {_size(costs.activation_bytes)}; half of it in bfloat16"),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _config(name: str, overrides: Mapping[str, Any]) -> ModelConfig:
    if name in list_models():
        return preset(name, **overrides)
    if "://" in name or Path(name).exists():
        return read(name, overrides).model.config
    raise UserError(f"{name!r} is neither a file or folder nor a model's name; names are {', '.join(list_models())}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m msclip.describe", description="What a model costs, as a table.")
    parser.add_argument("model", metavar="NAME|PATH", help="a model's name, or a file, folder or URL in any layout")
    parser.add_argument("--batch", type=int, default=256, help="images, and as many captions, on one device (default: 256)")
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), help="of a lone file that does not tell it")
    arguments = parser.parse_args(argv)
    overrides = {"activation": arguments.activation} if arguments.activation else {}
    try:
        if arguments.batch < 1:
            raise UserError(f"--batch must be at least 1, got {arguments.batch}")
        print(table(arguments.model, measure(_config(arguments.model, overrides), arguments.batch), arguments.batch))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
