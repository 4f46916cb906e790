"""The tables of backends of all ops."""

from collections.abc import Mapping
from typing import Any

from pallas_kernels.attention_map.backends import BACKENDS as _MAP_BACKENDS
from pallas_kernels.backends import Backend, Implementation
from pallas_kernels.block_sparse_attention.backends import BACKENDS as _ATTENTION_BACKENDS
from pallas_kernels.block_sparse_matmul.backends import BACKENDS as _BLOCK_MATMUL_BACKENDS
from pallas_kernels.nm_matmul.backends import BACKENDS as _NM_BACKENDS
from pallas_kernels.nm_matmul.backends import PACK_BACKENDS as _PACK_BACKENDS

TABLES: Mapping[str, tuple[Backend[Any, Any], ...]] = {
    "block_sparse_attention": _ATTENTION_BACKENDS,
    "block_sparse_matmul": _BLOCK_MATMUL_BACKENDS,
    "mean_attention_map": _MAP_BACKENDS,
    "nm_matmul": _NM_BACKENDS,
    "pack_nm": _PACK_BACKENDS,
}
"""Name of the op -> its backends, in order of preference."""


def list_backends(op: str) -> tuple[Implementation, ...]:
    """List the names that an op takes as `implementation`.

    What a call that names none gets is the first row of the op's table that suits it and can run;
    `choose_backend` says which, and writes it to the log at debug level.

    Args:
      op: str, name of the op, such as "nm_matmul".

    Returns:
      tuple of str, in order of preference.

    Raises:
      ValueError: if there is no such op.

    Example:
      >>> list_backends("nm_matmul")
      ('mosaic_sm90', 'reference', 'xla')
    """
    if op not in TABLES:
        raise ValueError(f"op must be one of {tuple(TABLES)}, got {op!r}")
    return tuple(backend.name for backend in TABLES[op])
