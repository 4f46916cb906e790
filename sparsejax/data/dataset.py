"""From a `DataConfig` to batches: open the source, make the caches, assemble the pipeline."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from sparsejax.data import pipeline, shards, store, token_files
from sparsejax.data.bpe import load_bpe, name_bpe, train_bpe
from sparsejax.data.cache import cached_folder, hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.masking import make_masking
from sparsejax.data.patches import make_augmentation
from sparsejax.data.progress import show_progress
from sparsejax.data.source import EvaluatedSplit, Source, Split
from sparsejax.data.sources import load_source, refuse_unreadable
from sparsejax.data.spec import DataSpec, make_spec
from sparsejax.data.tokenizer import Tokenizer, byte_tokenizer, value_tokenizer
from sparsejax.data.tokenizer_files import open_tokenizer_file

# Changes whenever the files of a cache are written differently.
_CACHE_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches of one data set, as NumPy arrays on the host.

    `sparsejax.batch` says what a batch holds; B there is the batch of this process.

    Attributes:
      open_train: Makes `train`.
      passes: For each split, and "all" of them, opens a pass over at most so many batches (None =
        all); always the same order, the last batch filled up with examples of weight 0.
      spec: What a model must know of the data.
      fingerprint: What must be equal for a run to resume on this data.
      tokenizer: What made the ids.
    """

    open_train: Callable[[], pipeline.BatchIterator]
    passes: Mapping[EvaluatedSplit, Callable[[int | None], Iterator[pipeline.Batch]]]
    spec: DataSpec
    fingerprint: dict[str, str | int]
    tokenizer: Tokenizer

    @functools.cached_property
    def train(self) -> pipeline.BatchIterator:
        """The endless iterator over shuffled batches, with `get_state` and `set_state`."""
        return self.open_train()

    def validation(self, max_batches: int | None = None) -> Iterator[pipeline.Batch]:
        """Open a pass over the validation split.

        Args:
          max_batches: None = all.

        Returns:
          Its batches.
        """
        return self.passes["validation"](max_batches)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    source: Source
    tokenizer: Tokenizer
    folders: dict[Split, Path]
    sha256: str


def make_data(
    config: DataConfig,
    *,
    tokenizer: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Data:
    """Open a data set, building its caches on first use.

    Args:
      config: What to open.
      tokenizer: That of a model which is evaluated on the data; there may be too little of it to
        train on. None = what `config.tokenizer` names.
      process_index: This process, in [0, process_count).
      process_count: Processes that share each batch.

    Returns:
      Its batches.

    Raises:
      ValueError: The data is missing, damaged, too small or too long for the settings, or the
        batch cannot be shared among the processes.
    """
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index={process_index}: expected a number in [0, {process_count})"
        )
    if config.batch_size % process_count:
        raise ValueError(
            f"batch_size={config.batch_size}: expected a multiple of the {process_count} processes"
        )
    source = _open_source(config)
    _check_num_patches(config, source)
    spec = make_spec(config, source.contents)
    prepared = _prepare(config, source, tokenizer)
    splits: tuple[Split, ...] = ("train", "validation")
    found: dict[Split, pipeline.ExampleSource] = {
        split: _open_examples(config, prepared, spec, split) for split in splits
    }
    if tokenizer is None:
        _check_enough(config, {split: len(found[split]) for split in splits})
    elif not any(map(len, found.values())):
        raise ValueError(
            f"sequence_length={config.sequence_length}: {config.source} has not one example of "
            "that length; expected more data"
        )
    share = {
        "batch_size": config.batch_size // process_count,
        "process_index": process_index,
        "process_count": process_count,
    }
    transforms = _make_transforms(config, prepared, spec)
    examples: dict[EvaluatedSplit, pipeline.ExampleSource] = {
        **found,
        "all": pipeline.JoinedExamples([*found.values()]),
    }
    return Data(
        open_train=functools.partial(
            pipeline.make_train_iterator,
            found["train"],
            seed=config.seed,
            num_reading_threads=config.num_reading_threads,
            transform=transforms["train"],
            **share,
        ),
        passes={
            split: pipeline.make_evaluation(each, transform=transforms["validation"], **share)
            for split, each in examples.items()
        },
        spec=spec,
        fingerprint={
            # `~` expanded: what stands in one home is not what stands in another.
            "source": f"{config.kind}:{config.rest}" if config.rest else config.source,
            "tokenizer": prepared.tokenizer.name,
            "corpus_sha256": prepared.sha256,
            "train_examples": len(found["train"]),
            "validation_examples": len(found["validation"]),
            **source.fingerprint,
        },
        tokenizer=prepared.tokenizer,
    )


def prepare(config: DataConfig) -> None:
    """Download or generate a data set, train its tokenizer and write its caches.

    Args:
      config: What to prepare; lengths and batches do not matter.

    Raises:
      ValueError: The data is missing or damaged.
    """
    _prepare(config, _open_source(config), None)


