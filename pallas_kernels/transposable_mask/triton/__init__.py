"""Transposable masks in Triton, on NVIDIA GPUs since Ampere."""

from pallas_kernels.transposable_mask.triton.search import check as check
from pallas_kernels.transposable_mask.triton.search import run as run
