"""Keep compiled programs from one run to the next."""

import os
import pathlib

import jax


def use_compilation_cache() -> None:
    """Let JAX keep compiled programs in `~/.cache/sparsejax/xla`, or under XDG_CACHE_HOME.

    A folder that the user has named (`JAX_COMPILATION_CACHE_DIR`) stays, and so does
    `JAX_ENABLE_COMPILATION_CACHE=0`, which keeps nothing. Where the folder cannot be written,
    programs are compiled anew each time.
    """
    config = jax.config.values
    if config["jax_compilation_cache_dir"] or not config["jax_enable_compilation_cache"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    folder = pathlib.Path(home) / "sparsejax" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
