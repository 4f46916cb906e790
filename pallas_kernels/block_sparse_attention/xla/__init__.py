"""Block-sparse attention in plain JAX, on every device."""

from pallas_kernels.block_sparse_attention.xla.attention import run as run
