"""What an entry of a tile counts in the search."""

import jax
import jax.numpy as jnp


def find_most(dtype: str) -> float:
    """Return what a magnitude counts at most.

    It is a power of two, so that sums of up to eight are exact, and finite.

    Args:
      dtype: of the sums.

    Example:
      >>> find_most("float32") == 2.0**124
      True
    """
    return 2.0 ** (int(jnp.finfo(dtype).maxexp) - 4)


def cap_magnitudes(w: jax.Array) -> jax.Array:
    """Return magnitudes as they are summed, those of infinities and NaN finite.

    Args:
      w: float[...].

    Returns:
      f32[...], f64[...] of f64.
    """
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    magnitude = jnp.abs(w.astype(dtype))
    most = find_most(dtype.name)
    # A comparison with NaN is false.
    return jnp.where(magnitude < most, magnitude, most)
