"""Rotary position embedding: queries and keys turned by an angle that grows with the position.

Legend: B batch, T position, N heads, H head dim, h = H / 2 pairs of features.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.models.config import RotaryScaling, TransformerConfig


class Rotary(NamedTuple):
    """How fast each pair of features turns.

    Attributes:
      wavelength: base of the wavelengths, positions per radian.
      scaling: "none", "linear" or "llama3", as of `TransformerOptions`.
      factor: of the scaling, as of `TransformerOptions`.
      low_frequency_factor: likewise.
      high_frequency_factor: likewise.
      original_length: likewise.
    """

    wavelength: float = 10_000.0
    scaling: RotaryScaling = "none"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192


PLAIN_ROTARY = Rotary()
"""That of RoFormer."""


def get_rotary(config: TransformerConfig) -> Rotary | None:
    """Return the rotary embedding of a model, None where positions are learned."""
    if config.positions != "rotary":
        return None
    return Rotary(*(getattr(config, f"rotary_{name}") for name in Rotary._fields))


def compute_frequencies(head_dim: int, rotary: Rotary = PLAIN_ROTARY) -> np.ndarray:
    """Compute the angle that each pair of features turns by from one position to the next.

    f_i = wavelength^(-2 i / H), divided by `factor` under linear scaling. Under that of Llama 3,
    with w = 2 pi / f_i and L = original_length, low and high its two factors:

      f_i                         if w < L / high
      f_i / factor                if w > L / low
      (1 - s) f_i / factor + s f_i  otherwise, s = (L / w - low) / (high - low)

    Args:
      head_dim: int, H, even.
      rotary: base of the wavelengths, and their scaling.

    Returns:
      f32[H / 2], radians.

    References:
      Su et al., RoFormer, arXiv:2104.09864. Llama 3.1's configuration, arXiv:2407.21783.
    """
    frequencies = rotary.wavelength ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rotary.scaling == "linear":
        frequencies /= rotary.factor
    elif rotary.scaling == "llama3":
        low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
        turns = rotary.original_length * frequencies / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        frequencies *= share + (1 - share) / rotary.factor
    return frequencies.astype(np.float32)


def apply_rotary(
    x_BTNH: jax.Array, *, rotary: Rotary = PLAIN_ROTARY, positions_BT: jax.Array | None = None
) -> jax.Array:
    """Rotate pairs of features by an angle proportional to the position.

    (a, b) -> (a cos - b sin, b cos + a sin),  angle = t f_i

    Args:
      x_BTNH: float[B, T, N, H], H even; feature i is paired with i + H/2.
      rotary: Rotary, static.
      positions_BT: i32[B, T]; None counts from 0.

    Returns:
      float[B, T, N, H], same type; the rotation is computed in f32.

    Raises:
      ValueError: if H is odd.

    References:
      Su et al., RoFormer, arXiv:2104.09864, equation 34.
    """
    T, H = x_BTNH.shape[1], x_BTNH.shape[3]
    if H % 2:
        raise ValueError(f"x_BTNH must have an even head dim, got {x_BTNH.shape=}")
    if positions_BT is None:
        positions_BT = jnp.arange(T)[None]
    frequency_h = jnp.asarray(compute_frequencies(H, rotary))
    angle_BTh = positions_BT.astype(jnp.float32)[..., None] * frequency_h[None, None]
    cos, sin = (f(angle_BTh)[:, :, None] for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTNH.dtype)
