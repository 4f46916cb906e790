"""JAX's flags that this project supports, and how a test sets them.

They hold for all threads of the process, as when a user sets them by environment variables; a
context manager of JAX's would hold for the thread of the test alone.
"""

import contextlib

import jax
import jax.numpy as jnp

FLAGS = {
    "x64": ("jax_enable_x64", True),
    "rank_promotion": ("jax_numpy_rank_promotion", "raise"),
    "debug_nans": ("jax_debug_nans", True),
    "transfer_guard": ("jax_transfer_guard", "disallow"),
    "highest": ("jax_default_matmul_precision", "highest"),
    "bfloat16": ("jax_default_matmul_precision", "bfloat16"),
}
"""Name in tests -> name and value of the flag."""


@contextlib.contextmanager
def flags_set(*names):
    """Set flags for the whole process, and set them back.

    Args:
      *names: out of `FLAGS`.
    """
    with contextlib.ExitStack() as stack:
        for name in names:
            flag, value = FLAGS[name]
            stack.callback(jax.config.update, flag, getattr(jax.config, flag))
            jax.config.update(flag, value)
        yield


def assert_narrow(tree, where):
    """Assert that no array of a tree has numbers of 64 bits, as nothing has that was given none.

    Args:
      tree: pytree of arrays, or of their shapes and types.
      where: what the message calls it.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        name = jax.tree_util.keystr(path)
        assert is_key or leaf.dtype.itemsize < 8, f"{where}{name} is {leaf.dtype}"
