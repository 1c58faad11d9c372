"""Pairs a second of a whole optimiser step, on the GPUs of this machine, beside open_clip's in the same run.

    python benchmarks/train_throughput.py --model ms_clip_s_b32 clip_b32 --batch 1024 4096 --zero null 1 \\
        --peer open_clip:ViT-B-32 --output benchmarks/results/train_throughput.json

Each case has processes of its own (one a GPU), so that none inherits another's memory, and is written as soon as it is
measured; one that runs out of memory is written as such. Images are random: the time of a step does not depend on what they
show. Captions are random words of 18 tokens on average, between 6 and 77, which the peers pad to 77. Our step takes what the
loader delivers, uint8 pixels in pinned memory, and includes their way to the GPU; a peer's images lie on the GPU ready-made.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import msclip
from msclip.data.images import Preprocess
from msclip.engine import MicroBatch, create_engine, normalised
from msclip.loss import contrastive_loss
from msclip.optim import OptimConfig
from msclip.presets import preset
from msclip.tokens import pack

MEAN_TOKENS, LEAST_TOKENS = 18, 6
BATCHES = 4
"""Different batches of which the steps take one after another: packed lengths differ as they do in training."""


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    kind: str
    """`train`, `bare` (the same model in a loop of plain PyTorch), `encode` (images, evaluation), `loss`, or a peer's name."""
    model: str
    batch: int
    """Pairs a GPU in one step."""
    gpus: int = 1
    zero_stage: int | None = None
    accumulation_steps: int = 1
    precision: str = "bf16"
    compiled: bool = False
    """Whether through torch.compile: of ours part by part, of a peer the whole model."""
    save_memory: bool = False
    """As in `TrainingConfig`."""
    zero_options: dict[str, Any] = field(default_factory=dict)
    """As in `create_engine`."""
    steps: int = 30
    warmup: int = 10
    overrides: dict[str, Any] = field(default_factory=dict)


def captions(batch: int, context: int, vocabulary: int, seed: int) -> Tensor:
    """Random ids, each caption's last the largest: (batch, context) int64, zeros behind."""
    random = torch.Generator().manual_seed(seed)
    # Exponential lengths, as of captions from the web: most are short, few are long.
    spread = torch.empty(batch).exponential_(1 / (MEAN_TOKENS - LEAST_TOKENS), generator=random)
    lengths = (LEAST_TOKENS + spread).long().clamp(max=context)
    ids = torch.randint(1, vocabulary - 2, (batch, context), generator=random)
    position = torch.arange(context)
    ids = ids.masked_fill(position >= lengths[:, None], 0)
    return ids.masked_fill(position == lengths[:, None] - 1, vocabulary - 1)


def device_of(rank: int) -> torch.device:
    return torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_step(case: Case, device: torch.device, rank: int) -> Callable[[int], object]:
    """A whole step of the engine: pixels to the GPU, loss over the global batch, update."""
    config = preset(case.model, **case.overrides)
    torch.manual_seed(0)
    pixels = Preprocess(image_size=config.image_size)
    engine = create_engine(
        msclip.build(config, device=device),
        OptimConfig(accumulation_steps=case.accumulation_steps, warmup_steps=0, lr=1e-5),
        mean=pixels.mean,
        std=pixels.std,
        total_steps=10_000,
        micro_batch_size=case.batch // case.accumulation_steps,
        device=device,
        zero_stage=case.zero_stage,
        precision="bf16" if case.precision == "bf16" else "fp32",
        compiled=case.compiled,
        save_memory=case.save_memory,
        zero_options=case.zero_options,
    )
    part = case.batch // case.accumulation_steps
    batches = []
    for number in range(BATCHES):
        ids = captions(case.batch, config.context_length, config.vocab_size, seed=rank * BATCHES + number)
        shape = (case.batch, config.image_size, config.image_size, 3)
        images = torch.randint(256, shape, dtype=torch.uint8)
        images = images.pin_memory() if device.type == "cuda" else images
        batches.append([MicroBatch(i, pack(t)) for i, t in zip(images.split(part), ids.split(part), strict=True)])
    ahead = [engine.prepare(batches[0])]

    def step(number: int) -> object:
        ahead.append(engine.prepare(batches[(number + 1) % BATCHES]))
        return engine.train_step(ahead.pop(0))

    return step


