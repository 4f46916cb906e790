"""What a model is shown before it is made sparse, and what that decides."""

from sparsejax.calibration.attention import calibrate_blocks as calibrate_blocks
from sparsejax.calibration.attention import read_heads as read_heads
