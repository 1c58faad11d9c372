"""How far below the embedding space a parameter sits, for learning rates that shrink towards the input.

Fine-tuning with layer-wise decay is ELECTRA's (arXiv 2003.10555), for images BEiT's (arXiv 2106.08254): what is near the
input is general already and moves less. Where the two encoders differ in depth each counts from its own top.
"""

from msclip.config import ModelConfig
from msclip.sharing import Modality

RESNET_STAGES = 4


def levels_below_top(name: str, config: ModelConfig) -> int:
    """0 for the head (projections, final norms, pooling, temperature), 1 for an encoder's last layer, one more for each
    layer below it, and most for its input.

    A shared layer has the greater of its two encoders' levels. A stage of the parallel branch and its adapter have that of
    the layer they are fused in before; modules beside a layer have the layer's. A ModifiedResNet has its four stages for
    layers and its stem for input, a bag of words its token table for input.

    Args:
        name: of a parameter, as in `Model.named_parameters`.
    """
    top = {"image": config.layers, "text": config.text_layers}
    match name.split("."):
        case ["blocks", layer, *parts]:
            served = [modality for modality in config.modalities_at(int(layer)) if modality in parts]
            return max(top[modality] for modality in served or config.modalities_at(int(layer))) - int(layer)
        case ["branch", _, stage, *_]:
            return top["image"] - config.branch_layers[int(stage)]
        case ["image_input" | "text_input" as place, *_]:
            modality: Modality = "image" if place == "image_input" else "text"
            return top[modality] + 1
        case ["resnet", "stages", stage, *_]:
            return RESNET_STAGES - int(stage)
        case ["resnet", part, *_] if part != "pool":
            return RESNET_STAGES + 1
        case ["cbow", "token_embedding", *_]:
            return 1
    return 0
