"""Product with an N:M sparse weight that trains.

  y = act(x (w * mask) + bias)

In f32, bf16 or f16, on any device. The mask may be a traced array: it changes between steps
without a new compilation.

Letters: M rows (tokens)   K contracted axis   N columns of the weight.
"""

import logging
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import core

from pallas_kernels.dispatch import check_hopper, check_implementation, target_platform
from pallas_kernels.nm_matmul.activations import ACTIVATIONS, GATED
from pallas_kernels.nm_matmul.break_even import beats_dense
from pallas_kernels.nm_matmul.mask_check import check_nm_mask, check_pattern, checkify_nm_mask
from pallas_kernels.nm_matmul.mosaic_sm90 import make_products
from pallas_kernels.nm_matmul.pack import pack_nm
from pallas_kernels.nm_matmul.packing import TILE, PackedNM
from pallas_kernels.nm_matmul.reference import nm_matmul_reference
from pallas_kernels.nm_matmul.straight_through import multiply_straight_through
from pallas_kernels.nm_matmul.xla import XLA_PRODUCTS

type GradPruning = Literal["none", "mvue", "mvue_exact"]
type Activation = Literal["gelu", "geglu", "swiglu"]
type NMImplementation = Literal["mosaic_sm90", "xla", "reference"]
"""Names a caller may pass as `implementation`."""

NM_IMPLEMENTATIONS: tuple[str, ...] = get_args(NMImplementation.__value__)

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
_HOPPER_DTYPES = (jnp.bfloat16, jnp.float16)

_logger = logging.getLogger(__name__)


