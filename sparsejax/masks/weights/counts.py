"""How many entries a mask keeps, drops and grows, in exact integers.

f32 holds integers up to 2^24 only, and the head of GPT-2 has 38.6 million weights. So the product
of a count and a fraction is computed in integers, with the fraction as a multiple of 2^-31.
"""

import jax
import jax.numpy as jnp

from sparsejax.masks.weights.selection import MAX_ENTRIES


def count_kept(size: int, density: jax.typing.ArrayLike) -> jax.Array:
    """Return the number of entries that a density keeps.

    kept = ceil(density size)

    A product that exceeds a whole number by less than 2^-20 of it, and by at most half an entry, is
    not rounded up, since the excess may come from rounding the density to f32: 0.1 of 1000 is 100,
    although 0.1 as f32 is more than a tenth. A positive density keeps at least one entry.

    Args:
      size: entries of a layer, 1 to 2^31 - 1.
      density: f32[...], fraction kept; below 0 it counts as 0, above 1 as 1.

    Returns:
      i32[...].

    Raises:
      ValueError: if `size` is out of range.

    Numerics:
      Integers: equal densities give equal counts on every device, and the count never falls as
      the density rises.

    Example:
      >>> count_kept(50304 * 768, jnp.array([0.0, 0.082, 1.0]))
      Array([       0,  3167945, 38633472], dtype=int32)
    """
    _check_size(size)
    whole, rest = _multiply(jnp.int32(size), density)
    kept = whole + (rest > _tolerance(whole))
    return jnp.where(jnp.asarray(density) > 0, jnp.maximum(kept, 1), kept)


def update_counts(
    kept: jax.Array,
    *,
    size: int,
    density: jax.typing.ArrayLike,
    update_fraction: jax.typing.ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Return how many entries an update of a mask drops and grows.

    delta    = kept - count_kept(size, density)
    num_drop = max(floor(update_fraction kept), delta)
    num_grow = num_drop - delta

    Afterwards the layer keeps exactly count_kept(size, density), whatever it kept before; if the
    density rises, it grows more than it drops. Both counts are feasible: 0 <= num_drop <= kept, and
    num_grow <= size - kept + num_drop, since dropped entries may grow again.

    MST's delta is floor((target sparsity - sparsity) size), the same in exact arithmetic. The floor
    tolerates the same rounding as the ceiling in `count_kept`.

    Args:
      kept: i32[...], entries that the mask keeps now, between 0 and `size`.
      size: entries of a layer, 1 to 2^31 - 1.
      density: f32[...], fraction kept afterwards; below 0 it counts as 0, above 1 as 1.
      update_fraction: f32[...], zeta, fraction of the kept entries to replace; as `density`.

    Returns:
      (num_drop, num_grow), each i32[...].

    Raises:
      ValueError: if `size` is out of range or `kept` is not of integers.

    Numerics:
      As `count_kept`.

    References:
      Hu, Li, Huang, MST, arXiv:2408.11746, as released.

    Example:
      >>> update_counts(jnp.int32(500), size=1000, density=0.4, update_fraction=0.3)
      (Array(150, dtype=int32), Array(50, dtype=int32))
    """
    kept = jnp.asarray(kept)
    if not jnp.issubdtype(kept.dtype, jnp.integer):
        raise ValueError(f"kept must be of integers, got kept.dtype={kept.dtype}")
    kept = kept.astype(jnp.int32)
    delta = kept - count_kept(size, density)
    whole, rest = _multiply(kept, update_fraction)
    replaced = jnp.minimum(whole + (jnp.uint32(2**31) - rest <= _tolerance(whole + 1)), kept)
    num_drop = jnp.maximum(replaced, delta)
    return num_drop, num_drop - delta


def _multiply(count: jax.Array, fraction: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Return floor(count fraction) as i32 and the rest as u32 in units of 2^-31."""
    fraction = jnp.clip(jnp.asarray(fraction, jnp.float32), 0, 1)
    # Exact: a power of two. What lies below 2^-31 is cut off.
    scaled = (fraction * 2.0**31).astype(jnp.uint32)
    # 31 bits times 32 bits, in halves of 16 bits; no sum reaches 2^32.
    count = count.astype(jnp.uint32)
    high, low = count >> 16, count & 0xFFFF
    scaled_high, scaled_low = scaled >> 16, scaled & 0xFFFF
    lowest = low * scaled_low
    middle = high * scaled_low + low * scaled_high + (lowest >> 16)
    upper = high * scaled_high + (middle >> 16)
    lower = (middle << 16) | (lowest & 0xFFFF)
    return ((upper << 1) | (lower >> 31)).astype(jnp.int32), lower & (2**31 - 1)


def _tolerance(whole: jax.Array) -> jax.Array:
    """Return the smaller of 2^-20 whole and a half, as u32 in units of 2^-31."""
    return jnp.minimum(whole, 2**19).astype(jnp.uint32) << 11


def _check_size(size: int) -> None:
    if not 1 <= size <= MAX_ENTRIES:
        raise ValueError(f"size must be from 1 to {MAX_ENTRIES}, got size={size}")
