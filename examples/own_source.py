"""A data source of one's own: sums, one a line.

python -m examples.own_source runs/sums
"""

import sys

import numpy as np

import sparsejax
from configs import spion_small
from sparsejax.data import Contents, Example, Source


def make_sums(config):
    """Return documents of 200 sums; those of the validation split are others."""

    def read(split):
        rng = np.random.default_rng({"train": 0, "validation": 1}[split])
        for _ in range(400 if split == "train" else 20):
            pairs = rng.integers(0, 100, (200, 2)).tolist()
            yield Example(("".join(f"{a}+{b}={a + b}\n" for a, b in pairs).encode(),))

    # The identity is the key of the token cache: change it with the examples.
    return Source(contents=Contents("language_model"), identity={"sums": 1}, read=read)


if __name__ == "__main__":
    config = spion_small.get_config()
    config.data.sequence_length = 256
    sparsejax.train(config, sys.argv[1], data=make_sums)
