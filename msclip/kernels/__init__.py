"""Triton kernels for what PyTorch has no fast operator for; each equals a plain function that stands where it is called."""

import os
import shutil
from importlib.util import find_spec

import torch

BUILDABLE = find_spec("triton") is not None and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
"""Whether there is Triton, which comes with PyTorch for GPUs, and the C compiler that it starts kernels with."""


def usable(device: torch.device) -> bool:
    """Whether kernels run on this device: a GPU from Ampere on."""
    return BUILDABLE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
