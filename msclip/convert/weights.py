"""What a converter reads, and what a model must be to be written in a layout that has less room than ours."""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from torch import Tensor

from msclip.config import ModelConfig
from msclip.convert.ms_clip import from_state_dict, infer_config, to_state_dict
from msclip.data.images import Preprocess
from msclip.data.tokenizer import Tokenizer, Truncation
from msclip.errors import UserError
from msclip.model import Model
from msclip.sharing import Sharing

Layout = Literal["msclip", "ms_clip", "openai", "open_clip", "huggingface"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FRESH = {"logit_scale_init": 2.6592600369327779, "token_std": 0.02}
"""How CLIP's fresh weights differ from MS-CLIP's; no file says it, and a loaded model no longer needs it."""
FRESH_ONLY = {*FRESH, "logit_bias_init"}
"""Settings of fresh weights, which mean nothing to those that exist."""
TRAINING = {"checkpoint_blocks", "dropout", "freeze_image", "freeze_text", "logit_scale_learned", "patch_dropout"}
"""Settings of each training for itself."""
TRAINING_ONLY = FRESH_ONLY | TRAINING
"""Settings that change no embedding, so that a layout need not hold them."""
PLAIN = {
    "image_size",
    "patch_size",
    "width",
    "layers",
    "num_heads",
    "text_width",
    "text_layers",
    "text_heads",
    "embed_dim",
    "vocab_size",
    "context_length",
    "image_tower",
    "resnet_blocks",
    "activation",
    "norm_eps",
    "sharing",
}
"""Settings that two plain towers can have; sharing, because a shared tensor can be written to both."""

MALFORMED = (KeyError, TypeError, ValueError, AttributeError, ArithmeticError)
"""What reading another program's configuration raises where a value is not of the kind that belongs there."""


@dataclass(frozen=True)
class Weights:
    """A model as a file has it."""

    layout: Layout
    model: Model
    preprocess: Preprocess
    tokenizer: Tokenizer | None
    """Null where the layout has none in it."""


def require_plain(config: ModelConfig, layout: Layout, others: Set[str] = frozenset()) -> None:
    """Refuses what two plain towers cannot hold.

    Args:
        others: settings that the layout has a place for, besides those of any plain towers.

    Raises:
        UserError: which setting stands in the way, why, and what can be written instead.
    """
    obstacles = {
        "model.stem true": ("a convolutional stem in place of the patch embedding and layer 0", config.stem),
        f"model.branch_layers {list(config.branch_layers)}": (
            "a parallel branch whose adapters rewrite the image tokens between layers",
            bool(config.branch_layers),
        ),
        "model.text_tower cbow": ("a mean of word vectors in place of the text transformer", config.text_tower == "cbow"),
    }
    for setting, (what, present) in obstacles.items():
        if present:
            raise UserError(
                f"a model with {setting} cannot be written as {layout}: {what} has no place in two plain towers. --to msclip "
                "holds every model, --to ms_clip one with stem and branch; models that only share can be written as any layout"
            )
    require_settings(config, layout, {"text_tower", "stem", "branch_layers", *others})


def require_settings(config: ModelConfig, layout: Layout, others: Set[str]) -> None:
    """Refuses settings that are neither a plain tower's nor among `others`, unless they are off, as by default.

    Raises:
        UserError: the first such setting.
    """
    for name, usual in vars(ModelConfig()).items():
        value = getattr(config, name)
        if name not in PLAIN | TRAINING_ONLY | others and value != usual:
            raise UserError(
                f"a model with model.{name} {value} cannot be written as {layout}, which has no place for it; "
                "--to msclip holds every model"
            )


def require_implied(weights: Weights, layout: Layout, implied: Mapping[str, Any], preprocess: Preprocess) -> None:
    """Refuses a model that would be read differently from a file which holds nothing but tensors.

    Args:
        implied: settings that every reader of the layout takes for granted.
        preprocess: the preprocessing that it takes for granted.

    Raises:
        UserError: the setting that the layout would lose.
    """
    config = weights.model.config
    expected = {f.name: getattr(infer_config(to_state_dict(weights.model)), f.name) for f in fields(config)} | dict(implied)
    for name in sorted(expected.keys() - TRAINING_ONLY - {"sharing"}):
        if getattr(config, name) != expected[name]:
            raise UserError(
                f"the {layout} layout holds tensors alone and implies model.{name} {expected[name]}; this model has "
                f"{getattr(config, name)}. --to msclip holds every model"
            )
    if (weights.preprocess.mean, weights.preprocess.std) != (preprocess.mean, preprocess.std):
        raise UserError(
            f"the {layout} layout holds tensors alone and implies the image mean {preprocess.mean}; this model was made for "
            f"{weights.preprocess.mean}. --to msclip, open_clip and huggingface carry it"
        )


def own_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, as safetensors wants them."""
    return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}


def remark(weights: Weights) -> dict[str, Any]:
    """An entry for another program's configuration file, which ignores it: what was shared, how captions are cut."""
    said: dict[str, Any] = {"sharing": asdict(weights.model.config.sharing)}
    if weights.tokenizer is not None:
        said["truncation"] = weights.tokenizer.truncation
    return {"msclip": said}


def said_truncation(remarks: Mapping[str, Any]) -> Truncation:
    """How the tokenizer beside a model is to cut captions that are too long, by the model's `remark`."""
    said = remarks.get("msclip")
    return "official" if isinstance(said, Mapping) and said.get("truncation") == "official" else "end"


def from_plain(state: Mapping[str, Tensor], remarks: Mapping[str, Any], settings: Mapping[str, Any]) -> Model:
    """A model from two plain towers, shared again as its `remark` says.

    Where the copies no longer agree (the towers were trained on, each for itself) or there is no remark, what is equal is
    shared.

    Raises:
        UserError: see `from_state_dict`.
    """
    said = remarks.get("msclip")
    if said is not None and "sharing" not in settings:
        try:
            return from_state_dict(state, **settings, sharing=Sharing(**said["sharing"]))
        except (UserError, TypeError, KeyError, AttributeError):
            pass  # anything may stand in another program's file
    return from_state_dict(state, **settings)
