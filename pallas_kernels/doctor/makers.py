"""For each op, how its problems are made."""

from collections.abc import Mapping

from pallas_kernels.doctor.attention_problems import ATTENTION, ATTENTION_MAP
from pallas_kernels.doctor.mask_problems import TRANSPOSABLE_MASK
from pallas_kernels.doctor.problem import Maker
from pallas_kernels.doctor.product_problems import (
    BLOCK_SPARSE_MATMUL,
    NM_MATMUL,
    PACK_NM,
    PRUNE_MVUE,
)

MAKERS: Mapping[str, Maker] = {
    "block_sparse_attention": ATTENTION,
    "block_sparse_matmul": BLOCK_SPARSE_MATMUL,
    "mean_attention_map": ATTENTION_MAP,
    "nm_matmul": NM_MATMUL,
    "pack_nm": PACK_NM,
    "prune_mvue": PRUNE_MVUE,
    "transposable_mask": TRANSPOSABLE_MASK,
}
"""Name of the op -> Maker."""
