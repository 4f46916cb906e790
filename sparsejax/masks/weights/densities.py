"""How a density of all sparse weights is divided among layers."""

import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

type DensityMethod = Literal["erdos_renyi", "uniform"]
"""How `layer_densities` divides a density."""


def layer_densities(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    density: float,
    method: DensityMethod = "erdos_renyi",
) -> dict[str, float]:
    """Return a density for every layer so that all together have the one asked for.

    erdos_renyi: density_l = min(1, eps (K_l + N_l) / (K_l N_l)),
                 eps such that sum_l density_l n_l = density sum_l n_l
    uniform:     density_l = density

    Small layers are denser. Layers that eps would make denser than 1 become dense, and eps is
    solved for the others. For matrices this equals the Erdos-Renyi-kernel rule of RigL.

    Args:
      shapes: layer name -> (..., K, N), shape of its weight; leading axes are stacked layers of
        one density.
      density: fraction of all these weights that is kept, in (0, 1].
      method: "erdos_renyi" or "uniform".

    Returns:
      dict, layer name -> float in (0, 1].

    Raises:
      ValueError: if there are no shapes, one is not a shape of matrices, the density is not in
        (0, 1], or the method is unknown.

    References:
      Mocanu et al., SET, arXiv:1707.04780; Evci et al., RigL, arXiv:1911.11134, section 3.

    Example:
      >>> shapes = {"up": (12, 768, 3072), "down": (12, 3072, 768), "head": (50304, 768)}
      >>> densities = layer_densities(shapes, density=0.1)
      >>> [f"{density:.4f}" for density in densities.values()]
      ['0.1082', '0.1082', '0.0879']
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got density={density}")
    overall, per_layer = _make_curves(shapes, method)
    return {name: float(np.interp(density, overall, curve)) for name, curve in per_layer.items()}


def layer_densities_at(
    density: jax.typing.ArrayLike,
    shapes: Mapping[str, tuple[int, ...]],
    *,
    method: DensityMethod = "erdos_renyi",
) -> dict[str, jax.Array]:
    """Return the density of every layer for an overall density that is an array.

    density_l(density) is piecewise linear: its slope changes where a layer becomes dense. These
    points, one per distinct shape, are computed while tracing, and the density is interpolated
    between them. This serves any schedule, even one not known in advance.

    Args:
      density: f32[...], fraction of all these weights that is kept; below 0 it counts as 0, above
        1 as 1. A traced value does not recompile.
      shapes: as `layer_densities`.
      method: as `layer_densities`.

    Returns:
      dict, layer name -> f32[...], within 1e-6 of `layer_densities`; exactly 1 at density 1.

    Raises:
      ValueError: as `layer_densities`, but for the density.

    References:
      As `layer_densities`.

    Example:
      >>> shapes = {"small": (64, 64), "large": (4096, 4096)}
      >>> layer_densities_at(jnp.array([0.01, 1.0]), shapes)["small"]
      Array([0.6303076, 1.       ], dtype=float32)
    """
    overall, per_layer = _make_curves(shapes, method)
    density, overall = jnp.asarray(density, jnp.float32), jnp.array(overall, jnp.float32)

    def interpolate(curve):
        return jnp.interp(density, overall, jnp.array(curve, jnp.float32))

    return {name: interpolate(curve) for name, curve in per_layer.items()}


def _make_curves(
    shapes: Mapping[str, tuple[int, ...]], method: DensityMethod
) -> tuple[list[float], dict[str, list[float]]]:
    """Return overall densities from 0 to 1, and the density of every layer at each of them."""
    if not shapes:
        raise ValueError("shapes must hold at least one layer")
    if method not in ("erdos_renyi", "uniform"):
        raise ValueError(f"method must be 'erdos_renyi' or 'uniform', got method={method!r}")
    for name, shape in shapes.items():
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"a shape must be (..., K, N), all positive, got {name!r}: {shape}")

    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    if method == "uniform":
        per_eps = dict.fromkeys(shapes, 1.0)
    else:
        per_eps = {
            name: (rows + columns) / (rows * columns)
            for name, (*_, rows, columns) in shapes.items()
        }
    # A layer becomes dense at eps = 1 / its density per eps.
    corners = sorted(set(per_eps.values()), reverse=True)
    per_layer = {
        name: [0.0] + [min(1.0, value / corner) for corner in corners]
        for name, value in per_eps.items()
    }
    total = sum(sizes.values())
    overall = [
        sum(sizes[name] * curve[index] for name, curve in per_layer.items()) / total
        for index in range(len(corners) + 1)
    ]
    return overall, per_layer
