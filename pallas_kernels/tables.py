"""The tables of backends of all ops."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.attention_map.backends import BACKENDS as _MAP_BACKENDS
from pallas_kernels.backends import Backend, Choice, Implementation, explain_choice
from pallas_kernels.block_sparse_attention.backends import BACKENDS as _ATTENTION_BACKENDS
from pallas_kernels.block_sparse_matmul.backends import BACKENDS as _BLOCK_MATMUL_BACKENDS
from pallas_kernels.nm_matmul.backends import BACKENDS as _NM_BACKENDS
from pallas_kernels.nm_matmul.backends import PACK_BACKENDS as _PACK_BACKENDS
from pallas_kernels.nm_matmul.backends import PRUNE_BACKENDS as _PRUNE_BACKENDS
from pallas_kernels.transposable_mask.backends import BACKENDS as _TRANSPOSABLE_BACKENDS

TABLES: Mapping[str, tuple[Backend[Any, Any], ...]] = {
    "block_sparse_attention": _ATTENTION_BACKENDS,
    "block_sparse_matmul": _BLOCK_MATMUL_BACKENDS,
    "mean_attention_map": _MAP_BACKENDS,
    "nm_matmul": _NM_BACKENDS,
    "pack_nm": _PACK_BACKENDS,
    "prune_mvue": _PRUNE_BACKENDS,
    "transposable_mask": _TRANSPOSABLE_BACKENDS,
}
"""Name of the op -> its backends, in order of preference."""


def list_backends(op: str) -> tuple[Implementation, ...]:
    """List the names that an op takes as `implementation`.

    `choose_implementation` says which of them a call gets that names none.

    Args:
      op: str, name of the op, such as "nm_matmul".

    Returns:
      tuple of str, in order of preference.

    Raises:
      ValueError: if there is no such op.

    Example:
      >>> list_backends("nm_matmul")
      ('mosaic_sm90', 'triton', 'reference', 'xla')
    """
    return tuple(backend.name for backend in _find_table(op))


def choose_implementation(op: str, facts: Any, implementation: str | None = None) -> Choice:
    """Say what a call runs here, and why: it is chosen as the op itself chooses.

    What functions choose while they are traced is collected by `record_choices`.

    Args:
      op: str, name of the op.
      facts: static facts of the call, such as an `NMFacts`.
      implementation: what the caller would name, or None.

    Returns:
      Choice: name of the backend, reason, and for each kernel that it is not, why not.

    Raises:
      ValueError: if there is no such op, or the op has no backend of that name.
      NotImplementedError: if the named backend cannot run, with the reason.

    Example:
      >>> from pallas_kernels.nm_matmul.call import NMFacts
      >>> facts = NMFacts(rows=4096, inner=1024, columns=4096, dtype="bfloat16")
      >>> choice = choose_implementation("nm_matmul", facts)
      >>> choice.backend, choice.reason
      ('xla', 'runs everywhere')
      >>> choice.others["mosaic_sm90"].startswith("implementation='mosaic_sm90' needs a Hopper GPU")
      True
    """
    return explain_choice(op, _find_table(op), implementation, facts)


def _find_table(op: str) -> tuple[Backend[Any, Any], ...]:
    if op not in TABLES:
        raise ValueError(f"op must be one of {tuple(TABLES)}, got {op!r}")
    return TABLES[op]
