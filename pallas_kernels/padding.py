"""Arrays filled up to what kernels take."""

import jax
import jax.numpy as jnp


def pad_rows(array: jax.Array, multiple: int) -> jax.Array:
    """Append rows of zeros.

    Args:
      array: [M, N].
      multiple: int, that the rows of the result are a multiple of.

    Returns:
      [M + missing, N].
    """
    missing = -array.shape[0] % multiple
    return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
