"""What a model is shown before it is made sparse, and what that decides."""

from sparsejax.calibration.attention import calibrate_blocks as calibrate_blocks
from sparsejax.calibration.attention import read_heads as read_heads
from sparsejax.calibration.weights import InputStatistics as InputStatistics
from sparsejax.calibration.weights import choose_mask as choose_mask
from sparsejax.calibration.weights import collect_statistics as collect_statistics
from sparsejax.calibration.weights import measure_statistics as measure_statistics
from sparsejax.calibration.weights import prune as prune
from sparsejax.calibration.weights import score_weights as score_weights
from sparsejax.calibration.weights import set_weight_masks as set_weight_masks
