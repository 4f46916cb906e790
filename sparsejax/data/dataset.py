"""From a `DataConfig` to batches: open the source, make the caches, assemble the pipeline."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsejax.data import pipeline, store
from sparsejax.data.cache import cached_folder, hash_json
from sparsejax.data.config import DataConfig
from sparsejax.data.masking import make_masking
from sparsejax.data.patches import make_augmentation
from sparsejax.data.progress import show_progress
from sparsejax.data.source import Example, Source, Split, Task
from sparsejax.data.sources.pairs import Translations, open_pairs
from sparsejax.data.tokenizer import (
    Tokenizer,
    byte_tokenizer,
    load_bpe,
    train_bpe,
    value_tokenizer,
)

# Changes whenever the files of a cache are written differently.
_CACHE_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Data:
    """Batches of one data set, as NumPy arrays on the host.

    With B the batch of this process and T the sequence length, a batch holds

    - `"language_model"`: `inputs` int32[B, T], `targets` int32[B, T], `weights` float32[B];
    - `"masked_language_model"`: the same with `weights` float32[B, T], 1 at the tokens to be told;
    - `"classification"`: `inputs` int32[B, T], `mask` bool[B, T] (True = real token, 0 = padding
      id), `labels` int32[B], `weights` float32[B]; of images in patches, `inputs` are uint8[B, T,
      patch_values];
    - `"matching"`: the same with `inputs` and `mask` [B, 2, T];
    - `"translation"`: `inputs` int32[B, T] and `mask` bool[B, T] of the source; `targets` and, one
      token behind, `decoder_inputs` int32[B, T]; `weights` float32[B, T], 1 at real targets.
      `pairs.py` says how sentences begin and end.

    Attributes:
        train: Endless iterator over shuffled batches, with `get_state` and `set_state`.
        validation: Opens a pass over the validation split of at most so many batches (None = all);
            always the same order, the last batch filled up with examples of weight 0.
        task: What the batches are for.
        vocab_size: Ids are in [0, vocab_size); 0 for patches, which are no ids.
        num_classes: Number of labels; 0 for a language model and for translation.
        patch_values: Values of a patch, 0 for ids.
        fingerprint: What must be equal for a run to resume on this data.
    """

    train: pipeline.BatchIterator
    validation: Callable[[int | None], Iterator[pipeline.Batch]]
    task: Task
    vocab_size: int
    num_classes: int
    patch_values: int
    fingerprint: dict[str, str | int]


@dataclasses.dataclass(frozen=True)
class _Prepared:
    source: Source
    task: Task
    tokenizer: Tokenizer
    folders: dict[Split, Path]
    sha256: str


def make_data(config: DataConfig, *, process_index: int = 0, process_count: int = 1) -> Data:
    """Open a data set, building its caches on first use.

    Args:
        config: What to open.
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
    prepared = _prepare(config, source)
    task, tokenizer = prepared.task, prepared.tokenizer
    train = _open_examples(config, prepared, "train")
    validation = _open_examples(config, prepared, "validation")
    if len(train) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size}: the train split of {config.source} has {len(train)} "
            "examples; expected at most that many"
        )
    share = {
        "batch_size": config.batch_size // process_count,
        "process_index": process_index,
        "process_count": process_count,
    }
    transforms = _make_transforms(config, prepared)
    return Data(
        train=pipeline.make_train_iterator(
            train,
            seed=config.seed,
            num_reading_threads=config.num_reading_threads,
            transform=transforms["train"],
            **share,
        ),
        validation=pipeline.make_validation(
            validation, transform=transforms["validation"], **share
        ),
        task=task,
        # Documents that are padded are shifted up by one to make room for padding; a masked
        # language model has the mask token.
        vocab_size=0 if source.grid else tokenizer.vocab_size + (task != "language_model"),
        num_classes=source.num_classes,
        patch_values=source.grid.patch_values if source.grid else 0,
        fingerprint={
            "source": config.source,
            "tokenizer": tokenizer.name,
            "corpus_sha256": prepared.sha256,
            "train_examples": len(train),
            "validation_examples": len(validation),
            **source.fingerprint,
        },
    )


def prepare(config: DataConfig) -> None:
    """Download or generate a data set, train its tokenizer and write its caches.

    Args:
        config: What to prepare; lengths and batches do not matter.

    Raises:
        ValueError: The data is missing or damaged.
    """
    _prepare(config, _open_source(config))


