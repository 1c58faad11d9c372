"""Contrastive image-text models whose two encoders share their weights (MS-CLIP, arXiv 2207.12661)."""

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