def bare_step(case: Case, device: torch.device) -> Callable[[int], object]:
    """What the engine has to keep up with: nothing but the model, its loss and AdamW; the pixels lie on the GPU."""
    config = preset(case.model, **case.overrides)
    torch.manual_seed(0)
    model = msclip.build(config, device=device)
    if case.compiled:
        model.compile_parts()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    normalise = torch.compile(normalised) if case.compiled else normalised
    kind = torch.bfloat16 if case.precision == "bf16" else torch.float32
    mean, std = (torch.tensor(numbers, device=device).view(3, 1, 1) for numbers in (Preprocess().mean, Preprocess().std))
    shape = (case.batch, config.image_size, config.image_size, 3)
    batches = []
    for number in range(BATCHES):
        ids = captions(case.batch, config.context_length, config.vocab_size, seed=number)
        batches.append((torch.randint(256, shape, dtype=torch.uint8).to(device), pack(ids).to(device)))

    def step(number: int) -> object:
        pixels, text = batches[number % BATCHES]
        with torch.autocast(device.type, torch.bfloat16, enabled=kind == torch.bfloat16):
            image, caption, scale = model(normalise(pixels, mean, std, kind), text)
        loss = contrastive_loss(image, caption, scale).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def encode_step(case: Case, device: torch.device) -> Callable[[int], object]:
    """`encode_image` as evaluation calls it."""
    config = preset(case.model, **case.overrides)
    model = msclip.build(config, device=device).eval()
    if case.compiled:
        model.compile_parts()
    images = torch.randn(case.batch, 3, config.image_size, config.image_size, device=device)

    def step(_: int) -> Tensor:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=case.precision == "bf16"):
            return model.encode_image(images)

    return step


def loss_step(case: Case, device: torch.device) -> Callable[[int], object]:
    """The loss of a global batch alone, forward and backward."""
    dim = preset(case.model, **case.overrides).embed_dim
    features = [F.normalize(torch.randn(case.batch, dim, device=device), dim=1).requires_grad_() for _ in range(2)]
    temperature = torch.full((1,), 14.3, device=device, requires_grad=True)

    def step(_: int) -> None:
        contrastive_loss(*features, temperature).loss.backward()

    return step


