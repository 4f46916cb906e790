"""Product with an N:M sparse weight that trains.

  y = act(x (w * mask) + bias)

In f32, bf16 or f16, on any device. The mask may be a traced array: it changes between steps
without a new compilation.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.meshes import name_axes, run_on_mesh
from pallas_kernels.nm_matmul.activations import ACTIVATIONS, GATED
from pallas_kernels.nm_matmul.backends import BACKENDS
from pallas_kernels.nm_matmul.call import NMArrays, NMFacts
from pallas_kernels.nm_matmul.mask_check import check_known_mask, check_pattern
from pallas_kernels.nm_matmul.mvue import GROUP, draw_bits
from pallas_kernels.nm_matmul.packing import PackedNM, describe_compressed

type GradPruning = Literal["none", "mvue", "mvue_exact"]
type Activation = Literal["gelu", "geglu", "swiglu"]

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def nm_matmul(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array,
    *,
    transposable: bool = False,
    grad_pruning: GradPruning = "none",
    key: jax.Array | None = None,
    bits: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    packed: PackedNM | None = None,
    pattern: tuple[int, int] = (2, 4),
    check_mask: bool = True,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply by a weight of which n of every m consecutive entries are kept.

    z = x (w * mask) + bias,  y = act(z)
    dz = act'(z) dy,  dx = dz (w * mask)^T,  dw = x^T S(dz),  dbias = sum dz

    dw is dense and shaped like w: pruned entries get their gradient too (straight-through). S is
    the identity, or prunes dz to two of every four consecutive tokens, without bias
    (`prune_mvue`); tokens are counted over all leading axes of x together, and the last group is
    filled up with zeros.

    Args:
      x: float[..., K], in f32, bf16 or f16.
      w: float[K, N], the dense weight, dtype of x. What it holds where the mask is False, NaN too,
        has no effect.
      mask: bool[K, N], True = kept, at most n of every m consecutive along K. No gradient.
      transposable: bool, the mask keeps at most n of m along N as well, so that dx may be a sparse
        product too.
      grad_pruning: "none"; "mvue", dz is pruned by two draws; or "mvue_exact", with the least
        possible variance.
      key: key[], typed random key of the draws. Where `grad_pruning` is not "none", exactly one of
        key and bits is given; else neither.
      bits: uint32[..., N], random bits in the place of a key, one number for each column and each
        four consecutive tokens, as `draw_pruning_bits` draws them; any leading axes, with a
        row for every four of all tokens. Cut like the tokens, they prune the same on any number
        of devices. No gradient.
      bias: float[N] or None, dtype of x.
      activation: None; "gelu" (tanh form); or "geglu", "swiglu": columns 0..N/2 are the value,
        the others the gate, y = value * gelu(gate) or value * silu(gate).
      packed: PackedNM or None, what `pack_nm` returned for this w and mask: axis 0, or "both" if
        transposable. It is not compared with them and gets no gradient. "xla" and "reference" have
        no use for it and read w.
      pattern: (n, m). "mosaic_sm90" and "triton" know (2, 4).
      check_mask: bool, look at the values of a mask that is not traced. False for a weight whose
        mask may still keep everything: "xla" and "reference" compute with any mask; a kernel that
        packs the weight itself looks all the same.
      implementation: "xla", the dense product on the masked weight; "reference"; a kernel,
        "mosaic_sm90" on Hopper GPUs or "triton" on NVIDIA's since Ampere; or None: a kernel where
        it was proven and is faster, else "xla". A named one runs or raises.

    Returns:
      float[..., N], or [..., N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if a shape, dtype or option is not as described, or if the values of the mask are
        known while tracing and a group keeps too many; the first such group is named. Those of a
        traced mask are not looked at: what a kernel makes of such a group is unspecified.
      NotImplementedError: if `implementation` names a backend that does not run on the device,
        or not with these shapes, types or options; the message says which.

    Numerics:
      Products accumulate in f32; bias and activation are applied in f32 before the one rounding to
      the dtype of x. For the backward pass z and dz are rounded to it as well. Products of f32
      follow `jax_default_matmul_precision`, but for "reference", which computes in full f32
      throughout. Pruned gradients hold sums of four magnitudes: in f16, scale the loss accordingly.
      A mask that is not traced is copied to the host and checked at every call, unless
      `check_mask` is False.

    Derivatives:
      Reverse mode. "reference" is plain JAX where `grad_pruning` is "none": forward mode and
      reverse mode twice too; tangents of pruned weights pass straight through as well. "xla" adds
      forward mode of the gradient, for Hessian products; kernels refuse it.

    References:
      FST, arXiv:2404.01847, equations 2 to 4 and section 5.

    Example:
      >>> x, w = jnp.ones((3, 8)), jnp.ones((8, 2))
      >>> mask = jnp.arange(8)[:, None] % 4 < jnp.array([2, 1])
      >>> nm_matmul(x, w, mask)[0].tolist()
      [4.0, 2.0]
    """
    _check_arrays(x, w, mask, bias)
    _check_options(transposable, grad_pruning, activation, check_mask, w)
    _check_draws(grad_pruning, key, bits, x, w)
    _check_groups(mask, pattern, transposable)
    _check_packed(packed, w, transposable)
    if check_mask:
        check_known_mask(mask, pattern=pattern, transposable=transposable)

    def multiply(x, w, mask, packed, bias, key, bits, *, whole):
        inner, columns = w.shape
        x_MK = x.reshape(-1, inner)
        facts = NMFacts(
            rows=x_MK.shape[0],
            inner=inner,
            columns=columns,
            dtype=x.dtype.name,
            pattern=pattern,
            transposable=transposable,
            grad_pruning=grad_pruning,
            activation=activation,
            has_bias=bias is not None,
        )
        backend = choose_backend("nm_matmul", BACKENDS, implementation, facts, whole=whole)
        draws = key if bits is None else bits.reshape(-1, columns)
        out = backend.run(NMArrays(x_MK, w, mask, packed, bias, draws), facts)
        return (out.reshape(*x.shape[:-1], out.shape[-1]),)

    tokens = name_axes(x.ndim - 1)
    parts, bits_axes = dict.fromkeys(tokens, 1), ""
    if bits is not None and _follow_tokens(bits, x):
        # Parts hold whole groups, because bits are cut where tokens are; one group stays whole.
        bits_axes = tokens + "N"
        if bits.shape[-2] == 1:
            del parts[tokens[-1]]
    elif grad_pruning != "none":
        # Groups, and what a key draws for them, run on from one part to the next.
        parts = {}
    (out,) = run_on_mesh(
        multiply,
        (x, w, mask, packed, bias, key, bits),
        (tokens + "K", "KN", "KN", "", "N", "", bits_axes),
        (tokens if activation in GATED else tokens + "N",),
        parts=parts,
    )
    return out


