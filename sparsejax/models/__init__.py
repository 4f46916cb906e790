"""flax.nnx modules that call the sparse ops."""
