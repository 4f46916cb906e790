#!/usr/bin/env bash
# Install a lock file (train, docs, dev, compile or cuda) into $VENV (.venv), which is made if it is
# not there. uv does it in seconds where it can be had; pip does it otherwise.
set -eu
cd "$(dirname "$0")/.."
lock="requirements/$1.txt"
venv="${VENV:-.venv}"
python="$venv/bin/python"

if ! "$python" -c '' 2>/dev/null; then
  base=$(requirements/find-python.sh) || {
    echo "No Python from 3.12 to 3.14 was found. Install one (Debian: apt install python3.12-venv," \
      "pyenv: pyenv install 3.12, uv: uv python install 3.12), or name it: make PYTHON=/path/to/python3.12" >&2
    exit 1
  }
  echo "Setting up $venv with $base"
  rm -rf "$venv"
  "$base" -m venv "$venv" || {
    rm -rf "$venv"
    echo "$base cannot make virtual environments: install its venv module (Debian: python3.12-venv)" >&2
    exit 1
  }
fi

options=(--quiet -r "$lock")
if [ "$1" = compile ]; then
  # Beside the environment, see tests/conftest.py; what it depends on is in the environment.
  rm -rf "$venv/compile"
  options+=(--no-deps --target "$venv/compile")
fi

find_uv() {
  command -v uv && return
  { [ -x "$venv/bin/uv" ] || "$python" -m pip install --quiet --disable-pip-version-check uv >&2; } \
    && echo "$venv/bin/uv"
}

if [ "$1" = cuda ] && gpu=$(requirements/find-gpu.sh); then
  echo "Found $gpu: installing $lock, 5.5 GB (make LOCK=train installs JAX for the CPU instead)"
else
  echo "Installing $lock"
fi
# uv leaves it to Python to compile what is imported first. Where Python may not write, every process
# would compile anew.
compile=${PYTHONDONTWRITEBYTECODE:+--compile-bytecode}
{ uv=$(find_uv) && "$uv" pip install --python "$python" $compile "${options[@]}"; } || {
  echo "uv could not do it, trying pip"
  "$python" -m pip install --disable-pip-version-check "${options[@]}"
}
