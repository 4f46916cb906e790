"""Real data for training: deterministic, sharded, resumable batches of NumPy arrays.

`make_data(DataConfig(...))` is the whole interface. Every source takes the same road:

    source (text, ListOps, IDX, TFDS, TSV) -> tokenizer -> token cache on disk, memory-mapped
        -> random-access examples -> grain pipeline -> batches

Grain, tensorflow_datasets and tokenizers are imported when a source first needs them, so that
importing this package costs no more than NumPy.
"""

from sparsejax.training.data.config import DataConfig
from sparsejax.training.data.dataset import Data, make_data

__all__ = ["Data", "DataConfig", "make_data"]
