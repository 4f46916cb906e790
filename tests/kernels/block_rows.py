"""Products of rows with a block-sparse weight, through a plan of the Hopper kernels."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_sparse_matmul.mosaic_sm90 import products
from pallas_kernels.block_sparse_matmul.mosaic_sm90.kernel import multiply_lists
from pallas_kernels.doctor.oracles import error, make_normal
from tests.kernels.interpreter import hopper


def check_rows(
    num_rows, blocks, mask, *, transposed=False, planned_for=1, num_programs=1, times=()
):
    """Multiply through a plan, with a bias, and compare with the product of the masked weight.

    Args:
      mask: [I, J] of the weight.
      transposed: multiply by the transposed weight.
      planned_for: processors that the plan is made for.
      times: what `hopper` takes.

    Returns:
      tuple of the product and the plan.
    """
    mask = np.asarray(mask, bool)
    shape = tuple(count * side for count, side in zip(mask.shape, blocks, strict=True))
    inner, columns = shape[::-1] if transposed else shape
    lhs, w, bias = make_normal(((num_rows, inner), shape, (columns,)), "bfloat16")
    plan = products.make_row_plan(
        num_rows, shape, mask.shape, transposed=transposed, num_programs=planned_for
    )
    rows = mask if transposed else mask.T
    entries = jnp.asarray(np.argsort(~rows, axis=1, kind="stable"), jnp.int32)
    lists = products._start_longest_first(jnp.asarray(rows.sum(1)), entries)

    @jax.jit
    def multiply(lhs, w, lists, bias):
        shape = (num_rows, columns)
        return multiply_lists(lhs, w, lists, bias, shape, plan, num_programs=num_programs)

    with hopper(*times):
        got = jax.block_until_ready(multiply(lhs, w, lists, bias))
    kept = np.where(np.kron(mask, np.ones(blocks)), np.asarray(w, np.float32), 0)
    expected = np.asarray(lhs, np.float32) @ (kept.T if transposed else kept)
    expected += np.asarray(bias, np.float32)
    # An f32 sum, rounded once.
    assert error(got, expected) <= 2.0**-8 * np.abs(expected).max()
    return got, plan
