"""One Ray for all tests of the jobs: of this process only, small, without a dashboard."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

# Before Ray is imported, by any test: it reads these then.
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",  # of the loopback S3; workers have the environment in which Ray started
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SECRET_ACCESS_KEY": "test",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # it passes on a cloud's notice; a process for each training
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_period_ms": "1000",  # a lost node is noticed after 5 s instead of 15
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.update(_ENVIRONMENT)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A cluster of four logical CPUs; it ends with the tests and touches no other Ray of the machine."""
    import ray

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets below it must have short names
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        object_store_memory=500 * 2**20,
        log_to_driver=False,
        logging_level=logging.WARNING,
        # DeepSpeed decorates a function that nobody calls with torch.compile, whose import takes each worker two seconds.
        runtime_env={"env_vars": _ENVIRONMENT | {"TORCHDYNAMO_DISABLE": "1"}},
        _temp_dir=folder,
    )
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
