"""Contrastive image-text models whose two encoders share their weights (MS-CLIP, arXiv 2207.12661).

Names are imported when they are first used: a process that reads or decodes data never loads PyTorch, which costs it seconds
and 300 MB.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msclip.checkpoint import load
    from msclip.config import ModelConfig
    from msclip.convert.ms_clip import from_state_dict
    from msclip.errors import TrainingError, UserError
    from msclip.model import Model, build, create_model
    from msclip.presets import list_models
    from msclip.resize import resize_positions
    from msclip.sharing import Sharing

__version__ = "0.1.0.dev0"
__all__ = [
    "Model",
    "ModelConfig",
    "Sharing",
    "TrainingError",
    "UserError",
    "build",
    "create_model",
    "from_state_dict",
    "list_models",
    "load",
    "resize_positions",
]

_MODULES = {
    "Model": "model",
    "ModelConfig": "config",
    "Sharing": "sharing",
    "TrainingError": "errors",
    "UserError": "errors",
    "build": "model",
    "create_model": "model",
    "from_state_dict": "convert.ms_clip",
    "list_models": "presets",
    "load": "checkpoint",
    "resize_positions": "resize",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
