#!/usr/bin/env bash
# Make $VENV/peers (.venv/peers): the locked packages, and PyTorch as pip's index has it.
set -eu
cd "$(dirname "$0")/.."
peers="${VENV:-.venv}/peers"
base=$(requirements/find-python.sh)
rm -rf "$peers"
"$base" -m venv "$peers"
echo "Installing requirements/train.txt and PyTorch into $peers (from PyPI for Linux, 5 GB)"
"$peers/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements/train.txt torch
touch "$peers.stamp"
