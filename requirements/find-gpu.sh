#!/usr/bin/env bash
# Print the name of the first NVIDIA GPU that the driver lists; fail if it lists none. That
# nvidia-smi exists says little: images made for GPUs have it wherever they run.
set -u
listed=$(nvidia-smi -L 2>/dev/null) || exit 1
first=$(grep -m 1 -E '^GPU [0-9]+: ' <<< "$listed") || exit 1
name=${first#*: }
echo "${name% (UUID*}"
