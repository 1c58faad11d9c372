"""Ray, as the jobs use it: joining a cluster, checking that it is large enough, and a training worker's place in it."""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from msclip.errors import UserError
from msclip.storage import Folder
from pipelines.jobs import ClusterConfig

# What every worker needs, also on another node. Credentials of the storage are the nodes' own business.
WORKER_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning",
}
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_REGION", "NCCL_NVLS_ENABLE")


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[bool]:
    """Joins the cluster that `config` names, or starts one on this machine and stops it at the end.

    Yields whether it was started here.

    Raises:
        UserError: there is no cluster at that address.
    """
    for name, value in (("RAY_TRAIN_V2_ENABLED", "1"), ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():  # a caller's own session, as in tests and the demo
        yield False
        return
    variables = WORKER_ENV | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    options: dict[str, Any] = {
        "runtime_env": {"env_vars": variables},
        "log_to_driver": config.logs,
        "logging_level": logging.INFO if config.logs else logging.WARNING,
    }
    start = config.address == "local" or (config.address is None and not offered())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if start:
                # Reading holds a logical CPU while it waits, so training's own are added to the machine's.
                cpus = (os.cpu_count() or 1) + math.ceil(config.num_workers * config.cpus_per_worker)
                os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else is to join this one
                # It passes on a cloud's notice to a cluster's nodes, and would be a process to start beside the first batch.
                os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
                ray.init(address="local", num_cpus=max(4, cpus), include_dashboard=False, **options)
            else:
                ray.init(address=config.address or "auto", **options)
        except ConnectionError as error:
            raise UserError(
                f"no Ray cluster answers at cluster.address {config.address or 'auto'}: {error}; start one with `ray up` or "
                "`ray start --head`, or set cluster.address local"
            ) from None
    try:
        yield start
    finally:
        ray.shutdown()


def offered() -> bool:
    """Whether RAY_ADDRESS names a cluster, or one that `ray start` made runs here; private ones of programs do not count."""
    if os.environ.get("RAY_ADDRESS"):
        return True
    from ray._private.services import find_gcs_addresses
    from ray._private.utils import read_ray_address

    return read_ray_address() in find_gcs_addresses()


def uses_gpu(config: ClusterConfig, started: bool) -> bool:
    """Whether this job trains on GPUs.

    Args:
        started: the cluster was started by this process, with more logical CPUs than the machine has.

    Raises:
        UserError: the cluster has fewer CPUs or GPUs than the job wants and nothing will add any.
    """
    import ray

    have = ray.cluster_resources()
    if config.autoscaling and config.use_gpu is None and not have.get("GPU", 0):
        raise UserError("cluster.use_gpu must be true or false with cluster.autoscaling: the cluster has no GPU yet, got null")
    gpu = have.get("GPU", 0) > 0 if config.use_gpu is None else config.use_gpu
    if config.autoscaling:
        return gpu
    if gpu and have.get("GPU", 0) < config.num_workers:
        raise UserError(
            f"cluster.num_workers asks for {config.num_workers} GPUs and the cluster has {have.get('GPU', 0):g}; lower it, set "
            "cluster.use_gpu false, or set cluster.autoscaling true if nodes are to be added"
        )
    workers = config.num_workers * config.cpus_per_worker
    cpus, wanted = have.get("CPU", 0), workers + 1  # one to read data with
    if started:
        cpus, wanted = os.cpu_count() or 1, workers
    if wanted > cpus:
        raise UserError(
            f"cluster.num_workers {config.num_workers} with cluster.cpus_per_worker {config.cpus_per_worker:g}, and 1 CPU to "
            f"read data with, ask for {wanted:g} CPUs and the cluster has {cpus:g}; lower one of them, or set "
            "cluster.autoscaling true if nodes are to be added"
        )
    return gpu


class RayRun:
    """A training worker of Ray Train, as the loop sees it."""

    def __init__(self, folder: Folder):
        import ray.train

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world_size: int = context.get_world_size()
        self.local_world_size: int = context.get_local_world_size()
        self.folder = folder

    @cached_property
    def device(self) -> torch.device:
        """The GPU that Ray gave this worker, else the CPU."""
        from ray.train.torch import get_device

        return get_device()
