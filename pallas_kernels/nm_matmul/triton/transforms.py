"""How a launch is transformed: batched in one launch, and differentiated as plain JAX is."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def fold_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let vmap batch a launch: the new axis joins the first one, in one launch.

    Args:
      function: of arrays; their first axis, and that of all results, counts problems that have
        nothing to do with each other.
    """

    @jax.custom_batching.custom_vmap
    def run(*arrays):
        return function(*arrays)

    @run.def_vmap
    def run_batched(axis_size, are_batched, *arrays):
        def fold(x, is_batched):
            x = x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = run(*map(fold, arrays, are_batched))
        unfolded = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), results)
        return unfolded, jax.tree.map(lambda _: True, results)

    return run


def differentiate_as(plain: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a launch the derivative of a function of the same values in plain JAX.

    Args:
      plain: of the same arguments and results.
      function: that is launched.
    """

    @jax.custom_jvp
    def run(*arrays):
        return function(*arrays)

    @run.defjvp
    def run_jvp(primals, tangents):
        _, result_tangents = jax.jvp(plain, primals, tangents)
        return run(*primals), result_tangents

    return run
