"""Product with an N:M sparse weight: the op, its packed form and the estimator it prunes with."""

from pallas_kernels.nm_matmul.mask_check import check_nm_mask as check_nm_mask
from pallas_kernels.nm_matmul.op import draw_pruning_bits as draw_pruning_bits
from pallas_kernels.nm_matmul.op import nm_matmul as nm_matmul
from pallas_kernels.nm_matmul.pack import pack_nm as pack_nm
from pallas_kernels.nm_matmul.pack import unpack_nm as unpack_nm
from pallas_kernels.nm_matmul.packing import PackedNM as PackedNM
from pallas_kernels.nm_matmul.prune import prune_mvue as prune_mvue
