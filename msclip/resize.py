"""Trained weights in a model of other input sizes: positional tables are interpolated, everything else is taken over."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from msclip.model import Model, build


def resize_grid(table: Float[Tensor, "cells+1 width"], side: int) -> Float[Tensor, "newcells+1 width"]:
    """Positions of a square grid of another side, bicubic and antialiased; the class token's, in front, is kept."""
    old = round((len(table) - 1) ** 0.5)
    if old == side:
        return table
    grid = table[1:].float().T.unflatten(1, (old, old))  # (width, old, old)
    grid = F.interpolate(grid[None], (side, side), mode="bicubic", antialias=True)[0]
    return torch.cat([table[:1], grid.flatten(1).T.to(table.dtype)])


def resize_line(table: Float[Tensor, "length width"], length: int) -> Float[Tensor, "newlength width"]:
    """Positions of captions of another greatest length, linear."""
    if len(table) == length:
        return table
    return F.interpolate(table.float().T[None], length, mode="linear")[0].T.to(table.dtype).contiguous()


def resize_positions(model: Model, image_size: int | None = None, context_length: int | None = None) -> Model:
    """A model of other input sizes with the same weights, its positional tables interpolated; `model` stays as it is.

    Raises:
        UserError: the model cannot have such a size.
    """
    config = replace(
        model.config,
        image_size=image_size or model.config.image_size,
        context_length=context_length or model.config.context_length,
    )
    side = config.image_size // config.patch_size
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in ("image_input.positional_embedding", "resnet.pool.positional_embedding"):
        if name in state:
            state[name] = resize_grid(state[name], side)
    if (name := "text_input.positional_embedding") in state:
        state[name] = resize_line(state[name], config.context_length)
    resized = build(config, device="meta")
    resized.load_state_dict(state, assign=True)
    return resized.train(model.training)
