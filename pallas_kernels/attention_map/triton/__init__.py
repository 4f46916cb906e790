"""The mean softmax map in Triton, on NVIDIA GPUs since Ampere."""

from pallas_kernels.attention_map.triton.mean_map import check as check
from pallas_kernels.attention_map.triton.mean_map import run as run
from pallas_kernels.attention_map.triton.mean_map import tile as tile
