"""Pruning to 2:4 at random, without bias.

Letters: G groups of four.
"""

import jax

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.meshes import name_axes, run_on_mesh, vary_like
from pallas_kernels.nm_matmul.backends import PRUNE_BACKENDS
from pallas_kernels.nm_matmul.call import PruneArrays, PruneFacts
from pallas_kernels.nm_matmul.mvue import GROUP, draw_bits


def prune_mvue(
    x: jax.Array,
    key: jax.Array,
    *,
    axis: int,
    exact: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Keep two of every four consecutive entries, without bias.

    E[pruned] = x,  pruned_i = x_i / P(i is kept) where kept, 0 elsewhere

    Approximate: two draws without replacement with probability proportional to a = |x| + floor,
      P(i, j kept) = t_i t_j (1 / (1 - t_i) + 1 / (1 - t_j)),  t = a / sum a
    Exact: for a_1 <= a_2 <= a_3 <= a_4 of sum S, P(i kept) = 2 a_i / S, or, where a_4 exceeds the
    sum T of the others, P(4 kept) = 1 and P(i kept) = a_i / T.

    Args:
      x: float[..., 4 G, ...], what is pruned.
      key: key[], typed random key; equal keys give equal results.
      axis: int, axis of x in which groups lie; a multiple of 4 long.
      exact: bool, whether the variance is the least possible; the approximation has 6 % more on
        Gaussian groups, 2.011 against 1.895 at unit variance, and sorts nothing.
      implementation: "triton", one kernel; "xla"; or None: the kernel where it was proven and is
        faster, else "xla".

    Returns:
      tuple of pruned, shaped and typed like x, and mask, bool shaped like x, with exactly two
      True in every group, also in one of zeros.

    Raises:
      ValueError: if the axis does not hold whole groups.
      NotImplementedError: if `implementation` names a backend that does not run on the device, or
        not with this dtype; the message says which.

    Numerics:
      f32 inside; rounded to the dtype of x last. A kept value is at most the sum of its group's
      magnitudes. Probabilities carry an error of 2^-22. A group with NaN or infinity keeps one.
      Backends draw the same random bits. Where exact, they return the same bits as well. Else
      "triton" rounds every operation by itself, to nearest. So does XLA, but that it divides on a
      GPU to within 2 units in the last place, and on a CPU may round a product and a sum at once:
      a kept value then differs by a few units of f32, before it is rounded, and about one group in
      a million keeps another pair.

    References:
      FST, arXiv:2404.01847, section 5; Chmiel et al., arXiv:2203.10991, for the estimator. The
      floor is 2^-23 in the published kernel; here it is 2^-23 of the group's sum, the same for
      gradients of order 1 and still small for those of a loss that was not scaled up. The exact
      probabilities are not those of the published routine, which is biased.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.array([3.0, 0.0, 0.0, -1.0])
      >>> pruned, mask = prune_mvue(x, jax.random.key(0), axis=0, exact=True)
      >>> pruned.tolist(), mask.tolist()
      ([3.0, 0.0, 0.0, -1.0], [True, False, False, True])
    """
    axis = range(x.ndim)[axis]
    if x.shape[axis] % GROUP:
        raise ValueError(f"axis {axis} of x must be a multiple of {GROUP} long, got {x.shape=}")
    facts = PruneFacts(shape=x.shape, axis=axis, dtype=x.dtype.name, exact=exact)

    def prune(x, key, *, whole):
        backend = choose_backend("prune_mvue", PRUNE_BACKENDS, implementation, facts, whole=whole)
        results = backend.run(PruneArrays(x, draw_bits(key, x.shape, axis)), facts)
        return vary_like(results, x)

    axes = name_axes(x.ndim)
    return run_on_mesh(prune, (x, key), (axes, ""), (axes, axes), parts={})
