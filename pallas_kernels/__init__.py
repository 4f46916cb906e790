"""Sparse kernels behind pure functions: arrays in, arrays out."""

from pallas_kernels.block_sparse_attention import BlockSchedule as BlockSchedule
from pallas_kernels.block_sparse_attention import block_sparse_attention as block_sparse_attention
from pallas_kernels.block_sparse_attention import make_block_schedule as make_block_schedule
from pallas_kernels.dispatch import Implementation as Implementation
from pallas_kernels.dispatch import choose_implementation as choose_implementation
