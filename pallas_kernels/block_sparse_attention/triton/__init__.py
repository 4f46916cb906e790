"""Block-sparse attention in Triton, on NVIDIA GPUs since Ampere."""

from pallas_kernels.block_sparse_attention.triton.attention import check as check
from pallas_kernels.block_sparse_attention.triton.attention import run as run
from pallas_kernels.block_sparse_attention.triton.attention import tile as tile