def _prepare(config: DataConfig, source: Source) -> _Prepared:
    task = _find_task(config, source)
    tokenizer = _make_tokenizer(config, source)
    folders, digests = {}, {}
    for split in ("train", "validation"):
        key = hash_json([_CACHE_VERSION, source.identity, source.task, tokenizer.name, split])
        folders[split] = Path(config.data_dir, "tokens", f"{config.kind}-{split}-{key[:16]}")
        digests[split] = cached_folder(
            folders[split],
            lambda folder, split=split: _write_tokens(folder, source, tokenizer, split),
        )
    return _Prepared(source, task, tokenizer, folders, hash_json(digests))


def _open_source(config: DataConfig) -> Source:
    # Each kind is imported on demand: TFDS alone takes a second.
    match config.kind:
        case "stdlib":
            from sparsejax.data.sources.text import open_stdlib

            return open_stdlib(config.validation_fraction)
        case "text":
            from sparsejax.data.sources.text import open_text

            utf8 = "any" if config.tokenizer == "bytes" else "required"
            return open_text(Path(config.rest), config.validation_fraction, utf8=utf8)
        case "listops":
            from sparsejax.data.sources.listops import open_listops

            return open_listops(config)
        case "pathfinder":
            from sparsejax.data.sources.pathfinder import open_pathfinder

            return open_pathfinder(config)
        case "idx":
            from sparsejax.data.sources.idx import open_idx

            return open_idx(config)
        case "aan":
            from sparsejax.data.sources.aan import open_aan

            return open_aan(config)
        case "pairs":
            return open_pairs(config)
        case _:
            from sparsejax.data.sources.tfds import open_tfds

            return open_tfds(config)


def _find_task(config: DataConfig, source: Source) -> Task:
    if not config.mask_fraction:
        return source.task
    if source.task != "language_model":
        raise ValueError(
            f"mask_fraction={config.mask_fraction}: the examples of {config.source} have labels; "
            "expected 0.0, or texts without"
        )
    return "masked_language_model"


def _check_num_patches(config: DataConfig, source: Source) -> None:
    if source.grid and source.grid.num_patches > config.sequence_length:
        raise ValueError(
            f"sequence_length={config.sequence_length}: the images of {config.source} have "
            f"{source.grid.num_patches} patches; expected at least that"
        )


def _make_tokenizer(config: DataConfig, source: Source) -> Tokenizer:
    if source.num_values is not None:
        return value_tokenizer(source.num_values)
    if config.tokenizer == "bytes":
        return byte_tokenizer()
    vocab_size = int(config.tokenizer.partition(":")[2])
    key = hash_json([_CACHE_VERSION, source.identity, config.tokenizer])
    folder = Path(config.data_dir, "tokenizers", f"{config.kind}-bpe{vocab_size}-{key[:16]}")

    def build(temporary: Path) -> None:
        texts = (bytes(text) for example in source.read("train") for text in example.documents)
        train_bpe(temporary, show_progress(texts, "Training the tokenizer"), vocab_size)

    digest = cached_folder(folder, build)
    return load_bpe(folder, f"{config.tokenizer}:{digest[:16]}")


def _write_tokens(folder: Path, source: Source, tokenizer: Tokenizer, split: Split) -> None:
    examples: Iterator[Example] = show_progress(
        source.read(split), f"Writing the {split} split as tokens"
    )
    if source.task == "language_model":
        store.write_stream(folder, examples, tokenizer)
    else:
        # Without classes every label is 0.
        store.write_documents(folder, examples, tokenizer, source.num_classes or 1)


def _open_examples(config: DataConfig, prepared: _Prepared, split: Split) -> pipeline.ExampleSource:
    folder, length, source = prepared.folders[split], config.sequence_length, prepared.source
    if source.task == "language_model":
        shifted = prepared.task == "language_model"
        examples = store.Windows(folder, prepared.tokenizer, length, shifted=shifted)
    elif source.grid:
        examples = store.Patches(folder, source.grid, length)
    else:
        if source.task == "translation":
            examples = Translations(folder, prepared.tokenizer, length)
        else:
            paired = source.task == "matching"
            examples = store.Documents(folder, prepared.tokenizer, length, paired)
        if not config.truncate:
            examples.check_lengths(split)
    if not len(examples):
        raise ValueError(
            f"sequence_length={length}: the {split} split of {config.source} has not one example "
            "of that length; expected more data or a shorter length"
        )
    return examples


def _make_transforms(
    config: DataConfig, prepared: _Prepared
) -> dict[Split, pipeline.Transform | None]:
    """Return what changes the examples of each split at random."""
    grid = prepared.source.grid
    if prepared.task == "masked_language_model":
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
