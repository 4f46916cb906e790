"""Product with a weight that is sparse in blocks."""

from pallas_kernels.block_sparse_matmul.op import block_sparse_matmul as block_sparse_matmul
