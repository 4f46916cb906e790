"""Masks on one's own arrays: keep a share at random, then drop and grow, count by count.

python -m examples.masks_of_arrays
"""

import jax
import jax.numpy as jnp

from sparsejax.masks import drop_and_grow, random_mask


def main(density=0.3, replaced=0.2, num_updates=5):
    """Let a mask follow the larger entries of a matrix; return what share of them it found."""
    w = jax.random.normal(jax.random.key(0), (64, 64))
    # Masks take counts, so that two of one density keep exactly as many.
    num_kept = round(density * w.size)
    mask = random_mask(jax.random.key(1), w.shape, num_kept)
    largest = jnp.abs(w) >= jnp.sort(jnp.abs(w).ravel())[-num_kept]
    found = [float(mask[largest].mean())]
    for _ in range(num_updates):
        num = round(replaced * num_kept)
        mask = drop_and_grow(mask, weight=w, grad=w, num_drop=num, num_grow=num)
        assert mask.sum() == num_kept
        found.append(float(mask[largest].mean()))
    return found


if __name__ == "__main__":
    print("share of the largest entries kept:", [f"{share:.2f}" for share in main()])
