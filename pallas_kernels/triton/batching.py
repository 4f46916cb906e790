"""vmap of launches: the axis that it adds joins one that the kernel has, in one launch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.meshes import vary_like


def fold_vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let vmap batch a function whose arrays have a leading axis of examples.

    Args:
      function: (*pytrees of arrays) -> pytree of arrays. The leading axis of an argument's arrays
        is the number of examples, or 1 where all examples share them; results have all examples.
        What it needs besides is bound beforehand.

    Returns:
      The function; under vmap it is called with the new axis folded into the leading one, and
      arguments that all examples share are not copied for each.
    """

    # The type of a launch does not say that what it writes varies from device to device.
    @jax.custom_batching.custom_vmap
    def run(*arguments):
        return vary_like(function(*arguments), arguments)

    def run_batched(axis_size, in_batched, *arguments):
        leaves = zip(jax.tree.leaves(arguments), jax.tree.leaves(in_batched), strict=True)
        examples = max(x.shape[1 if is_batched else 0] for x, is_batched in leaves)

        def fold(x, is_batched):
            if not is_batched and x.shape[0] == 1:
                return x
            rest = x.shape[1 + is_batched :]
            x = x if is_batched else x[None]
            return jnp.broadcast_to(x, (axis_size, examples, *rest)).reshape(-1, *rest)

        folded = (jax.tree.map(fold, x, b) for x, b in zip(arguments, in_batched, strict=True))
        results = run(*folded)
        results = jax.tree.map(lambda x: x.reshape(axis_size, examples, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    run.def_vmap(run_batched)
    return run


def repeat_shared[Arrays](arrays: Arrays) -> Arrays:
    """Give each example a copy of what all of them share, for kernels that share nothing.

    Args:
      arrays: pytree of arrays, each with a leading axis of examples or of 1.
    """
    examples = max(x.shape[0] for x in jax.tree.leaves(arrays))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (examples, *x.shape[1:])), arrays)
