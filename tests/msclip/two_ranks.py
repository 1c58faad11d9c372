"""What the tests run on two gloo processes, in one session: starting the pair costs as much as all of its work.

`python -m tests.msclip.two_ranks RANK FOLDER` writes FOLDER/rank{RANK}.pt, the observations by name.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from msclip import Model, TrainingError, create_model, loss
from msclip.distributed import all_gather_objects, first_ranks_object, gather_with_grad, mean_over_ranks
from msclip.engine import Engine, MicroBatch, create_engine, read_metrics
from msclip.loss import contrastive_loss
from msclip.optim import OptimConfig
from msclip.sharing import SEPARATE, Paired, Sharing
from msclip.tokens import pack

ROWS = 8
STEPS = 6
STAGES = (None, 0, 1, 2, 3)
# 2.6: the first temperature is e, so the cap acts in every run. 0.3: most gradients are longer.
OPTIM: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 2, "clip_grad_norm": 0.3, "temperature_max": 2.6}
# 0.3: the average's own warm-up ends within the run, at its fourth step.
FINETUNING: dict[str, Any] = {"layer_decay": 0.5, "ema_decay": 0.3, "warmup_steps": 0}


# Without BatchNorm a batch's loss does not depend on how it is spread over ranks.
NO_BATCH_NORM: dict[str, Any] = {
    "stem": False,
    "branch_layers": (),
    "sharing": Sharing("all"),
    "layers": 2,
    "text_layers": 2,
    "vocab_size": 512,
}

SIGMOID: dict[str, Any] = {"loss": "sigmoid", "logit_scale_init": 0.8, "logit_bias_init": -2.0}


def tiny_model(batch_norm: bool = False, seed: int = 0, **overrides: Any) -> Model:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return create_model("ms_clip_s_tiny", **({} if batch_norm else NO_BATCH_NORM) | overrides)


def micro_batches(step: int, rank: int = 0, world_size: int = 1, parts: int = 1) -> list[MicroBatch]:
    """A rank's share of the global batch of a step, of which the ranks hold consecutive rows."""
    generator = torch.Generator().manual_seed(step)
    pixels = torch.randint(0, 256, (ROWS, 64, 64, 3), dtype=torch.uint8, generator=generator)
    token_ids = torch.randint(1, 500, (ROWS, 16), generator=generator)
    for row in range(ROWS):
        token_ids[row, 4 + row :] = 0
        token_ids[row, 4 + row] = 511
    size = ROWS // world_size // parts
    starts = [rank * ROWS // world_size + part * size for part in range(parts)]
    return [MicroBatch(pixels[start : start + size], pack(token_ids[start : start + size])) for start in starts]


def tiny_engine(
    model: Model, stage: int | None = None, world_size: int = 1, compiled: bool = False, by_unit: bool = False, **optim: Any
) -> Engine:
    """With `by_unit`, stage 3 as of a model too large to be held whole; its small parameters are partitioned too."""
    large = {"stage3_max_live_parameters": 1000, "stage3_param_persistence_threshold": 0}
    config = OptimConfig(**(OPTIM | optim))
    return create_engine(
        model,
        config,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        total_steps=10,
        micro_batch_size=ROWS // world_size // config.accumulation_steps,
        device="cpu",
        zero_stage=stage,
        compiled=compiled,
        zero_options=large if by_unit else None,
    )


def train(engine: Engine, steps: int, rank: int = 0, world_size: int = 1, parts: int = 1) -> list[dict[str, float]]:
    """Metrics of the next `steps` steps."""
    return [
        read_metrics(engine.train_step(micro_batches(engine.step, rank, world_size, parts)))
        for _ in range(engine.step, engine.step + steps)
    ]


LOSSES: dict[str, tuple[float, ...]] = {"softmax": (3.0,), "sigmoid": (3.0, -1.5)}
"""By name, the temperature of a test, and the bias where there is one."""


def features(kind: str = "softmax", rows: int = ROWS) -> list[Tensor]:
    """A global batch of unit image and text features, a temperature, and for the sigmoid loss a bias; all with gradients."""
    generator = torch.Generator().manual_seed(1)
    images, texts = torch.nn.functional.normalize(torch.randn(2, rows, 5, generator=generator), dim=-1)
    return [x.requires_grad_() for x in (images, texts, *(torch.tensor([number]) for number in LOSSES[kind]))]


def observe_collectives(rank: int) -> Mapping[str, Any]:
    x = (torch.arange(6.0).view(2, 3) + 10 * rank).requires_grad_()
    gathered = gather_with_grad(x)
    # Rank r's loss weighs gathered row i by (i + 1) (r + 1).
    (gathered * torch.arange(1.0, 5.0)[:, None] * (rank + 1)).sum().backward()
    assert x.grad is not None
    return {
        "gathered": gathered.detach(),
        "gather_gradient": x.grad,
        "objects": all_gather_objects({"rank": rank}),
        "first": first_ranks_object(f"from {rank}"),
        "mean": mean_over_ranks(torch.tensor([1.0, 2.0]) * (rank + 1)),
    }


def observe_loss(rank: int, kind: str) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and accuracies, and gradients."""
    leaves = features(kind)
    rows = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    result = contrastive_loss(leaves[0][rows], leaves[1][rows], *leaves[2:])
    result.loss.backward()
    return torch.stack(result).detach(), [leaf.grad for leaf in leaves]


def fail(engine: Engine, rank: int, parts: int = 1) -> str | None:
    """A step that must not be applied, and the one after it, which must say so; one faulty worker must stop both."""
    mean = engine.module.mean.clone()
    if rank == 1:
        engine.module.mean.fill_(torch.nan)
    train(engine, 1, rank, 2, parts)
    engine.module.mean.copy_(mean)
    try:
        train(engine, 1, rank, 2, parts)
    except TrainingError as error:
        return str(error)
    return None


def observe_stage(rank: int, stage: int | None, start: tuple[dict[str, Tensor], dict[str, Tensor]]) -> Mapping[str, Any]:
    """A whole run with a step in its middle that must fail, and one that goes on from `start`, the state after half of it."""
    engine = tiny_engine(tiny_model(), stage, 2)
    observed: dict[str, Any] = {"metrics": train(engine, STEPS // 2, rank, 2)}
    observed["half"] = before = engine.full_state()
    observed["error"] = fail(engine, rank)
    observed["untouched"] = all(torch.equal(a[k], b[k]) for a, b in zip(before, engine.full_state(), strict=True) for k in a)
    observed["metrics"] += train(engine, STEPS // 2, rank, 2)

    engine = tiny_engine(tiny_model(seed=5 + rank), stage, 2)
    engine.load_full_state(*(start if rank == 0 else ({}, {})), step=STEPS // 2)
    observed["loaded"] = engine.full_state()
    observed["resumed"] = train(engine, STEPS // 2, rank, 2)
    return observed


def optimised(engine: Engine) -> list[int]:
    """The model's parameters in the optimiser's hands, by `id`; DeepSpeed keeps them in lists beside its flat partitions."""
    stepper: Any = engine._stepper
    zero = getattr(stepper, "_zero", None)
    if zero is None:
        lists = [group["params"] for group in stepper.param_groups]
    else:
        lists = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups
    return [id(parameter) for parameters in lists for parameter in parameters]


def sharing_holds(engine: Engine) -> bool:
    """Whether each part that both modalities use is one object, and each parameter once in the optimiser."""
    pairs = [part for part in engine.model.modules() if isinstance(part, Paired) and part.is_shared]
    one_object = all(part.part("image") is part.part("text") is part.shared for part in pairs)
    return bool(pairs) and one_object and sorted(optimised(engine)) == sorted(id(p) for p in engine.model.parameters())


def observe_finetuning(rank: int, stage: int | None, start: tuple[dict[str, Tensor], ...]) -> Mapping[str, Any]:
    """A run with layer-wise decay and an average of the weights, and one that goes on from `start`, half of it."""
    engine = tiny_engine(tiny_model(), stage, 2, **FINETUNING)
    observed: dict[str, Any] = {"shares_at_first": sharing_holds(engine)}
    train(engine, 1, rank, 2)
    observed["first"] = engine.full_state()[1]
    train(engine, STEPS // 2 - 1, rank, 2)
    observed["half"] = (*engine.full_state(), engine.averaged_state())
    train(engine, STEPS // 2, rank, 2)
    observed["shares_at_last"] = sharing_holds(engine)
    observed["end"] = (*engine.full_state(), engine.averaged_state())

    engine = tiny_engine(tiny_model(seed=5 + rank), stage, 2, **FINETUNING)
    model_state, optimizer_state, average = start if rank == 0 else ({}, {}, {})
    engine.load_full_state(model_state, optimizer_state, STEPS // 2, average)
    observed["loaded"] = engine.averaged_state()
    train(engine, STEPS // 2, rank, 2)
    observed["resumed"] = (*engine.full_state(), engine.averaged_state())
    return observed


def observe_compiled(rank: int, by_unit: bool) -> tuple[list[dict[str, float]], int]:
    """Steps under stage 3 of a model that is compiled, and how many kinds of parts were."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    with mock.patch("torch.compile", lambda function: compile_(function, backend=counter, fullgraph=True)):
        engine = tiny_engine(tiny_model(), 3, 2, compiled=True, by_unit=by_unit)
    return train(engine, 3, rank, 2), counter.frame_count


def observe_gathering(rank: int, by_unit: bool) -> tuple[int, int]:
    """Numbers that ranks send each other in a step under stage 3 to have the parameters whole; and all parameters'."""
    from deepspeed.comm.torch import TorchBackend

    engine, sent = tiny_engine(tiny_model(), 3, 2, by_unit=by_unit), []
    gather = TorchBackend.all_gather_into_tensor

    def counted(self: Any, output_tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        sent.append(output_tensor.numel())
        return gather(self, output_tensor, *arguments, **options)

    train(engine, 2, rank, 2)  # first it learns in which order they are needed
    with mock.patch.object(TorchBackend, "all_gather_into_tensor", counted):
        train(engine, 1, rank, 2)
    return sum(sent), sum(parameter.ds_numel for parameter in engine.model.parameters())  # type: ignore[attr-defined]


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    start, finetuned = torch.load(folder / "start.pt"), torch.load(folder / "finetuned.pt")
    observed: dict[Any, Any] = {**observe_collectives(rank)}
    whole = loss.LOGITS_AT_ONCE
    for kind in LOSSES:
        for in_chunks, loss.LOGITS_AT_ONCE in ((False, whole), (True, 3 * ROWS)):  # chunks of three rows and of one
            observed["loss", kind, in_chunks] = observe_loss(rank, kind)
    loss.LOGITS_AT_ONCE = whole
    for stage in STAGES:
        observed["stage", stage] = observe_stage(rank, stage, start)
        observed["finetuning", stage] = observe_finetuning(rank, stage, finetuned)
    for stage, by_unit in ((2, False), (3, False), (3, True)):
        engine = tiny_engine(tiny_model(), stage, 2, by_unit=by_unit, accumulation_steps=2)
        metrics = train(engine, 1, rank, 2, parts=2)
        fail(engine, rank, parts=2)
        observed["accumulated", stage, by_unit] = metrics + train(engine, 2, rank, 2, parts=2)
    for by_unit in (False, True):
        observed["compiled", by_unit] = observe_compiled(rank, by_unit)
        observed["gathering", by_unit] = observe_gathering(rank, by_unit)
    for stage, parts in zip(STAGES, (1, 1, 2, 2, 2), strict=True):
        engine = tiny_engine(tiny_model(**SIGMOID), stage, 2, accumulation_steps=parts)
        observed["sigmoid", stage] = train(engine, 3, rank, 2, parts)
    for stage in (None, 2):
        engine = tiny_engine(tiny_model(batch_norm=True), stage, 2, ema_decay=0.5)
        metrics = train(engine, 2, rank, 2)
        own = {name: buffer.clone() for name, buffer in engine.model.named_buffers()}
        observed["batch_norm", stage] = metrics, own, engine.full_state()[0], engine.averaged_state()
    models: dict[str, dict[str, Any]] = {
        "apart": {"text_width": 96, "text_heads": 4, "sharing": SEPARATE},
        "frozen": {"freeze_image": "first:1", "freeze_text": "first:1"},
    }
    for name, model in models.items():
        for stage, by_unit in ((None, False), (3, False), (3, True)):
            observed[name, stage, by_unit] = train(tiny_engine(tiny_model(**model), stage, 2, by_unit=by_unit), 2, rank, 2)
    torch.save(observed, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
