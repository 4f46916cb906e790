"""Block-sparse attention: the op, its schedules and the plain arrays it must equal."""

from pallas_kernels.block_sparse_attention.block_schedule import (
    BlockSchedule as BlockSchedule,
)
from pallas_kernels.block_sparse_attention.block_schedule import (
    make_block_schedule as make_block_schedule,
)
from pallas_kernels.block_sparse_attention.op import (
    block_sparse_attention as block_sparse_attention,
)