def _open_source(config: DataConfig) -> Source:
    with refuse_unreadable(config.source):
        return load_source(config.kind).open(config)


def _prepare(config: DataConfig, source: Source, tokenizer: Tokenizer | None) -> _Prepared:
    if tokenizer is None:
        tokenizer = _make_tokenizer(config, source)
    else:
        _check_tokenizer(config, source, tokenizer)
    contents = source.contents

    def write(folder: Path, split: Split) -> None:
        if source.shards is not None:
            shards.write_index(folder, source.shards[split], tokenizer.vocab_size)
            return
        examples = show_progress(source.read(split), f"Writing the {split} split as tokens")
        token_files.write_examples(folder, examples, tokenizer, contents)

    folders, digests = {}, {}
    for split in ("train", "validation"):
        key = hash_json([_CACHE_VERSION, source.identity, contents.task, tokenizer.name, split])
        folders[split] = Path(config.data_path, "tokens", f"{config.kind}-{split}-{key[:16]}")
        digests[split] = cached_folder(folders[split], functools.partial(write, split=split))
    return _Prepared(source, tokenizer, folders, hash_json(digests))


def _check_num_patches(config: DataConfig, source: Source) -> None:
    if source.grid and source.grid.num_patches > config.sequence_length:
        raise ValueError(
            f"sequence_length={config.sequence_length}: the images of {config.source} have "
            f"{source.grid.num_patches} patches; expected at least that"
        )


def _check_enough(config: DataConfig, counts: dict[Split, int]) -> None:
    """Refuse data that is too little to train and validate on."""
    for split, count in counts.items():
        if not count:
            raise ValueError(
                f"sequence_length={config.sequence_length}: the {split} split of {config.source} "
                "has not one example of that length; expected more data or a shorter length"
            )
    if counts["train"] < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size}: the train split of {config.source} has "
            f"{counts['train']} examples; expected at most that many"
        )


def _check_tokenizer(config: DataConfig, source: Source, tokenizer: Tokenizer) -> None:
    """Refuse the tokenizer of a model that does not fit the contents of other data."""
    num_values = source.contents.num_values
    if source.shards is not None:
        return  # the ids are looked at when they are counted
    fits, held = not tokenizer.name.startswith("values:"), "text"
    if num_values is not None:
        fits, held = tokenizer.name == f"values:{num_values}", f"values in [0, {num_values})"
    if not fits:
        raise ValueError(
            f"source={config.source!r} holds {held}, which the model's tokenizer "
            f"{tokenizer.name!r} does not encode"
        )


def _make_tokenizer(config: DataConfig, source: Source) -> Tokenizer:
    if source.contents.num_values is not None:
        return value_tokenizer(source.contents.num_values)
    kind, _, rest = config.tokenizer.partition(":")
    match kind:
        case "bytes":
            return byte_tokenizer()
        case "ids":
            return value_tokenizer(int(rest))
        case "file":
            return open_tokenizer_file(config.tokenizer)
        case _:
            return _make_bpe(config, source, int(rest))


def _make_bpe(config: DataConfig, source: Source, vocab_size: int) -> Tokenizer:
    key = hash_json([_CACHE_VERSION, source.identity, config.tokenizer])
    folder = Path(config.data_path, "tokenizers", f"{config.kind}-bpe{vocab_size}-{key[:16]}")

    def build(temporary: Path) -> None:
        texts = (bytes(text) for example in source.read("train") for text in example.documents)
        train_bpe(temporary, show_progress(texts, "Training the tokenizer"), vocab_size)

    digest = cached_folder(folder, build)
    return load_bpe(folder, name_bpe(config.tokenizer, digest))


def _open_examples(
    config: DataConfig, prepared: _Prepared, spec: DataSpec, split: Split
) -> pipeline.ExampleSource:
    found = prepared.source.shards
    examples = store.open_examples(
        prepared.folders[split],
        spec.task,
        prepared.tokenizer,
        config.sequence_length,
        grid=prepared.source.grid,
        stream=None if found is None else shards.ShardStream(found[split]),
        hidden=prepared.source.contents.task == "masked_language_model",
    )
    if isinstance(examples, store.Documents) and not config.truncate:
        examples.check_lengths(split)
    return examples


def _make_transforms(
    config: DataConfig, prepared: _Prepared, spec: DataSpec
) -> dict[Split, pipeline.Transform | None]:
    """Return what changes the examples of each split at random."""
    grid = prepared.source.grid
    if config.mask_fraction:
        masking = make_masking(
            sequence_length=config.sequence_length,
            mask_fraction=config.mask_fraction,
            vocab_size=prepared.tokenizer.vocab_size,
        )
        return {"train": masking, "validation": masking}
    if grid and (config.random_crop or config.random_flip):
        augmentation = make_augmentation(grid, crop=config.random_crop, flip=config.random_flip)
        return {"train": augmentation, "validation": None}
    return {"train": None, "validation": None}
