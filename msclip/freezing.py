"""Encoders, or their first layers, that stay as they are while the rest learns.

Frozen is what an encoder needs for its output to stay the same, so a shared part freezes with either modality, and BatchNorm
goes on using the statistics it has.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from msclip.parallel import Beside
from msclip.sharing import Modality, Paired
from msclip.towers.modified_resnet import ModifiedResNet

if TYPE_CHECKING:
    from msclip.model import Model


def freeze(model: "Model") -> list[nn.Module]:
    """Turns learning off where `config.freeze_image` and `config.freeze_text` say; returns the BatchNorms it concerns."""
    norms: list[nn.Module] = []
    frozen = [modality for modality, count in model.config.freezes.items() if count != 0]
    for modality in frozen:
        for module in _frozen(model, modality):
            module.requires_grad_(False)
            norms += [part for part in module.modules() if isinstance(part, _BatchNorm)]
    return norms


def _frozen(model: "Model", modality: Modality) -> Iterator[nn.Module]:
    config, count = model.config, model.config.freezes[modality]
    tower = model.resnet if modality == "image" else model.cbow
    if tower is not None:
        yield from tower.first(count) if isinstance(tower, ModifiedResNet) and count is not None else [tower]
        return
    yield model.image_input if modality == "image" else model.text_input
    depth = config.depth if count is None else count
    for block in model.blocks[:depth]:
        yield from _serving(block, modality)
    if modality == "image" and model.branch is not None:
        fused = sum(layer < depth for layer in config.branch_layers)
        yield from (*model.branch.stages[:fused], *model.branch.adapters[:fused])
    if count is None:
        for part in (model.pooled, model.final_norm, model.projection):
            yield from _serving(part, modality)


def _serving(module: nn.Module, modality: Modality) -> Iterator[nn.Module]:
    """The modules inside that see this modality's tokens."""
    for part in module.modules():
        if isinstance(part, Paired | Beside):
            names = ("shared", modality)
            yield from (child for name, child in part.named_children() if name in names)
