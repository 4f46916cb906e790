"""Sparse transformer training in JAX: masks, recipes, Flax modules and a trainer.

`sparsejax.train`, `evaluate`, `evaluate_choices`, `export_hf`, `generate`, `load_model` and
`load_pretrained` are imported when they are first asked for: rooms of this package are used without
them.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsejax.version import __version__ as __version__

if TYPE_CHECKING:
    from sparsejax.api import evaluate as evaluate
    from sparsejax.api import evaluate_choices as evaluate_choices
    from sparsejax.api import generate as generate
    from sparsejax.api import load_model as load_model
    from sparsejax.api import train as train
    from sparsejax.pretrained import export_hf as export_hf
    from sparsejax.pretrained import load_pretrained as load_pretrained

_API = {
    "evaluate": "sparsejax.api",
    "evaluate_choices": "sparsejax.api",
    "generate": "sparsejax.api",
    "load_model": "sparsejax.api",
    "train": "sparsejax.api",
    "export_hf": "sparsejax.pretrained",
    "load_pretrained": "sparsejax.pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'sparsejax' has no attribute {name!r}; it has {(*_API,)}")
    return getattr(importlib.import_module(_API[name]), name)
