"""The products in plain JAX.

There are two forms. On a CPU, one block after another, with work in proportion to the kept blocks,
or the masked weight in one dense product where so many are kept that it takes less time. On a GPU,
all columns (or rows) of blocks at once. Which blocks are kept is data: no capacity is fixed, and a
new mask needs no compilation.
"""

import math
from collections.abc import Callable

import jax

from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts, find_sides
from pallas_kernels.block_sparse_matmul.products import BlockProducts, multiply_blocks
from pallas_kernels.block_sparse_matmul.xla import masked, parallel, serial
from pallas_kernels.choosing import choose_cheaper
from pallas_kernels.dispatch import targets_gpu

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


def find_break_even(block: tuple[int, int]) -> float:
    """Return the density from which the masked dense product takes less time than the kept blocks.

    Between what two machines of two cores have measured with forward and backward of 2048 tokens,
    weights of 128 x 384 to 768 x 3072 and blocks of 16 to 64: of 64, a quarter and four tenths. A
    product of one block never runs at half the rate of a large one.

    Args:
      block: (rows, columns).

    Returns:
      float, at most 1/3.
    """
    return min(math.sqrt(math.prod(block)) / 200, 1 / 3)


def choose_by_mask(
    loops: Callable[..., jax.Array], dense: Callable[..., jax.Array], *, is_gradient: bool = False
) -> Callable[..., jax.Array]:
    """Return a product that decides between two forms while it runs, by what the mask keeps.

    Under `jax.vmap` one form runs for all masks: that for the average density.

    Args:
      loops: a product of `BlockProducts`, whose work follows the mask.
      dense: the same product, for masks that keep many blocks.
      is_gradient: bool, of the product for dw.

    Returns:
      function with the arguments of both.
    """

    def multiply(left, right, mask_IJ, *bias):
        shape = (left.shape[1], right.shape[1]) if is_gradient else right.shape
        break_even = find_break_even(find_sides(mask_IJ, shape))
        costs = mask_IJ.sum(), break_even * mask_IJ.size
        return choose_cheaper(costs, loops, dense, left, right, mask_IJ, *bias)

    return multiply


_SERIAL = BlockProducts(
    choose_by_mask(serial.multiply, masked.multiply),
    choose_by_mask(serial.multiply_transposed, masked.multiply_transposed),
    choose_by_mask(serial.multiply_gradient, masked.multiply_gradient, is_gradient=True),
)
