"""Product with a weight that is sparse in blocks, and trains.

  y = x (w * mask) + bias,  dw = (x^T dy) * grad_mask

Both masks may be traced arrays: they change between steps without a new compilation, and the work
follows them.

Letters: M rows (tokens)   K contracted axis   N columns   I x J blocks of the weight.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.block_sparse_matmul.backends import BACKENDS
from pallas_kernels.block_sparse_matmul.call import BlockArrays, BlockFacts
from pallas_kernels.meshes import name_axes, run_on_mesh

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def block_sparse_matmul(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array,
    *,
    grad_mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply by the kept blocks of a weight.

    y = x (w * mask) + bias
    dx = dy (w * mask)^T,  dw = (x^T dy) * grad_mask,  dbias = sum dy

    A mask has an entry for every block; blocks are K / I by N / J. Only kept blocks are computed.
    The mask of the gradient is for methods that now and then need the gradient of pruned weights:
    pass `mask | wanted` with a traced flag, and the step that wants it pays for it.

    Args:
      x: float[..., K], in f32, bf16 or f16.
      w: float[K, N], dtype of x. What it holds in pruned blocks, NaN too, has no effect.
      mask: bool[I, J], True = kept; I divides K, J divides N. No gradient.
      grad_mask: bool[I, J], blocks of dw to compute, others are 0; None = those of `mask`.
      bias: float[N] or None, dtype of x.
      implementation: "xla", a loop over the kept blocks; "reference", dense products of the masked
        weight in f32; "mosaic_sm90", tensor cores of a Hopper GPU, for bf16 and f16 and blocks
        whose sides are 64 or 128; "triton", any NVIDIA GPU since Ampere (extra `triton`), blocks
        whose sides are multiples of 16; or None: the fastest kernel that was proven, where it is
        faster, else "xla". A named one runs or raises.

    Returns:
      float[..., N], typed like x; 0 and the bias where nothing of a column is kept.

    Raises:
      ValueError: if a shape or dtype is not as described, or the name is unknown.
      NotImplementedError: if `implementation` names a backend that does not run on the device, or
        not with these shapes or types.

    Numerics:
      Products accumulate in f32, block after block; the bias is added in f32, before the one
      rounding to the dtype of x. So it is with gradients. Products of f32 follow
      `jax_default_matmul_precision`, but for "reference" and "triton", which compute in full f32.

    Derivatives:
      Reverse mode. "reference" is plain JAX: forward mode and reverse mode twice too. "xla" adds
      forward mode of the gradient, for Hessian products; kernels add nothing.

    References:
      Gray, Radford, Kingma, GPU kernels for block-sparse weights, 2017.

    Example:
      >>> x, w = jnp.ones((3, 4)), jnp.ones((4, 6))
      >>> mask = jnp.array([[True, False, True], [True, False, False]])
      >>> block_sparse_matmul(x, w, mask)[0].tolist()
      [4.0, 4.0, 0.0, 0.0, 2.0, 2.0]
    """
    _check_arrays(x, w, bias)
    masks = {"mask": mask} | ({} if grad_mask is None else {"grad_mask": grad_mask})
    for name, value in masks.items():
        _check_mask(name, value, w.shape)
    if grad_mask is None:
        grad_mask = mask
    elif grad_mask.shape != mask.shape:
        raise ValueError(f"grad_mask must be bool{list(mask.shape)}, got {grad_mask.shape=}")

    def multiply(x, w, mask, grad_mask, bias, *, whole):
        x_MK = x.reshape(-1, w.shape[0])
        facts = BlockFacts(
            rows=x_MK.shape[0],
            shape=w.shape,
            grid=mask.shape,
            dtype=x.dtype.name,
            has_bias=bias is not None,
        )
        backend = choose_backend(
            "block_sparse_matmul", BACKENDS, implementation, facts, whole=whole
        )
        y = backend.run(BlockArrays(x_MK, w, mask, grad_mask, bias), facts)
        return (y.reshape(*x.shape[:-1], w.shape[1]),)

    tokens = name_axes(x.ndim - 1)
    (y,) = run_on_mesh(
        multiply,
        (x, w, mask, grad_mask, bias),
        (tokens + "K", "KN", "IJ", "IJ", "N"),
        (tokens + "N",),
        parts=dict.fromkeys(tokens, 1),
    )
    return y


def _check_arrays(x, w, bias):
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x must be [..., K] and w [K, N], got {x.shape=}, {w.shape=}")
    if 0 in x.shape or 0 in w.shape:
        raise ValueError(f"x and w must not be empty, got {x.shape=}, {w.shape=}")
    if x.dtype not in _DTYPES or w.dtype != x.dtype:
        raise ValueError(
            f"x and w must share one of float32, bfloat16, float16, got {x.dtype=}, {w.dtype=}"
        )
    if bias is not None and (bias.dtype != x.dtype or bias.shape != w.shape[1:]):
        raise ValueError(
            f"bias must be {x.dtype}[{w.shape[1]}] or None, got {bias.dtype}{list(bias.shape)}"
        )


def _check_mask(name, mask, shape):
    if mask.dtype != jnp.bool_ or mask.ndim != 2 or 0 in mask.shape:
        raise ValueError(f"{name} must be bool[I, J], got {mask.dtype}{list(mask.shape)}")
    if shape[0] % mask.shape[0] or shape[1] % mask.shape[1]:
        raise ValueError(
            f"{name} must be bool[I, J] with I a divisor of K and J of N, got {list(mask.shape)} "
            f"for a weight {list(shape)}"
        )
