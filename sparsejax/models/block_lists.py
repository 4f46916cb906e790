"""The lists of kept attention blocks that sparse kernels walk, of a whole stack of layers.

They follow from the masks: built when those change, and never saved.
"""

from pallas_kernels import BlockSchedule, make_block_schedule
from sparsejax.types import PyTree

type BlockLists = BlockSchedule | None
"""Lists with a leading axis of layers; None where attention does not go by blocks."""


def make_block_lists(masks: PyTree) -> BlockLists:
    """List the attention blocks that a `Transformer` keeps.

    Args:
      masks: nested dict of its masks; that of attention is bool[L, 1, 1 | N, I, J].

    Returns:
      BlockSchedule with axes [L, 1, 1 | N, ...], to be passed to the model; None if the masks have
      none of attention.
    """
    attention = masks.get("blocks", {}).get("attention", {})
    return make_block_schedule(attention["block_mask"]) if "block_mask" in attention else None
