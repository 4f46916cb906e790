"""Products with block-sparse weights on Hopper GPUs."""

from pallas_kernels.block_sparse_matmul.mosaic_sm90.products import check as check
from pallas_kernels.block_sparse_matmul.mosaic_sm90.products import run as run
from pallas_kernels.block_sparse_matmul.mosaic_sm90.products import tile as tile