def nm_matmul(
    x: jax.Array,
    w: jax.Array,
    mask: jax.Array,
    *,
    transposable: bool = False,
    grad_pruning: GradPruning = "none",
    key: jax.Array | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    packed: PackedNM | None = None,
    pattern: tuple[int, int] = (2, 4),
    checkify_mask: bool = False,
    implementation: NMImplementation | None = None,
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
      key: key[], typed random key of the draws; given exactly where `grad_pruning` is not "none".
      bias: float[N] or None, dtype of x.
      activation: None; "gelu" (tanh form); or "geglu", "swiglu": columns 0..N/2 are the value,
        the others the gate, y = value * gelu(gate) or value * silu(gate).
      packed: PackedNM or None, what `pack_nm` returned for this w and mask: axis 0, or "both" if
        transposable. It is not compared with them and gets no gradient. "xla" and "reference" have
        no use for it and read w.
      pattern: (n, m). "mosaic_sm90" knows (2, 4).
      checkify_mask: bool, check a traced mask as well, under `checkify.checkify`.
      implementation: "xla", the dense product on the masked weight; "reference"; "mosaic_sm90"; or
        None to let `choose_nm_implementation` pick. A named one runs or raises.

    Returns:
      float[..., N], or [..., N / 2] for a gated activation, typed like x.

    Raises:
      ValueError: if a shape, dtype or option is not as described, or if the values of the mask are
        known while tracing and a group keeps too many; the first such group is named. Those of a
        traced mask are looked at with `checkify_mask` only; without, such a group is unspecified.
      NotImplementedError: if `implementation` names a backend that does not run on the device,
        or not with these shapes, types or options; the message says which.

    Numerics:
      Products accumulate in f32; bias and activation are applied in f32 before the one rounding to
      the dtype of x. For the backward pass z and dz are rounded to it as well. Products of f32
      follow `jax_default_matmul_precision`, but for "reference", which computes in full f32
      throughout. Pruned gradients hold sums of four magnitudes: in f16, scale the loss accordingly.
      A mask that is not traced is copied to the host and checked at every call.

    References:
      FST, arXiv:2404.01847, equations 2 to 4 and section 5.

    Example:
      >>> x, w = jnp.ones((3, 8)), jnp.ones((8, 2))
      >>> mask = jnp.arange(8)[:, None] % 4 < jnp.array([2, 1])
      >>> nm_matmul(x, w, mask)[0].tolist()
      [4.0, 2.0]
    """
    _check_arrays(x, w, mask, bias)
    _check_options(transposable, grad_pruning, key, activation, checkify_mask, w)
    _check_pattern_and_mask(mask, pattern, transposable, checkify_mask)
    _check_packed(packed, w, transposable)
    inner, columns = w.shape
    x_MK = x.reshape(-1, inner)
    chosen = choose_nm_implementation(
        implementation,
        rows=x_MK.shape[0],
        inner=inner,
        columns=columns,
        dtype=x.dtype,
        pattern=pattern,
        activation=activation,
    )
    options = {"activation": activation, "grad_pruning": grad_pruning}
    if chosen == "reference":
        out = nm_matmul_reference(x_MK, w, mask, key=key, bias=bias, **options)
    elif chosen == "xla":
        out = multiply_straight_through(
            x_MK, w, mask, None, bias, key, products=XLA_PRODUCTS, **options
        )
    else:
        check_hopper()
        if pattern != (2, 4):
            raise NotImplementedError(
                f"implementation='mosaic_sm90' takes pattern (2, 4), got {pattern}; 'xla' takes all"
            )
        products = make_products(w, transposable=transposable, **options)
        if packed is None:
            axis = "both" if transposable else 0
            packed = pack_nm(
                jax.lax.stop_gradient(w), mask, axis=axis, implementation="mosaic_sm90"
            )
        out = multiply_straight_through(
            x_MK, w, mask, packed, bias, key, products=products, **options
        )
    return out.reshape(*x.shape[:-1], out.shape[-1])


def choose_nm_implementation(
    implementation: NMImplementation | None = None,
    *,
    rows: int,
    inner: int,
    columns: int,
    dtype: jax.typing.DTypeLike,
    pattern: tuple[int, int] = (2, 4),
    activation: Activation | None = None,
) -> NMImplementation:
    """Return the implementation of `nm_matmul` that a call would run.

    A named implementation is returned as it is: it runs or raises, and is never replaced. With
    `None` the sparse kernels are taken where they were measured to be faster than the dense product
    on the masked weight, "xla" (`break_even.beats_dense`), and can run; as long as nothing is
    measured, that is nowhere.

    Args:
      implementation: name the caller passed, or None.
      rows: int, M, product of the leading axes of x.
      inner: int, K.
      columns: int, N, width of the weight.
      dtype: dtype of x and w.
      pattern: (n, m).
      activation: str or None, as passed to `nm_matmul`.

    Returns:
      str, "mosaic_sm90", "xla" or "reference".

    Raises:
      ValueError: if the name is none of these.

    Example:
      >>> choose_nm_implementation(rows=64, inner=64, columns=64, dtype="bfloat16")
      'xla'
    """
    if implementation is not None:
        if implementation == "dense":
            raise ValueError(
                "nm_matmul has no implementation 'dense': 'xla' is the dense product on the masked "
                f"weight; the others are {NM_IMPLEMENTATIONS}"
            )
        check_implementation(implementation, NM_IMPLEMENTATIONS)
        return implementation
    chosen: NMImplementation = "xla"
    width = 2 * TILE if activation in GATED else TILE
    known = pattern == (2, 4) and jnp.dtype(dtype) in _HOPPER_DTYPES
    known = known and inner % TILE == 0 and columns % width == 0
    if known and beats_dense(rows, inner, columns, dtype):
        try:
            check_hopper()
            chosen = "mosaic_sm90"
        except NotImplementedError:
            pass
    _logger.debug(
        "nm_matmul: chose %r for [%d, %d] x [%d, %d] on %s",
        *(chosen, rows, inner, inner, columns, target_platform()),
    )
    return chosen


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


def _check_options(transposable, grad_pruning, key, activation, checkify_mask, w):
    for name, value in (("transposable", transposable), ("checkify_mask", checkify_mask)):
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
    if grad_pruning == "none":
        if key is not None:
            raise ValueError("key must be None where grad_pruning='none', which draws nothing")
    elif key is None:
        raise ValueError(f"key must be given where grad_pruning={grad_pruning!r}")
    elif not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise ValueError(
            f"key must be one typed key, as jax.random.key makes it, got {key.dtype}"
            f"{list(key.shape)}"
        )


def _check_pattern_and_mask(mask, pattern, transposable, checkify_mask):
    check_pattern(pattern)
    for axis, name in enumerate("KN" if transposable else "K"):
        if mask.shape[axis] % pattern[1]:
            raise ValueError(
                f"{name} must be a multiple of {pattern[1]} for {pattern=}, {transposable=}, "
                f"got {name}={mask.shape[axis]}"
            )
        if not isinstance(mask, core.Tracer):
            try:
                check_nm_mask(mask, pattern=pattern, axis=axis)
            except ValueError as error:
                if axis == 1:
                    raise ValueError(f"transposable=True, but {error}") from None
                raise
        elif checkify_mask:
            checkify_nm_mask(mask, pattern=pattern, axis=axis)


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
