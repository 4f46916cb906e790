"""How a product of the tensor cores lies in registers, and what goes with its rows and columns."""

import jax.experimental.pallas.mosaic_gpu as plgpu

LAYOUT = plgpu.Layout.WGMMA
"""Of a result with 64 rows."""

BY_ROW, BY_COLUMN = LAYOUT.reduce(1), LAYOUT.reduce(0)
"""Of a vector with one number for each row, or for each column."""
