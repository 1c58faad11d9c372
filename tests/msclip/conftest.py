"""The one session on two processes that several files of tests look at."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.msclip.two_ranks import FINETUNING, STEPS, tiny_engine, tiny_model, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def one_process() -> dict[str, Any]:
    """A run of this process alone, in plain PyTorch: metrics, and its states at half time and at the end."""
    engine = tiny_engine(tiny_model())
    metrics = train(engine, STEPS // 2)
    half = engine.full_state()
    metrics += train(engine, STEPS // 2)
    return {"metrics": metrics, "half": half, "end": engine.full_state()}


@pytest.fixture(scope="session")
def one_finetuning() -> dict[str, Any]:
    """The same with layer-wise decay and an average of the weights, which is each state's third part."""
    engine = tiny_engine(tiny_model(), **FINETUNING)
    train(engine, STEPS // 2)
    half = (*engine.full_state(), engine.averaged_state())
    train(engine, STEPS // 2)
    return {"half": half, "end": (*engine.full_state(), engine.averaged_state())}


@pytest.fixture(scope="session")
def two_ranks(
    one_process: dict[str, Any], one_finetuning: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> list[dict[Any, Any]]:
    """What each of two processes observed; see `two_ranks.py`."""
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.save(one_process["half"], folder / "start.pt")
    torch.save(one_finetuning["half"], folder / "finetuned.pt")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.msclip.two_ranks", str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(output)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
