"""The products in plain JAX, with work in proportion to the kept blocks.

Trip counts are traced values: no capacity is fixed, and a new mask needs no compilation. There are
two forms: one block after another on a CPU, all columns (or rows) of blocks at once on a GPU.
"""

import jax

from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts
from pallas_kernels.block_sparse_matmul.products import BlockProducts, multiply_blocks
from pallas_kernels.block_sparse_matmul.xla import parallel, serial
from pallas_kernels.dispatch import targets_gpu

_SERIAL = BlockProducts(serial.multiply, serial.multiply_transposed, serial.multiply_gradient)
_PARALLEL = BlockProducts(
    parallel.multiply, parallel.multiply_transposed, parallel.multiply_gradient
)


def run(arrays: BlockArrays, facts: BlockFacts) -> jax.Array:
    """Multiply by the kept blocks, and differentiate likewise.

    Returns:
      float[M, N], typed like x.
    """
    del facts
    return multiply_blocks(arrays, _PARALLEL if targets_gpu() else _SERIAL)
