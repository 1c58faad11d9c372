#!/usr/bin/env bash
# Makes a fresh Ubuntu node ready for Ray: an environment with msclip in the versions of constraints.txt, and the settings that
# `ray start`, `ray submit` and jobs share. `ray up` runs it again when the code changed; only msclip is then installed anew.
set -euo pipefail
code=$HOME/msclip
venv=$HOME/env

if ! dpkg --status python3-venv >/dev/null 2>&1; then
  cloud-init status --wait >/dev/null || true  # the first boot holds apt's lock; its own complaints are not ours
  sudo apt-get -o DPkg::Lock::Timeout=300 update --quiet
  sudo apt-get -o DPkg::Lock::Timeout=300 install --quiet --yes python3-venv
fi

# Nodes without a GPU start sooner with torch's CPU build: set TORCH_CPU_INDEX to the index that PyTorch's guide names for it.
nvidia-smi --list-gpus >/dev/null 2>&1 || export PIP_EXTRA_INDEX_URL="${TORCH_CPU_INDEX:-}"

[ -x "$venv/bin/python" ] || python3 -m venv "$venv"
"$venv/bin/python" -m pip install --quiet -c "$code/constraints.txt" pip setuptools wheel
DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet \
  -c "$code/constraints.txt" --build-constraint "$code/constraints.txt" "$code"

cat >"$HOME/.msclip_env" <<'SETTINGS'
export PATH="$HOME/env/bin:$PATH"
export RAY_AUTH_MODE=token
# A GPU node takes minutes to boot; Ray Train's own limit of one minute would ask for it again and again.
export RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="${RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S:-1200}"
SETTINGS
grep -qs msclip_env "$HOME/.bashrc" || echo 'source ~/.msclip_env' >>"$HOME/.bashrc"
