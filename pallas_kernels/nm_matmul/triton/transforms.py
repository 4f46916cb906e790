"""A launch that is differentiated as plain JAX is."""

from collections.abc import Callable
from typing import Any

import jax


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
