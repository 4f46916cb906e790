"""The kind of variable that says what a model leaves out."""

from flax import nnx


class SparsityMask(nnx.Variable):
    """bool array, True = kept; a model's forward pass reads it and never writes it."""
