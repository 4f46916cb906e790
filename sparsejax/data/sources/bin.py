"""Corpora that are token ids already: files of nanoGPT, llm.c and modded-nanogpt."""

import glob
from collections.abc import Iterator
from pathlib import Path

from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.shards import Shard, cut_shards, read_shard
from sparsejax.data.source import Contents, Example, Options, Source, Split
from sparsejax.data.splits import divide_files

OPTIONS = Options(
    {"tokenizer", "train_split", "validation_split", "validation_fraction", "mask_fraction"},
    tokenizers=("ids:N", "file:/path"),
)


def describe_bin(config: DataConfig) -> Contents:
    """Describe a corpus, whatever its files hold.

    Args:
      config: Settings with `source="bin:/path"`.

    Returns:
      Its contents.
    """
    return Contents("language_model")


def open_bin(config: DataConfig) -> Source:
    """Open the `*.bin` files of a folder, those of a pattern, or one, as streams of ids.

    The ids are mapped where they are. They are read once before the first run, to see that the
    tokenizer has them all. A corpus without a file for validation is split by position: its tail
    is held out.

    Args:
      config: Settings with `source="bin:/path"`, or a pattern such as `"bin:/path/fineweb_*.bin"`;
        its tokenizer says how many ids there are.

    Returns:
      The corpus.

    Raises:
      ValueError: No file is found, or one is not of a known format.
    """
    names = {file: file.name for file in _find_files(config)}
    division = divide_files(config, names)
    streams: dict[Split, list[Shard]] = {
        split: [read_shard(file) for file in files] for split, files in division.members.items()
    }
    if division.fraction:
        total = sum(shard.num_ids for shard in streams["train"])
        before, after = cut_shards(streams["train"], int(total * (1 - division.fraction)))
        streams = {"train": before, "validation": after}

    def read(split: Split) -> Iterator[Example]:
        for shard in streams[split]:
            yield Example((shard.map(),), complete=False)

    return Source(
        contents=describe_bin(config),
        identity={
            "files": identify_files((name, file) for file, name in names.items()),
            "spans": {
                split: [(shard.path.name, shard.first, shard.num_ids) for shard in shards]
                for split, shards in streams.items()
            },
        },
        read=read,
        shards=streams,
    )


def _find_files(config: DataConfig) -> list[Path]:
    path = Path(config.rest)
    if path.is_dir():
        found = path.glob("[!.]*.bin")
    elif path.is_file():
        found = [path]
    else:
        found = map(Path, glob.glob(config.rest, recursive=True))
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise ValueError(f"source={config.source!r}: found no file; expected some *.bin")
    return files
