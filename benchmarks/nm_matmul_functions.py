"""The functions that the benchmark of N:M products times: sparse, dense, and what they must equal.

Each takes one set of `Inputs`. Dense ones multiply by the whole weight: half of it as zeros would
let a GPU draw less power and clock higher than it does on a dense weight.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.compiled_kernels import find_block_bytes
from benchmarks.nm_matmul_problems import Inputs, Problem
from pallas_kernels import nm_matmul, pack_nm
from pallas_kernels.doctor.timing import relative_error
from pallas_kernels.nm_matmul.packing import TILE
from pallas_kernels.nm_matmul.triton import products
from pallas_kernels.nm_matmul.triton.tiles import SparseTile, find_product_tile
from pallas_kernels.triton.device import check_device

# Its overloads and literals tell apart what a name in a variable cannot.
_NM_MATMUL: Any = nm_matmul
_PACK: Any = pack_nm

_DRAWN_TOLERANCE = 0.1


def make_sparse(problem: Problem, implementation: str) -> Callable[[Inputs], Any]:
    """Make the function of a setting in one implementation of `nm_matmul`.

    Args:
      implementation: "mosaic_sm90", "triton", "xla" or "reference".

    Returns:
      function of Inputs; of "ffn" it returns a dict with y, dx, dw_up and dw_down.
    """
    multiply = functools.partial(_NM_MATMUL, implementation=implementation)

    def gemm(s: Inputs):
        return multiply(s.x, s.w, s.mask, packed=s.packed)

    def input_gradient(s: Inputs):
        def forward(x):
            return multiply(x, s.w, s.mask, transposable=True, packed=s.packed)

        return jax.vjp(forward, s.x)[1](s.d_out)[0]

    def weight_gradient(s: Inputs):
        def forward(w):
            return multiply(s.x, w, s.mask, grad_pruning=problem.grad_pruning, key=s.key)

        return jax.vjp(forward, s.w)[1](s.d_out)[0]

    def pack(s: Inputs):
        return _PACK(s.w, s.mask, axis="both", implementation=implementation)

    def ffn(s: Inputs):
        options = {"transposable": True, "grad_pruning": problem.grad_pruning}
        keys = (None, None) if s.key is None else jax.random.split(s.key)

        def forward(x, w_up, w_down):
            activation = problem.activation
            h = multiply(x, w_up, s.mask, activation=activation, key=keys[0], **options)
            return multiply(h, w_down, s.mask_down, key=keys[1], **options)

        return _with_gradients(forward, s)

    return {
        "gemm": gemm,
        "gemm_with_packing": gemm,
        "dx": input_gradient,
        "dw": weight_gradient,
        "pack": pack,
        "ffn": ffn,
    }[problem.measure]


def make_dense(problem: Problem) -> Callable[[Inputs], Any]:
    """Make the dense function of a setting, as one writes it in JAX.

    Args:
      problem: Problem, not of "pack".

    Returns:
      function of Inputs.
    """

    def ffn(s: Inputs):
        return _with_gradients(
            lambda x, w_up, w_down: activate(x @ w_up, problem.activation) @ w_down, s
        )

    return {
        "gemm": lambda s: s.x @ s.w,
        "gemm_with_packing": lambda s: s.x @ s.w,
        "dx": lambda s: s.d_out @ s.w.T,
        "dw": lambda s: s.x.T @ s.d_out,
        "ffn": ffn,
    }[problem.measure]


def make_own_dense(problem: Problem) -> Callable[[Inputs], jax.Array]:
    """Make the dense product by the kernel of "triton", with the tile of the sparse product.

    Args:
      problem: Problem, of "gemm".

    Returns:
      function of Inputs that have `turned`.
    """

    def multiply(s: Inputs):
        capability = check_device()
        cut = find_product_tile(
            capability, rows=problem.columns, columns=problem.rows, divides_columns=False
        )
        return products.multiply_dense(s.turned, s.x, cut=fit_dense(cut, capability))

    return multiply


def fit_dense(cut: SparseTile, capability: tuple[int, int]) -> SparseTile:
    """Fit the tile of a sparse product to a dense one, whose steps take more shared memory.

    Args:
      capability: (major, minor), of the device.

    Returns:
      SparseTile of the same rows, columns and warps, with as many of its stages as fit.
    """
    step_bytes = 2 * TILE * (cut.rows + cut.columns)
    return cut._replace(stages=min(cut.stages, find_block_bytes(capability) // step_bytes))


def in_full_precision(function: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    """Make a reference of a dense function: the same in f32.

    Returns:
      function of Inputs.
    """

    def reference(s: Inputs):
        def widen(leaf):
            return leaf.astype(jnp.float32) if leaf.dtype in (jnp.bfloat16, jnp.float16) else leaf

        # GPUs would otherwise round f32 operands to TF32.
        with jax.default_matmul_precision("highest"):
            return function(jax.tree.map(widen, s))

    return reference


def on_every_set(function: Callable[[Inputs], Any]) -> Callable[..., list[Any]]:
    """Make the function of several sets of inputs, traced once.

    Returns:
      function of any number of Inputs to the list of results.
    """
    once = jax.jit(function)
    return lambda *sets: [once(s) for s in sets]


def make_error(problem: Problem) -> tuple[Callable[[Any, Any], float], float]:
    """Return how far a result is from its reference, and how far it may be.

    Packed weights must have equal bits. Behind an activation, dz differs in its last bits between
    implementations, and a draw near a threshold then falls on another pair. That moves dw_up by 4 %
    of its norm in bf16, where other draws altogether move it by 50 to 60 %: it may be off by 10 %.

    Returns:
      (function of result and reference, tolerance).
    """
    if problem.measure == "pack":
        return share_of_different_bits, 0.0
    tolerance = 1e-3 if problem.dtype == "float32" else 2e-2

    if problem.measure != "ffn" or problem.grad_pruning == "none":
        return relative_error, tolerance

    def error(actual, expected):
        drawn, others = (
            relative_error(*(_select(results, names) for results in (actual, expected)))
            for names in (("dw_up",), ("y", "dx", "dw_down"))
        )
        return max(others, drawn * tolerance / _DRAWN_TOLERANCE)

    return error, tolerance


def share_of_different_bits(actual: Any, expected: Any) -> float:
    """Return the largest share of entries whose bits differ, over the leaves of two pytrees.

    Args:
      actual: pytree of arrays of 16 or 32 bits.
      expected: pytree of arrays of the same structure, shapes and dtypes.

    Returns:
      float in [0, 1].

    Raises:
      ValueError: if structures, shapes or dtypes differ.
    """
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (actual, expected)]
    if described[0] != described[1]:
        raise ValueError(f"actual has {described[0]}, expected {described[1]}")

    def bits(x):
        return x.view(f"uint{8 * x.dtype.itemsize}")

    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return max(float((bits(a) != bits(e)).mean()) for a, e in pairs)


def _select(results: list[dict[str, jax.Array]], names: tuple[str, ...]) -> list[Any]:
    return [{name: result[name] for name in names} for result in results]


def activate(z: jax.Array, activation: str | None) -> jax.Array:
    """Apply an activation as one writes it in JAX.

    Args:
      z: float[..., N].
      activation: None, "gelu", or "geglu" and "swiglu", which halve the last axis.

    Returns:
      float[..., N] or [..., N / 2].
    """
    if activation in (None, "gelu"):
        return z if activation is None else jax.nn.gelu(z)
    value, gate = jnp.split(z, 2, axis=-1)
    return value * (jax.nn.gelu if activation == "geglu" else jax.nn.silu)(gate)


def _with_gradients(forward: Callable[..., jax.Array], s: Inputs) -> dict[str, jax.Array]:
    y, back = jax.vjp(forward, s.x, s.w, s.w_down)
    dx, dw_up, dw_down = back(s.d_out)
    return {"y": y, "dx": dx, "dw_up": dw_up, "dw_down": dw_down}