def draw_pruning_bits(key: jax.Array, x_shape: tuple[int, ...], columns: int) -> jax.Array:
    """Draw the random bits of gradient pruning that `nm_matmul` would draw from a key.

    They are cut along tokens and columns as x and y are, for `jax.shard_map`, inside which a key
    draws the same bits on all devices; and on meshes with explicit axes.

    Args:
      key: key[], typed random key.
      x_shape: [..., T, K], of the x that `nm_matmul` is given.
      columns: int, N of the weight.

    Returns:
      uint32[..., T / 4, N]; where T is no multiple of 4, or x has one axis, uint32[ceil(M / 4), N]
      of all M tokens.

    Raises:
      ValueError: if the key is not one typed key.

    Example:
      >>> draw_pruning_bits(jax.random.key(0), (2, 8, 16), 4).shape
      (2, 2, 4)
      >>> draw_pruning_bits(jax.random.key(0), (3, 6, 16), 4).shape
      (5, 4)
    """
    _check_key(key)
    *leading, _ = x_shape
    tokens = math.prod(leading)
    bits = draw_bits(key, (tokens + -tokens % GROUP, columns), 0)
    if leading and leading[-1] % GROUP == 0:
        bits = bits.reshape(*leading[:-1], leading[-1] // GROUP, columns)
    return bits


def _follow_tokens(bits, x):
    """Whether bits have the axes of tokens, with one number for four of the last."""
    if bits.ndim != x.ndim or x.ndim == 1:
        return False
    return (*bits.shape[:-2], GROUP * bits.shape[-2]) == x.shape[:-1]


def _check_arrays(x, w, mask, bias):
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"x must be [..., K] and w [K, N], got {x.shape=}, {w.shape=}")
    if 0 in x.shape or 0 in w.shape:
        raise ValueError(f"x and w must not be empty, got {x.shape=}, {w.shape=}")
    if x.dtype not in _DTYPES or w.dtype != x.dtype:
        raise ValueError(
            f"x and w must share one of float32, bfloat16, float16, got {x.dtype=}, {w.dtype=}"
        )
    if mask.dtype != jnp.bool_ or mask.shape != w.shape:
        raise ValueError(f"mask must be bool{list(w.shape)}, got {mask.dtype}{list(mask.shape)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != w.shape[1:]):
        raise ValueError(
            f"bias must be {x.dtype}[{w.shape[1]}] or None, got {bias.dtype}{list(bias.shape)}"
        )


def _check_options(transposable, grad_pruning, activation, check_mask, w):
    for name, value in (("transposable", transposable), ("check_mask", check_mask)):
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be a bool, got {name}={value!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation in GATED and w.shape[1] % 2:
        raise ValueError(f"activation={activation!r} needs an even N, got {w.shape=}")
    if grad_pruning not in get_args(GradPruning.__value__):
        raise ValueError(
            f"grad_pruning must be one of {get_args(GradPruning.__value__)}, got {grad_pruning!r}"
        )


def _check_draws(grad_pruning, key, bits, x, w):
    given = [name for name, value in (("key", key), ("bits", bits)) if value is not None]
    if grad_pruning == "none":
        if given:
            raise ValueError(
                "key and bits must be None where grad_pruning='none', which draws nothing, "
                f"got {' and '.join(given)}"
            )
    elif len(given) != 1:
        raise ValueError(
            f"exactly one of key and bits must be given where {grad_pruning=}, "
            f"got {' and '.join(given) or 'neither'}"
        )
    elif bits is None:
        _check_key(key)
    else:
        tokens, columns = math.prod(x.shape[:-1]), w.shape[1]
        rows = -(-tokens // GROUP)
        is_shaped = bits.shape[-1:] == (columns,) and math.prod(bits.shape[:-1]) == rows
        if bits.dtype != jnp.uint32 or not is_shaped:
            raise ValueError(
                f"bits must be uint32[..., {columns}] of {rows} rows, one for every {GROUP} of "
                f"{tokens} tokens, got {bits.dtype}{list(bits.shape)}"
            )


def _check_key(key):
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise ValueError(
            f"key must be one typed key, as jax.random.key makes it, got {key.dtype}"
            f"{list(key.shape)}"
        )


def _check_groups(mask, pattern, transposable):
    check_pattern(pattern)
    for axis, name in enumerate("KN" if transposable else "K"):
        if mask.shape[axis] % pattern[1]:
            raise ValueError(
                f"{name} must be a multiple of {pattern[1]} for {pattern=}, {transposable=}, "
                f"got {name}={mask.shape[axis]}"
            )


def _check_packed(packed, w, transposable):
    if packed is None:
        return
    if not isinstance(packed, PackedNM):
        raise ValueError(f"packed must be a PackedNM or None, got {type(packed).__name__}")
    if packed.along_k is None or (transposable and packed.along_n is None):
        raise ValueError(
            f"packed must come from pack_nm(axis={'both' if transposable else 0!r}) for "
            f"{transposable=}, got along_k={'None' if packed.along_k is None else 'packed'}, "
            f"along_n={'None' if packed.along_n is None else 'packed'}"
        )
    if packed.shape != w.shape or packed.dtype != w.dtype:
        raise ValueError(
            "packed must have the shape and dtype of w, "
            f"got {packed.shape=}, {packed.dtype=}, {w.shape=}, {w.dtype=}"
        )
    # A kernel would read behind the end of a part that is too small.
    inner, columns = w.shape
    for name, sides in (("along_k", (columns, inner)), ("along_n", (inner, columns))):
        part = getattr(packed, name)
        for found, expected in zip(part or (), describe_compressed(*sides, w.dtype), strict=False):
            if (found.shape, found.dtype) != (expected.shape, expected.dtype):
                raise ValueError(
                    f"packed.{name} must hold {expected.dtype}{list(expected.shape)}, as pack_nm "
                    f"makes it, got {found.dtype}{list(found.shape)}"
                )
