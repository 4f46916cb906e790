"""Sparse products, packing and pruning in Triton, on NVIDIA GPUs since Ampere."""

from pallas_kernels.nm_matmul.triton.pack import check_packing as check_packing
from pallas_kernels.nm_matmul.triton.pack import pack_weight as pack_weight
from pallas_kernels.nm_matmul.triton.pack import tile_packing as tile_packing
from pallas_kernels.nm_matmul.triton.products import check as check
from pallas_kernels.nm_matmul.triton.products import run as run
from pallas_kernels.nm_matmul.triton.products import tile as tile
from pallas_kernels.nm_matmul.triton.prune import check_pruning as check_pruning
from pallas_kernels.nm_matmul.triton.prune import prune as prune
from pallas_kernels.nm_matmul.triton.prune import tile_pruning as tile_pruning
