"""`ray submit` carries one file, `pipelines/train.py`, to the head's home and runs it there by name.

The whole path is Ray's own: launcher, upload, login shell. Only ssh and rsync are stand-ins that stay on this machine, and the
"head" starts no Ray, since the script is asked for its settings alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "pipelines" / "train.py"

# Drops ssh's own options up to user@host and hands the rest to a shell, as sshd does.
SSH = """#!/bin/bash
while [ $# -gt 0 ]; do case "$1" in *@*) shift; break;; *) shift;; esac; done
exec bash -c "$*"
"""
RSYNC = """#!/bin/bash
from="${@: -2:1}" to="${@: -1}"; to="${to#*@*:}"
exec cp -r "$from" "${to/#\\~/$HOME}"
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The head's home, whose shell finds this interpreter and this package as cluster/setup_node.sh would have it."""
    home = tmp_path / "home"
    home.mkdir()
    home.joinpath(".bashrc").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH" PYTHONPATH="{ROOT}"\n')
    return home


@pytest.fixture
def environment(tmp_path: Path, home: Path) -> dict[str, str]:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("ssh", SSH), ("rsync", RSYNC)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return os.environ | {"HOME": str(home), "PATH": path, "RAY_TMPDIR": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    path = tmp_path / "local.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "cluster_name": "msclip-test",
                "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
                "auth": {"ssh_user": "nobody"},
                "head_start_ray_commands": [],
                "worker_start_ray_commands": [],
            }
        )
    )
    return path


def test_the_training_script_alone_in_a_folder_runs(tmp_path: Path) -> None:
    shutil.copy(SCRIPT, tmp_path)
    done = subprocess.run(
        [sys.executable, "train.py", "--config", "demo", "--optim.lr", "0.125", "--print_config"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["optim"]["lr"] == 0.125


@pytest.mark.parametrize(("lr", "status"), [("0.125", 0), ("fast", 1)])
def test_ray_submit_hands_settings_over_and_a_mistake_in_them_back(
    environment: dict[str, str], cluster_file: Path, home: Path, lr: str, status: int
) -> None:
    command = ["ray", "submit", "--start", "--no-config-cache", str(cluster_file), str(SCRIPT), "--"]
    command += ["--config", "demo", "--optim.lr", lr, "--print_config"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == status, output
    assert (home / "train.py").read_bytes() == SCRIPT.read_bytes()
    assert (f"lr: {lr}" if status == 0 else '"optim.lr"') in output
