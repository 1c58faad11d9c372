"""Triton kernels for what PyTorch has no fast operator for; each equals a plain function that stands where it is called."""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch

LONGEST = 128
"""Tokens of the longest sequence that the attention kernel takes whole."""
WIDEST = 4096
"""Numbers of the widest row that the LayerNorm kernel takes whole."""


def _buildable() -> bool:
    """Whether there is Triton, which comes with PyTorch for GPUs, and what it starts kernels with: C, and Python's headers."""
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    headers = sysconfig.get_path("include", "posix_prefix")  # Debian's default scheme is another, where none are
    return find_spec("triton") is not None and any(map(shutil.which, compilers)) and Path(headers, "Python.h").exists()


BUILDABLE = _buildable()


def usable(device: torch.device) -> bool:
    """Whether kernels run on this device: a GPU from Ampere on."""
    return BUILDABLE and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
