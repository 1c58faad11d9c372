"""A training job in this process alone: the code of the driver, of a worker and of the loop, without Ray Train and Ray Data.

It takes seconds where a job on Ray takes ten, which are for starting processes, and its losses are the same to the last bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from msclip import training
from msclip.data.decode import Encoded, read_units
from msclip.data.mixture import Mixture
from msclip.data.plan import Plan
from msclip.storage import Folder
from pipelines import train, worker


class _Run(training.LocalRun):
    local_world_size = 1


def _units(data: Mixture, plan: Plan, *place: Any) -> Iterator[Encoded]:
    return read_units(data, plan.units(*place), plan.seed)


def _fit(prepared: train.Prepared, folder: Folder, total_steps: int) -> int:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as Ray's workers have
    try:
        training.train(**worker.prepare(prepared))
    finally:
        torch.set_num_threads(threads)
    return 0


@contextmanager
def without_ray() -> Iterator[None]:
    """`train.main` inside trains here, as one worker, whatever `cluster.num_workers` says. Ray must run: the driver looks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "fit", _fit)
        patch.setattr(worker, "RayRun", _Run)
        patch.setattr(worker, "ray_units", _units)
        patch.setattr(worker, "RayHelpers", lambda *_: None)
        yield
