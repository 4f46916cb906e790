"""Real data for training: deterministic, sharded, resumable batches of NumPy arrays.

`make_data(DataConfig(...))` is the whole interface; `describe_data` tells without the data what a
model must know of it. `sparsejax.batch` says what a batch holds. Every source takes the same road:

    source (a row of `sources.SOURCES`) -> tokenizer -> token cache on disk
        -> random-access examples, memory-mapped -> grain pipeline -> batches

but for files of ids, which are mapped as they are. Grain, tensorflow_datasets, tokenizers and
pyarrow are imported when a source first needs them, so that importing this package costs no more
than NumPy.
"""

from sparsejax.data.config import DataConfig, change_source
from sparsejax.data.dataset import Data, make_data
from sparsejax.data.source import Contents, EvaluatedSplit, Example, Source
from sparsejax.data.spec import DataSpec, describe_data
from sparsejax.data.tokenizer import Tokenizer, keep_tokenizer, load_tokenizer

__all__ = [
    "Contents",
    "Data",
    "DataConfig",
    "DataSpec",
    "EvaluatedSplit",
    "Example",
    "Source",
    "Tokenizer",
    "change_source",
    "describe_data",
    "keep_tokenizer",
    "load_tokenizer",
    "make_data",
]
