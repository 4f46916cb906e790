"""cuSPARSELt, through PyTorch, on the inputs of a product, without JAX in between.

PyTorch is imported only when its functions are made. Its function for sparse products is called
by itself: the tensor class around it would spend more time in Python than a small product takes.
cuSPARSELt plans every call anew, some tens of microseconds on the host, which is more than a
product of 1024 cubed takes on the GPU.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.harness import ForeignCall
from benchmarks.nm_matmul_problems import Inputs

CUSPARSELT = "cuSPARSELt"


def make_torch_calls(
    sets: Sequence[Inputs], *, packs: bool
) -> tuple[dict[str, ForeignCall], dict[str, str]]:
    """Make cuSPARSELt's product y = x w of every set of inputs.

    Args:
      sets: Inputs with x, w and mask.
      packs: bool, whether the weight is compressed in every call.

    Returns:
      (calls by name, why a name is absent). Exactly one of the two has the name.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return {}, {CUSPARSELT: f"PyTorch is not installed: {error}"}
    if not torch.cuda.is_available():
        return {}, {CUSPARSELT: "PyTorch sees no GPU"}
    try:
        # Else it may take its other implementation, that of CUTLASS for an A100.
        torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS = False
        call = _make_call(torch, [_as_tensors(torch, s) for s in sets], packs=packs)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return {}, {CUSPARSELT: f"{type(error).__name__}: {lines[0][:200]}"}
    return {
        CUSPARSELT: ForeignCall(
            call=call,
            wait=lambda results: torch.cuda.synchronize(),
            # It returns y^T; read the other way it is y, and nothing was copied.
            to_numpy=lambda results: [y.t().float().cpu().numpy() for y in results],
        )
    }, {}


def _as_tensors(torch: Any, s: Inputs) -> tuple[Any, Any]:
    """Return x[M, K] and the masked weight as [N, K], contiguous."""
    kept = jnp.where(s.mask, s.w, jnp.zeros((), s.w.dtype)).T
    return tuple(
        torch.from_dlpack(jax.block_until_ready(array)).contiguous() for array in (s.x, kept)
    )


def _make_call(torch: Any, tensors: Sequence[tuple], *, packs: bool) -> Callable[[], list[Any]]:
    compress = torch.sparse.to_sparse_semi_structured
    compressed = [compress(w).packed for _, w in tensors]
    algorithm = _find_algorithm(torch, compressed[0], tensors[0][0])

    def multiply(packed, x):
        return torch._cslt_sparse_mm(packed, x.t(), alg_id=algorithm)

    def call():
        with torch.no_grad():
            weights = (compress(w).packed for _, w in tensors) if packs else compressed
            return [multiply(packed, x) for packed, (x, _) in zip(weights, tensors, strict=True)]

    return call


def _find_algorithm(torch: Any, packed: Any, x: Any) -> int:
    """Let cuSPARSELt try its algorithms, as one does before a long run."""
    try:
        return int(torch._cslt_sparse_mm_search(packed, x.t()))
    except Exception as error:  # deprecated in PyTorch; without it, the first algorithm runs
        print(f"cuSPARSELt runs without a search for its algorithm: {error}", flush=True)
        return 0
