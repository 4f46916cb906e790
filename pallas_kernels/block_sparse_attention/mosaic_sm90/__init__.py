"""Block-sparse attention on Hopper GPUs."""

from pallas_kernels.block_sparse_attention.mosaic_sm90.attention import check as check
from pallas_kernels.block_sparse_attention.mosaic_sm90.attention import run as run
from pallas_kernels.block_sparse_attention.mosaic_sm90.attention import tile as tile