def open_clip_step(case: Case, device: torch.device, rank: int) -> Callable[[int], object]:
    """open_clip's own step: its model, its loss with local loss and gathered gradients, its fused AdamW, bf16 autocast."""
    import open_clip

    model = open_clip.create_model(case.model, device=device, precision="amp_bf16", **case.overrides)
    size, context = model.visual.image_size, model.context_length
    size = size[0] if isinstance(size, tuple) else size
    if case.gpus > 1:
        model = nn.parallel.DistributedDataParallel(model, device_ids=[rank] if device.type == "cuda" else None)
    if case.compiled:
        model = torch.compile(model)
    loss_of = open_clip.ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=case.gpus)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")
    images = torch.randn(case.batch, 3, size, size, device=device)
    texts = [captions(case.batch, context, 49_408, seed=rank * BATCHES + n).to(device) for n in range(BATCHES)]

    def step(number: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            image_features, text_features, scale = model(images, texts[number % BATCHES])[:3]
            loss = loss_of(image_features, text_features, scale)
        loss.backward()
        optimizer.step()

    return step


def forward_flops(case: Case) -> float:
    """Floating-point operations of one pair's forward pass at the captions' mean length; 0 for what is not ours."""
    if case.kind not in ("train", "encode"):
        return 0
    config = preset(case.model, **case.overrides)
    model = msclip.build(config, device="meta").eval()
    images = torch.empty(1, 3, config.image_size, config.image_size, device="meta")
    ids = captions(1, config.context_length, config.vocab_size, seed=0)
    ids[0] = 1
    ids[0, min(MEAN_TOKENS, config.context_length) - 1] = 2  # the largest id ends the caption
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.encode_image(images)
        if case.kind == "train":
            model.encode_text(pack(ids).to("meta"))
    return float(counter.get_total_flops())


def measure(case: Case, rank: int, profile: str | None) -> dict[str, Any]:
    """Milliseconds of the steps of one process, after `warmup` of them."""
    device = device_of(rank)
    step = {
        "train": lambda: our_step(case, device, rank),
        "bare": lambda: bare_step(case, device),
        "encode": lambda: encode_step(case, device),
        "loss": lambda: loss_step(case, device),
        "open_clip": lambda: open_clip_step(case, device, rank),
    }[case.kind]()
    recompiles = torch._dynamo.utils.counters["stats"]
    for number in range(case.warmup):
        step(number)
    synchronise(device)
    compiled_before = recompiles["unique_graphs"]
    times = []
    for number in range(case.steps):
        began = time.perf_counter()
        step(number)
        synchronise(device)
        times.append(1000 * (time.perf_counter() - began))
    # Steps that do not wait for each other, as in training: what counts is the whole.
    began = time.perf_counter()
    for number in range(case.steps):
        step(number)
    synchronise(device)
    streaming = 1000 * (time.perf_counter() - began) / case.steps
    if profile:
        with torch.profiler.profile() as recorded:
            for number in range(3):
                step(number)
            synchronise(device)
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        Path(f"{profile}-rank{rank}.txt").write_text(
            recorded.key_averages().table(sort_by=by, row_limit=300, max_name_column_width=90)
        )
    on_gpu = device.type == "cuda"
    return {
        "step_ms": round(streaming, 3),
        "step_ms_alone_median": round(statistics.median(times), 3),
        "step_ms_alone_worst": round(max(times), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if on_gpu else None,
        "reserved_gib": round(torch.cuda.max_memory_reserved(device) / 2**30, 2) if on_gpu else None,
        "graphs_compiled_after_warmup": recompiles["unique_graphs"] - compiled_before,
    }


def process(case: Case, rank: int, store: str, profile: str | None, results: Any) -> None:
    """One GPU's process."""
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        if case.gpus > 1:
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.gpus)}
            dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=case.gpus)
        results.put((rank, measure(case, rank, profile)))
    except torch.OutOfMemoryError:
        results.put((rank, {"error": "out of memory"}))
    except Exception as error:
        traceback.print_exc()
        results.put((rank, {"error": f"{type(error).__name__}: {str(error)[:300]}"}))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def run(case: Case, profile: str | None = None, limit_s: float = 600) -> dict[str, Any]:
    """Measures a case in fresh processes; the record says what went wrong if something did."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [(case, rank, f"{scratch}/store", profile, results) for rank in range(case.gpus)]
        processes = [context.Process(target=process, args=a) for a in arguments]
        for started in processes:
            started.start()
        found: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + limit_s
        while len(found) < case.gpus and time.monotonic() < deadline:
            if not results.empty():
                rank, result = results.get()
                found[rank] = result
                if "error" in result:
                    break
            elif not any(started.is_alive() for started in processes):
                break
            time.sleep(0.05)
        for started in processes:
            started.join(5 if len(found) == case.gpus else 0)
            started.kill()
    failed = next((result for result in found.values() if "error" in result), None)
    if failed or len(found) < case.gpus:
        return asdict(case) | (failed or {"error": f"no result within {limit_s:g} s, or a process died"})
    slowest = max(found.values(), key=lambda result: result["step_ms"])
    flops = forward_flops(case) * (3 if case.kind == "train" else 1)
    rate = 1000 * case.batch / slowest["step_ms"]
    return (
        asdict(case)
        | slowest
        | {
            "pairs_per_second_per_gpu": round(rate, 1),
            "pairs_per_second": round(rate * case.gpus, 1),
            "model_tflops_per_gpu": round(rate * flops / 1e12, 1) if flops else None,
        }
    )


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit.stdout.strip(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def stage(text: str) -> int | None:
    return None if text == "null" else int(text)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All combinations asked for, ours first."""
    common = Case("train", "", 0, steps=options.steps, warmup=options.warmup, precision=options.precision)
    overrides = json.loads(options.overrides)
    for model in options.model:
        for batch in options.batch:
            for gpus in options.gpus:
                for zero_stage in options.zero:
                    for compiled in options.compiled:
                        yield replace(
                            common,
                            model=model,
                            batch=batch,
                            gpus=gpus,
                            zero_stage=zero_stage,
                            accumulation_steps=options.accumulation,
                            compiled=compiled,
                            save_memory=options.save_memory and compiled,
                            zero_options={} if zero_stage is None else json.loads(options.zero_options),
                            overrides=overrides,
                        )
        for batch in options.bare:
            for compiled in options.compiled:
                yield replace(common, kind="bare", model=model, batch=batch, compiled=compiled, overrides=overrides)
        for batch in options.encode:
            for compiled in options.compiled:
                yield replace(common, kind="encode", model=model, batch=batch, compiled=compiled, overrides=overrides)
        for batch in options.loss:
            yield replace(common, kind="loss", model=model, batch=batch, overrides=overrides)
    for peer in options.peer:
        kind, _, model = peer.partition(":")
        for batch in options.batch:
            for gpus in options.gpus:
                for compiled in options.compiled:
                    yield replace(common, kind=kind, model=model, batch=batch, gpus=gpus, compiled=compiled)


