"""The first state of a run on eight fake devices, from pretrained weights: see `test_init_from`.

The argument is a folder to write in; what was found goes to standard output as JSON.
"""

import json
import pathlib
import sys

import numpy as np

from sparsejax.config.parse import parse_config
from sparsejax.pretrained.leaves import flatten
from sparsejax.training.initial import create_initial_state
from sparsejax.training.setup import prepare_run
from tests.pretrained.folders import load_golden, read_params
from tests.pretrained.make_golden import GOLDEN
from tests.training.test_init_from import make_initial_settings


def main(folder: pathlib.Path) -> None:
    """Compare the parameters with those of the file."""
    settings = make_initial_settings(
        folder, GOLDEN / "llama_tied", mesh__data=2, mesh__fsdp=2, mesh__tensor=2
    )
    found = flatten(create_initial_state(prepare_run(parse_config(settings))).params)
    kernel = found["blocks.mlp.up.kernel"]
    wrong = [
        path
        for path, value in read_params(load_golden("llama_tied").model).items()
        if not np.array_equal(value, found[path])
    ]
    held = kernel.addressable_shards[0].data.size / kernel.size
    json.dump({"wrong": wrong, "held": held}, sys.stdout)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
