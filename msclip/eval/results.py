"""One result: what a task measured of a checkpoint, with the fields that CLIP_benchmark's table builder reads.

A result carries digests of the checkpoint and of the task's definition and data. They say of what it is the result,
wherever the files have moved since; the same pair is never measured twice.
"""

import dataclasses
import hashlib
import json
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from msclip.checkpoint import COMPLETE, EMA, MODEL, STATE, load
from msclip.errors import UserError
from msclip.eval import retrieval, zeroshot
from msclip.eval.retrieval import CUTOFFS
from msclip.eval.rows import open_rows
from msclip.eval.tasks import OF_KIND, Task, split_parent
from msclip.presets import PRESETS
from msclip.storage import Folder

# Part of every task digest; raise it when a metric changes its meaning, so that old results are not taken for new ones.
VERSION = 1

CLIP_BENCHMARK_TASKS = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
_SHOWN_SKIPPED = 20


def weights_of(checkpoint: str | Folder) -> tuple[Folder, str]:
    """Folder and name of the exported file that a checkpoint is, or holds.

    Raises:
        UserError: neither a .safetensors file nor a folder with `model.safetensors`.
    """
    url = checkpoint.url if isinstance(checkpoint, Folder) else str(checkpoint)
    parent, name = split_parent(url)
    folder = Folder(parent) if name.endswith(".safetensors") else Folder(url)
    name = name if name.endswith(".safetensors") else MODEL
    if not folder.exists(name):
        raise UserError(f"a checkpoint must be a folder with {MODEL} or a .safetensors file; there is none at {url}")
    return folder, name


def checkpoint_digest(checkpoint: str | Folder) -> str:
    """Identifies a checkpoint by its records and by samples of its weights, not by where or when it was written.

    Reads the two small files beside the weights, and of the weights the size, the first 64 KiB and 16 places of 4 KiB.
    """
    folder, name = weights_of(checkpoint)
    digest = hashlib.sha256()
    for record in (STATE, COMPLETE) if name == MODEL else ():
        digest.update(folder.read_bytes(record) if folder.exists(record) else b"-")
    with folder.filesystem.open_input_file((folder / name).path) as file:
        size = file.size()
        digest.update(str(size).encode() + file.read(2**16))
        for place in range(16):
            file.seek(place * size // 16)
            digest.update(file.read(2**12))
    return digest.hexdigest()[:16]


def task_digest(task: Task) -> str:
    """Identifies what a task measures: its settings and the footers of its data files, wherever these lie.

    Raises:
        UserError: the data are missing or lack a column that the task needs.
    """
    rows = open_rows(task.data)
    columns = ["image_column", "label_column" if task.kind == "zeroshot" else "caption_column"]
    for setting in columns:
        rows.column_type(getattr(task, setting), f"{setting} of task {task.name!r}")
    settings = {name: getattr(task, name) for name in ("kind", "limit", "image_column", *OF_KIND[task.kind])}
    text = json.dumps([VERSION, settings, rows.footers()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate_checkpoint(
    checkpoint: str | Path | Folder,
    task: Task,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 128,
    threads: int = 1,
) -> dict[str, Any]:
    """Measures one task of one checkpoint, a finished folder or an exported file, local or not.

    Args:
        device: the first GPU where there is one, by default. bfloat16 on a GPU, float32 elsewhere.
        threads: of image decoding.

    Returns:
        The result, ready for JSON. Shares are 0..1, `chance` their values for blind guesses, `seconds` wall time.

    Raises:
        UserError: a mistake in the task or its data, or weights that give no finite features.
    """
    start = time.monotonic()
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, name = weights_of(checkpoint if isinstance(checkpoint, Folder) else str(checkpoint))
    digest = {"checkpoint": checkpoint_digest(folder / name), "task": task_digest(task)}
    with tempfile.TemporaryDirectory(prefix="msclip-") as temporary:
        path = folder.local / name if folder.local else Path(temporary) / name
        if folder.local is None:
            folder.download(name, path)
        loaded = load(path)
    loaded.model.to(device).eval()
    evaluate = {"zeroshot": zeroshot.evaluate, "retrieval": retrieval.evaluate}[task.kind]
    measured, skipped = evaluate(loaded, task, device=device, batch_size=batch_size, threads=threads)
    step = re.fullmatch(r"step_(\d+)", folder.name)
    of_run = {MODEL: f"{run_name(folder)}/{folder.name}", EMA: f"{run_name(folder)}/{folder.name}-ema"}
    return {
        "dataset": task.name,
        "model": next((preset for preset, config in PRESETS.items() if config == loaded.config), "custom"),
        "pretrained": of_run.get(name, f"{folder.name}/{name}"),
        "task": CLIP_BENCHMARK_TASKS[task.kind],
        "language": "en",
        "metrics": measured.pop("metrics"),
        "step": int(step[1]) if step else None,
        **measured,
        "skipped_rows": len(skipped),
        "skipped": [row._asdict() for row in skipped[:_SHOWN_SKIPPED]],
        "seconds": round(time.monotonic() - start, 3),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "digest": digest,
        "definition": _definition(task),
    }


def _definition(task: Task) -> dict[str, Any]:
    """The task as JSON has it, without what a URL may say of keys and endpoints."""
    settings = {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(task).items()}
    return settings | {"data": re.sub(r"(?<=://)[^/@]*@", "", task.data.partition("?")[0] if "://" in task.data else task.data)}


def is_current(result: Mapping[str, Any] | None, checkpoint: str, task: str) -> bool:
    """Whether a stored result is of this checkpoint digest and this task digest."""
    return result is not None and result.get("digest") == {"checkpoint": checkpoint, "task": task}


def read_result(folder: Folder, task: Task) -> dict[str, Any] | None:
    """The stored result of a task; None where there is none, or not a whole one."""
    try:
        result = json.loads(folder.read_text(f"{task.name}.json"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return result if isinstance(result, dict) else None


def write_result(folder: Folder, task: Task, result: Mapping[str, Any]) -> None:
    """Stores a result as `<task>.json`, whole or not at all."""
    folder.write_text(f"{task.name}.json", json.dumps(result, indent=2, allow_nan=False) + "\n")


def metric_names(task: Task) -> dict[str, str]:
    """Names of a kind's metrics, and short titles, in the order of tables."""
    if task.kind == "zeroshot":
        return {"acc1": "top-1", "acc5": "top-5", "mean_per_class_recall": "per class"}
    titles: dict[str, str] = {}
    for sought in ("image", "text"):
        titles |= {f"{sought}_retrieval_recall@{k}": f"{sought} R@{k}" for k in CUTOFFS}
        titles[f"{sought}_retrieval_median_rank"] = f"{sought} median"
    return titles


def run_name(checkpoint: Folder) -> str:
    """The run that a checkpoint folder RUN/checkpoints/step_... belongs to, or the name of the folder around it."""
    parts = Path(checkpoint.path).parts[:-1]
    if parts and parts[-1] == "checkpoints":
        parts = parts[:-1]
    return parts[-1].strip("/") if parts else ""
