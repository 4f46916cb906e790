"""Choose between two forms of a computation by what masks hold, while it runs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def choose_cheaper(
    costs: tuple[Any, Any], first: Callable[..., Any], second: Callable[..., Any], *operands: Any
) -> Any:
    """Run one of two functions: the second where it costs less.

    Under `jax.vmap` one of them runs for the whole batch, by the sum of its costs. With a choice
    for each example both would run, and one result be thrown away.

    Args:
      costs: of the first and of the second function, numbers that may be traced.
      first: function of the operands.
      second: function of the operands, with results of the same types.
      *operands: pytrees of arrays.

    Returns:
      what the function returns.
    """
    first_cost, second_cost = (jnp.asarray(cost, jnp.float32) for cost in costs)
    return jax.lax.cond(_costs_less(second_cost, first_cost), second, first, *operands)


@jax.custom_batching.custom_vmap
def _costs_less(cost: jax.Array, other: jax.Array) -> jax.Array:
    return cost < other


@_costs_less.def_vmap
def _cost_less_together(size, is_batched, *costs):
    sums = (x.sum(0) if batched else x * size for x, batched in zip(costs, is_batched, strict=True))
    return _costs_less(*sums), False
