"""Products with block-sparse weights on NVIDIA GPUs since Ampere, in Triton."""

from pallas_kernels.block_sparse_matmul.triton.products import check as check
from pallas_kernels.block_sparse_matmul.triton.products import run as run
from pallas_kernels.block_sparse_matmul.triton.products import tile as tile
