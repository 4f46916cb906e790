"""The 2:4 product on Hopper's sparse tensor cores."""

from pallas_kernels.nm_matmul.mosaic_sm90.pack import check_packing as check_packing
from pallas_kernels.nm_matmul.mosaic_sm90.pack import pack_weight as pack_weight
from pallas_kernels.nm_matmul.mosaic_sm90.products import check as check
from pallas_kernels.nm_matmul.mosaic_sm90.products import run as run
from pallas_kernels.nm_matmul.mosaic_sm90.products import tile as tile
