"""Products with a block-sparse weight in plain JAX, on every device."""

from pallas_kernels.block_sparse_matmul.xla.products import run as run
