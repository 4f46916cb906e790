"""Command line that prepares a data set once, on a machine with network access if need be."""

import argparse
import dataclasses
import sys

from sparsejax.data.config import DataConfig
from sparsejax.data.dataset import prepare
from sparsejax.data.sources import load_source

_FLAGS = {
    "source": "what to prepare, as tfds:imdb_reviews, listops, pathfinder or stdlib",
    "data_dir": "folder that receives it",
    "tokenizer": "bytes, bpe:N, file:/path or ids:N",
    "train_split": "name of the training split",
    "validation_split": "name of the validation split",
    "validation_fraction": "share held out of a set without a validation split",
    "input_key": "feature, key or column to read",
    "label_key": "label to predict",
    "patch_size": "side of a patch of an image, pixels",
    "image_size": "side that the middle square of images is scaled to, pixels",
    "image_channels": "1 for grey images, 3 for RGB",
}


def main(arguments: list[str]) -> None:
    """Prepare the data set that the command line names, downloading it if need be.

    Args:
      arguments: The command line without the program's name; exits with code 2 if it is wrong.
    """
    parser = argparse.ArgumentParser(prog="python -m sparsejax.data.prepare")
    for name, text in _FLAGS.items():
        required = name in ("source", "data_dir")
        parser.add_argument(
            f"--{name}",
            help=text,
            type=type(getattr(DataConfig, name)),
            required=required,
            default=argparse.SUPPRESS,
        )
    values = vars(parser.parse_args(arguments))
    try:
        config = DataConfig(**values)
        if "download" in load_source(config.kind).options.always:
            config = dataclasses.replace(config, download=True)
        prepare(config)
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    # As they are written in Python: a name that is not UTF-8 cannot be printed.
    print(f"{values['source']!r} is ready in {values['data_dir']!r}.")


if __name__ == "__main__":
    main(sys.argv[1:])
