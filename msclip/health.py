"""Training stops, with advice, at the first loss or gradient that is not finite; no step is ever skipped silently."""

import math
from collections.abc import Mapping

from torch import Tensor

from msclip.errors import TrainingError


def check_step(metrics: Mapping[str, Tensor | float], step: int) -> None:
    """Raises `TrainingError` if the loss or gradient norm of update number `step` is not finite."""
    values = {name: float(metrics[name]) for name in ("train/loss", "train/grad_norm")}
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if not bad:
        return
    found = " and ".join(f"{name} is {value}" for name, value in bad.items())
    bias = f", bias {metrics['train/logit_bias']:.4g}" if "train/logit_bias" in metrics else ""
    raise TrainingError(
        f"training stopped at step {step}: {found} (learning rate {metrics['train/lr']:.3g}, temperature "
        f"{metrics['train/temperature']:.4g}{bias}). The weights have not taken up that gradient. Resume from the last "
        "checkpoint with a lower optim.lr, more optim.warmup_steps or optim.clip_grad_norm 1.0; if that does not help, "
        "precision fp32 tells numerical trouble from faulty data."
    )