def main() -> int:
    """Measures what the options name; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="*", default=["ms_clip_s_b32"], help="presets")
    parser.add_argument("--batch", nargs="*", type=int, default=[1024], help="pairs a GPU in one training step")
    parser.add_argument("--zero", nargs="*", type=stage, default=[None], help="ZeRO stages; null for plain PyTorch")
    parser.add_argument("--gpus", nargs="*", type=int, default=[1])
    parser.add_argument("--accumulation", type=int, default=1, help="micro batches a step")
    parser.add_argument("--bare", nargs="*", type=int, default=[], metavar="BATCH", help="also a plain loop around the model")
    parser.add_argument("--encode", nargs="*", type=int, default=[], metavar="BATCH", help="also encode_image at these sizes")
    parser.add_argument("--loss", nargs="*", type=int, default=[], metavar="BATCH", help="also the loss alone at these sizes")
    parser.add_argument("--peer", nargs="*", default=[], metavar="open_clip:MODEL", help="the same batches through a peer")
    parser.add_argument(
        "--compiled", nargs="*", type=json.loads, default=[True], metavar="true|false", help="whether through torch.compile"
    )
    parser.add_argument("--save_memory", action="store_true", help="as training.save_memory")
    parser.add_argument("--zero_options", default="{}", help="of DeepSpeed as JSON, such as '{\"overlap_comm\": true}'")
    parser.add_argument("--overrides", default="{}", help="model settings as JSON, such as '{\"checkpoint_blocks\": true}'")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=10)
    parser.add_argument("--profile", help="write the costliest kernels of each case to PREFIX-CASE-rankRANK.txt")
    parser.add_argument("--commit", help="recorded with the result, where there is no checkout to ask")
    parser.add_argument("--output", required=True, type=Path, help="JSON file to write")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    head, records = machine() | ({"commit": options.commit} if options.commit else {}), []
    for number, case in enumerate(cases(options)):
        record = run(case, f"{options.profile}-{number}" if options.profile else None)
        records.append(record)
        options.output.write_text(json.dumps({**head, "cases": records}, indent=1) + "\n")  # a run cut short keeps these
        what = record.get("error") or f"{record['pairs_per_second_per_gpu']:,.0f} pairs/s a GPU, {record['step_ms']:.1f} ms"
        how = "compiled" if case.compiled else "eager"
        print(f"{case.kind} {case.model} batch {case.batch} x {case.gpus} ZeRO {case.zero_stage} {how}: {what}", flush=True)
    return int(any("error" in record for record in records))


if __name__ == "__main__":
    sys.exit(main())
