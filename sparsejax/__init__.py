"""Sparse transformer training in JAX: masks, recipes, Flax modules and a trainer.

`sparsejax.train`, `sparsejax.evaluate`, `sparsejax.load_model` and `sparsejax.load_pretrained` are
imported when they are first asked for: rooms of this package are used without them.
"""

from typing import TYPE_CHECKING, Any

from sparsejax.version import __version__ as __version__

if TYPE_CHECKING:
    from sparsejax.api import evaluate as evaluate
    from sparsejax.api import load_model as load_model
    from sparsejax.api import load_pretrained as load_pretrained
    from sparsejax.api import train as train

_API = ("evaluate", "load_model", "load_pretrained", "train")


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'sparsejax' has no attribute {name!r}; it has {_API}")
    from sparsejax import api

    return getattr(api, name)
