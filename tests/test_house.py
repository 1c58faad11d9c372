"""Who may import whom: the library stands alone, jobs stand on it and on Ray. And every shipped configuration can be read."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import msclip
from pipelines import cli
from pipelines.jobs import TrainJob

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "msclip").rglob("*.py"))
CONFIGS = sorted((ROOT / "pipelines" / "configs").glob("*.yaml"))

IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
sys.modules |= dict.fromkeys(("ray", "deepspeed", "pipelines"))  # None in sys.modules makes `import` fail
import msclip
names = [module.name for module in pkgutil.walk_packages(msclip.__path__, "msclip.")]
from msclip.kernels import BUILDABLE
for name in names:
    if BUILDABLE or not name.startswith("msclip.kernels."):
        importlib.import_module(name)
print(len(names))
"""


def imported(path: Path) -> Iterator[str]:
    """Top-level names of all packages that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_library_imports_neither_ray_nor_the_jobs(path: Path) -> None:
    assert not {"ray", "pipelines"} & set(imported(path))


def test_every_library_module_imports_without_ray_and_deepspeed_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EVERYTHING], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= len(LIBRARY) - 5  # packages' own __init__ files are not modules


def test_the_paper_models_and_both_recipes_ship_as_configurations() -> None:
    expected = {"ms_clip_s_b32", "ms_clip_s_b16", "ms_clip_b32", "ms_clip_s1", "clip_b32", "demo", "flickr8k", "finetune"}
    assert expected <= set(cli.shipped_configs())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_configuration_describes_a_training_job(path: Path) -> None:
    assert path.read_text().startswith("#"), "the first line says why the run exists"
    job = cli.parse(TrainJob, ["--config", path.stem])
    assert isinstance(job, TrainJob)
    assert msclip.build(job.model, device="meta").config == job.model


def test_the_order_in_the_adapters_is_chosen_on_the_command_line() -> None:
    model = msclip.build(
        cli.parse(TrainJob, ["--config", "ms_clip_s_b32", "--model.adapter_bn", "after_pw"]).model, device="meta"
    )
    assert model.get_submodule("branch.adapters.0.branch_bn").weight.shape == (768,)


def test_the_sigmoid_loss_is_chosen_on_the_command_line() -> None:
    said = ["--model.loss", "sigmoid", "--model.logit_bias_init", "-5"]
    model = msclip.build(cli.parse(TrainJob, ["--config", "ms_clip_s_b32", *said]).model, device="meta")
    assert model.logit_bias is not None
    assert model.config.logit_bias_init == -5
