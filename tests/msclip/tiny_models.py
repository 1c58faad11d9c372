"""Tiny models with weights that no two tensors share by chance, for the tests of layouts."""

from typing import Any

import torch

import msclip
from msclip.data.tokenizer import Tokenizer
from msclip.sharing import SEPARATE

SIZES: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 16,
    "width": 64,
    "layers": 3,
    "num_heads": 1,
    "text_width": 64,
    "text_layers": 3,
    "text_heads": 1,
    "embed_dim": 48,
    "vocab_size": 600,
    "context_length": 16,
    "stem": False,
    "branch_layers": (),
    "sharing": SEPARATE,
    "norm_eps": 1e-5,
}
RESNET: dict[str, Any] = {
    **SIZES,
    "image_tower": "modified_resnet",
    "image_size": 64,
    "patch_size": 32,
    "resnet_blocks": (1, 2, 1, 1),
    "width": 4,
    "layers": 0,
    "num_heads": 2,
}


def tiny(**changes: Any) -> msclip.Model:
    """A plain CLIP of three layers, with other settings on demand; in evaluation mode."""
    torch.manual_seed(0)
    model = msclip.build(msclip.ModelConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point() and name != "logit_scale":
                tensor.add_(0.1 * torch.randn_like(tensor))
    return model.eval()


def tokenizer() -> Tokenizer:
    """A tokenizer with fewer tokens than the tiny models know."""
    return Tokenizer.train(["a dog runs after a red ball", "two birds fly over the water"] * 3, 560, context_length=16)


def equal(a: msclip.Model, b: msclip.Model) -> bool:
    """Whether two models hold the same tensors, to the last bit."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
