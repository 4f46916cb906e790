"""Lists of kept attention blocks beside the train state: derived from masks, never saved."""

from sparsejax.models.block_lists import BlockLists as BlockLists
from sparsejax.models.block_lists import make_block_lists as list_blocks
from sparsejax.recipes import Phase
from sparsejax.types import PyTree


def make_block_lists(masks: PyTree, *, phase: Phase) -> BlockLists:
    """List the blocks that the steps of a phase attend to.

    Built when masks change between phases, and when a run is resumed.

    Args:
      masks: nested dict of the model's masks.
      phase: what they are for.

    Returns:
      None where attention is dense, goes by positions, chooses blocks from its input, or has masks
      that change within the phase: the model then builds what it needs in every step.
    """
    by_masks = phase.position_mask is None and phase.choose_blocks is None
    fixed = phase.sparse_attention and by_masks and not phase.changes_attention
    return list_blocks(masks) if fixed else None
