"""The softmax map averaged over batch and heads, which is never held for a single head.

  A = 1/(B N) sum_bn exp(q_bn k_bn^T / sqrt(H) - lse_bn)

Letters: B T S N K H as everywhere (`sparsejax.types`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels.attention_map.backends import BACKENDS
from pallas_kernels.attention_map.call import MapArrays, MapFacts
from pallas_kernels.backends import Implementation, choose_backend
from pallas_kernels.meshes import run_on_mesh, vary_like

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def mean_attention_map(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    *,
    causal: bool = False,
    kv_mask_BS: jax.Array | None = None,
    lse: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Average the softmax map over batch and heads.

    A = 1/(B N) sum_bn exp(s_bn - lse_bn),  s = q k^T / sqrt(H),  lse_t = log sum_s exp(s_ts)

    A measurement of the model: no gradient passes.

    Args:
      q_BTNH: float[B, T, N, H], queries, in f32, bf16 or f16.
      k_BSKH: float[B, S, K, H], keys, dtype of q; K divides N (grouped queries).
      causal: bool, query t sees keys 0..t, counted from the start of both sequences.
      kv_mask_BS: bool[B, S], True = visible; None = all. What a removed key holds, NaN too, has no
        effect.
      lse: f32[B, T, N], as `block_sparse_attention(..., return_lse=True)` returns it where every
        block is kept and `causal` and `kv_mask` are those of this call; None: it is computed.
      implementation: "xla", a few rows at a time; "reference", every map written out, in f32;
        "mosaic_sm90", tensor cores of a Hopper GPU, for bf16 and f16, head dims 32, 64, 128 and 256
        and lengths that are multiples of 128; "triton", any NVIDIA GPU since Ampere (extra
        `triton`), head dims from 16 to 256 and any lengths; or None: the fastest kernel that was
        proven and is faster than "xla", else that. A named one runs or raises. Without `lse` a
        kernel computes it first: "mosaic_sm90" by a forward pass of attention, "triton" by a
        product of queries and keys.

    Returns:
      f32[T, S]; each row sums to 1 if every query sees a key. A query of an example that sees no
      key has no distribution and adds nothing.

    Raises:
      ValueError: if a shape, dtype or option is not as described, or the name is unknown.
      NotImplementedError: if `implementation` names a backend that does not run on the device, or
        not with these shapes or types; the message says which.

    Numerics:
      Products accumulate in f32; scores, softmax and sums are f32. Products of f32 follow
      `jax_default_matmul_precision`, but for "reference" and "triton", which compute in full f32.

    References:
      SPION, arXiv:2309.12578, and SAT, doi:10.1109/ACCESS.2024.3425638, look for their patterns in
      this map.

    Example:
      >>> q = k = jnp.ones((2, 4, 3, 8))
      >>> mean_attention_map(q, k, causal=True)[1].tolist()
      [0.5, 0.5, 0.0, 0.0]
    """
    _check(q_BTNH, k_BSKH, causal, kv_mask_BS, lse)

    def average(q_BTNH, k_BSKH, kv_mask_BS, lse, *, whole):
        facts = MapFacts(
            num_queries=q_BTNH.shape[1],
            num_keys=k_BSKH.shape[1],
            head_dim=q_BTNH.shape[3],
            dtype=q_BTNH.dtype.name,
            causal=causal,
            has_kv_mask=kv_mask_BS is not None,
            has_lse=lse is not None,
        )
        backend = choose_backend("mean_attention_map", BACKENDS, implementation, facts, whole=whole)
        q_BTNH, k_BSKH, lse = jax.lax.stop_gradient((q_BTNH, k_BSKH, lse))
        map_TS = backend.run(MapArrays(q_BTNH, k_BSKH, kv_mask_BS, lse), facts)
        return (vary_like(map_TS, q_BTNH),)

    (map_TS,) = run_on_mesh(
        average,
        (q_BTNH, k_BSKH, kv_mask_BS, lse),
        ("BTNH", "BSNH", "BS", "BTN"),
        ("TS",),
        parts={"B": 1, "N": 1},
        mean=True,
    )
    return map_TS


def _check(q, k, causal, kv_mask, lse):
    for name, x, axes in (("q_BTNH", q, "[B, T, N, H]"), ("k_BSKH", k, "[B, S, K, H]")):
        if x.ndim != 4 or 0 in x.shape:
            raise ValueError(f"{name} must be {axes} and not empty, got {list(x.shape)}")
    if q.dtype not in _DTYPES or k.dtype != q.dtype:
        raise ValueError(
            "q_BTNH and k_BSKH must share one of float32, bfloat16, float16, "
            f"got {q.dtype} and {k.dtype}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            "q_BTNH and k_BSKH must share B and H, and key heads divide query heads, "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be a bool, got {causal=!r}")
    for name, x, dtype, shape in (
        ("kv_mask_BS", kv_mask, jnp.bool_, k.shape[:2]),
        ("lse", lse, jnp.float32, q.shape[:3]),
    ):
        if x is not None and (x.dtype != dtype or x.shape != shape):
            raise ValueError(
                f"{name} must be {jnp.dtype(dtype)}{list(shape)} or None, "
                f"got {x.dtype}{list(x.shape)}"
            )
