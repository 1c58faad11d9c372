"""An exponential moving average of the weights, which is often the better model than the last step's weights alone.

It lives beside AdamW's averages of the gradients, as one more entry of the optimiser's state, so DeepSpeed partitions it
with them (from stage 1 on) and nothing is gathered before a checkpoint is written.
"""

import torch
from torch import Tensor

from msclip.optim import AVERAGE


def decay_at(updates: int, limit: float) -> float:
    """What remains of the average at update number `updates` (from 1): min(limit, (1 + n) / (10 + n)).

    TensorFlow's warm-up of `ExponentialMovingAverage`: the first weights, which are random or another task's, are forgotten
    within tens of steps instead of 1 / (1 - limit). A function of the step, so that nothing about it needs saving.
    """
    return min(limit, (1 + updates) / (10 + updates))


@torch.no_grad()
def move_towards(averages: list[Tensor], values: list[Tensor], decay: float) -> None:
    """average = decay * average + (1 - decay) * value, in place and without waiting for the device; counters are copied."""
    pairs = list(zip(averages, values, strict=True))
    moving = [(average, value) for average, value in pairs if average.is_floating_point()]
    if moving:
        torch._foreach_lerp_([average for average, _ in moving], [value for _, value in moving], 1 - decay)
    for average, value in pairs:
        if not average.is_floating_point():
            average.copy_(value)


def average_weights(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """Moves the average of every tensor that the optimiser updates."""
    averages = {parameter: state[AVERAGE] for parameter, state in optimizer.state.items()}
    move_towards(list(averages.values()), [parameter.detach() for parameter in averages], decay)
