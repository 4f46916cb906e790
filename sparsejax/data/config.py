"""The settings of a data set, checked before any file is touched."""

import dataclasses
import os
import re
from pathlib import Path

from sparsejax.data.masking import count_chosen
from sparsejax.data.sources import check_spelling, load_source

_NOT_WITH_PATCHES = ("truncate", "tokenizer", "mask_fraction")
_COMMON = {"source", "data_dir", "sequence_length", "batch_size", "seed", "num_reading_threads"}
# What they name is of one data set.
_NAMES = {"train_split", "validation_split", "input_key", "label_key"}
# Arrays are indexed, and ids are counted, with int32.
_MOST_ITEMS = 2**31 - 1
# Of a tokenizer, how few and how many ids.
_SIZES = {
    "bpe": (257, " (256 bytes and the separator)", 65_536),
    "ids": (2, "", _MOST_ITEMS),
}
# Of an image; eight thousand squared are 200 MB of RGB.
_MOST_PIXELS_A_SIDE = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Name a data set and say how it is cut into batches.

    A leading ~ in `data_dir` and in a path within `source` or `tokenizer` stands for the home
    folder.

    Attributes:
      source: What to read.

        - `"stdlib"`: the running Python's standard-library sources, a language-model corpus.
        - `"text:/path"`: a text file or a folder of them, a language-model corpus.
        - `"listops"`, `"listops:short"`: Long Range Arena ListOps, lengths 501-1999 or 21-199.
        - `"pathfinder"`: Long Range Arena Pathfinder, 32 x 32 pixels.
        - `"copying:hidden_permutation"`, `"copying:fixed_lag"`, `"copying:associative_recall"`: an
          encoder has to fill in the second half, a copy of the first, block by block: in one
          permutation, at half of the length, or in an order that the first symbol of each block
          tells.
        - `"idx:/folder"`: images in MNIST's IDX format as sequences of pixels or patches.
        - `"tfds:NAME[/config]"`: a TFDS set; text or images with labels are classified, text
          without a label is a language-model corpus.
        - `"aan:/path"`: Long Range Arena retrieval, two documents and one label.
        - `"pairs:/folder"`: sentences and their translations, files of one sentence per line.
        - `"jsonl:/path"`: texts in a file of JSON, one object a line, or those below a folder
          (`*.jsonl`, `*.jsonl.gz`); `label_key` makes them a set to be classified.
        - `"parquet:/path"`: the same of Parquet (`*.parquet`).
        - `"hf:/folder"`: what `save_to_disk` of Hugging Face `datasets` wrote; text or images with
          labels are classified, text without a label is a language-model corpus.
        - `"bin:/path"`: token ids as nanoGPT, llm.c and modded-nanogpt write them, a folder, a file
          or a pattern such as `"bin:/path/fineweb_*.bin"`; `tokenizer` says how many there are.
        - `"images:/folder"`: image files, in a folder for each class.
      data_dir: Folder of prepared sets, tokenizers and caches; made when missing.
      tokenizer: `"bytes"`, or `"bpe:N"` for N byte-level BPE entries trained on the training
        split, or `"file:/path"` for an existing `tokenizer.json`, or a folder with one. What spells
        out a special token in a text is text. `"bin:"` has ids already, of `"file:/path"`, or N of
        them with `"ids:N"` (GPT-2 has 50257). Sources of pixels or symbols have their own
        vocabulary.
      sequence_length: Tokens, pixels or patches per example, T.
      batch_size: Examples per step over all processes.
      seed: Order of the training examples, in [0, 2^32).
      num_reading_threads: 0 reads in the caller's thread, 1 reads ahead in another.
      truncate: Whether a longer classification example is cut to its first T tokens, as Long
        Range Arena does, and a longer sentence to be translated; otherwise it is an error.
      download: Whether a TFDS set that is not prepared may be downloaded.
      train_split: Name of the training split; empty for the source's own (`"train"`). TFDS slices
        such as `"train[:90%]"` are names. Of `"jsonl:"`, `"parquet:"` and `"bin:"`, a word in the
        names of files.
      validation_split: Name of the validation split; empty for the source's own: `"validation"`,
        `"t10k"` (IDX), `"eval"` (AAN), `"test"` for a TFDS set without `"validation"`. Of
        `"jsonl:"`, `"parquet:"`, `"hf:"`, `"bin:"` and `"images:"` the first there is of
        `"validation"`, `"valid"`, `"val"`, `"dev"` and `"test"`; without any, and with no more than
        a training split, `validation_fraction` is held out.
      input_key: What to read: a feature of TFDS or `"hf:"`, empty for the one the set declares; a
        key of `"jsonl:"`, a column of `"parquet:"`, empty for `"text"`.
      label_key: The label to predict, of the same. Empty for the one that TFDS or `"hf:"` declares;
        `"jsonl:"` and `"parquet:"` then have none. Whole numbers, or names that are numbered in
        their order.
      image_size: Side that the largest square in the middle of each image is scaled to, in
        pixels; 0 for images as they are stored. Of a TFDS or `"hf:"` set, of `"images:"`, or of IDX
        images in patches.
      validation_fraction: Share held out of a set without a validation split, in (0, 1): of files
        by the hash of their names, of rows by that of their texts, of ids and of a single text file
        the tail.
      listops_examples: Training examples of ListOps; validation and test have 1/48 as many each.
      pathfinder_examples: The same of Pathfinder, with 1/8.
      copy_block: Positions of a block that is copied.
      copy_symbols: Number of symbols, in [2, 256].
      copy_permutation: Seed of the hidden permutation.
      copy_examples: Training examples of a copying task; validation has a tenth as many.
      mask_fraction: Share of the tokens of a corpus that are masked and must be predicted (masked
        language model), in (0, 1); 0 to predict the next token.
      patch_size: Side of the square patches that images are cut into, in pixels; 0 for single
        pixels of grey. What follows applies to patches only.
      image_channels: What the images must have, 1 (grey) or 3 (RGB); 0 for what they have. Those of
        `"images:"` and `"hf:"` are converted.
      random_crop: Whether a random part of each training image is scaled to the whole.
      random_flip: Whether left and right of a training image are swapped, half of the time.

    Raises:
      ValueError: An option is out of range or does not apply to the source.

    Example:
      >>> DataConfig(source="idx:/mnist", sequence_length=784).kind
      'idx'
    """

    source: str = "stdlib"
    data_dir: str = "~/.cache/sparsejax"
    tokenizer: str = "bytes"
    sequence_length: int = 1024
    batch_size: int = 8
    seed: int = 0
    num_reading_threads: int = 0
    truncate: bool = False
    download: bool = False
    train_split: str = ""
    validation_split: str = ""
    input_key: str = ""
    label_key: str = ""
    image_size: int = 0
    validation_fraction: float = 0.05
    listops_examples: int = 96_000
    pathfinder_examples: int = 160_000
    copy_block: int = 8
    copy_symbols: int = 16
    copy_permutation: int = 0
    copy_examples: int = 100_000
    mask_fraction: float = 0.0
    patch_size: int = 0
    image_channels: int = 0
    random_crop: bool = False
    random_flip: bool = False

    def __post_init__(self):
        self._check_types()
        check_spelling(self.source)
        _check_tokenizer(self.tokenizer)
        if not self.data_dir:
            raise ValueError(f"data_dir={self.data_dir!r}: expected the path of a folder")
        if os.path.expanduser(self.data_dir).startswith("~"):
            raise ValueError(
                f"data_dir={self.data_dir!r}: expected ~ or the name of a user after it"
            )
        _check_integer("sequence_length", self.sequence_length, 1, _MOST_ITEMS)
        _check_integer("batch_size", self.batch_size, 1, _MOST_ITEMS)
        if self.batch_size * self.sequence_length > _MOST_ITEMS:
            raise ValueError(
                f"batch_size={self.batch_size}: expected at most {_MOST_ITEMS} positions in a "
                f"batch of sequence_length={self.sequence_length}"
            )
        _check_integer("seed", self.seed, 0, 2**32 - 1)
        _check_integer("num_reading_threads", self.num_reading_threads, 0, 1)
        _check_integer("listops_examples", self.listops_examples, 48, _MOST_ITEMS)
        _check_integer("pathfinder_examples", self.pathfinder_examples, 8, _MOST_ITEMS)
        _check_integer("copy_block", self.copy_block, 1, _MOST_ITEMS)
        _check_integer("copy_symbols", self.copy_symbols, 2, 256)
        _check_integer("copy_permutation", self.copy_permutation, 0, 2**32 - 1)
        _check_integer("copy_examples", self.copy_examples, 10, _MOST_ITEMS)
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"validation_fraction={self.validation_fraction}: expected a number in (0, 1)"
            )
        if not 0.0 <= self.mask_fraction < 1.0:
            raise ValueError(f"mask_fraction={self.mask_fraction}: expected a number in [0, 1)")
        if self.mask_fraction and not count_chosen(self.sequence_length, self.mask_fraction):
            raise ValueError(
                f"mask_fraction={self.mask_fraction}: not one of sequence_length="
                f"{self.sequence_length} tokens would be hidden; expected more"
            )
        _check_integer("patch_size", self.patch_size, 0, _MOST_PIXELS_A_SIDE)
        _check_integer("image_size", self.image_size, 0, _MOST_PIXELS_A_SIDE)
        if self.image_channels not in (0, 1, 3):
            raise ValueError(
                f"image_channels={self.image_channels}: expected 1 (grey), 3 (RGB) or 0"
            )
        options = load_source(self.kind).options
        allowed = _COMMON.union(options.always, options.with_patches)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name not in allowed and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} does not apply to source={self.source!r}; "
                    f"leave it at {field.default!r}"
                )
        kinds = [spelling.partition(":")[0] for spelling in options.tokenizers]
        if "tokenizer" in options.always and self.tokenizer.partition(":")[0] not in kinds:
            raise ValueError(
                f"tokenizer={self.tokenizer!r} does not apply to source={self.source!r}; expected "
                f"{' or '.join(map(repr, options.tokenizers))}"
            )
        self._check_patches(options.with_patches)

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            value, expected = getattr(self, field.name), type(field.default)
            # A whole number is a share too.
            if type(value) is not expected and (type(value), expected) != (int, float):
                raise ValueError(f"{field.name}={value!r}: expected {expected.__name__}")
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{field.name}={value!r}: expected text without the byte 0")

    def _check_patches(self, names: tuple[str, ...]) -> None:
        for name in names:
            if getattr(self, name) and not self.patch_size:
                raise ValueError(f"{name}={getattr(self, name)}: expected patch_size above 0 too")
        if not self.patch_size:
            return
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size}: expected a multiple of patch_size={self.patch_size}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _NOT_WITH_PATCHES and value != field.default:
                raise ValueError(
                    f"{field.name}={value!r} does not apply to patches; leave it at "
                    f"{field.default!r}"
                )

    @property
    def kind(self) -> str:
        """Return the part of `source` before the colon."""
        return self.source.partition(":")[0]

    @property
    def rest(self) -> str:
        """Return the part of `source` after the colon, ~ expanded; empty without one."""
        return os.path.expanduser(self.source.partition(":")[2])

    @property
    def data_path(self) -> Path:
        """Return `data_dir` with ~ expanded."""
        return Path(os.path.expanduser(self.data_dir))


def change_source(config: DataConfig, source: str) -> DataConfig:
    """Read other data as a data set is read: tokenizer, lengths and batches stay.

    What does not apply to the other source goes back to its default, and, between sources of
    different kinds, so do names of splits and keys.

    Args:
      config: Of the data set.
      source: As `DataConfig.source`.

    Returns:
      Settings of the other data.

    Raises:
      ValueError: There is no such source, or it takes no tokenizer like this one.

    Example:
      >>> change_source(DataConfig(source="tfds:lm1b", input_key="text"), "text:/book").input_key
      ''
    """
    check_spelling(source)
    kind = source.partition(":")[0]
    options = load_source(kind).options
    allowed = _COMMON.union(options.always, options.with_patches) - {"source"}
    if kind != config.kind:
        allowed -= _NAMES
    kept = {name: getattr(config, name) for name in allowed}
    return DataConfig(source=source, **kept)


def _check_tokenizer(tokenizer: str) -> None:
    kind, _, rest = tokenizer.partition(":")
    if tokenizer == "bytes" or (kind == "file" and rest):
        return
    if kind not in _SIZES or not re.fullmatch("[1-9][0-9]*", rest):
        raise ValueError(
            f"tokenizer={tokenizer!r}: expected 'bytes', 'bpe:N' (as in 'bpe:4096'), 'file:/path' "
            "or 'ids:N'"
        )
    low, meaning, high = _SIZES[kind]
    # Python refuses to make a number of thousands of digits.
    if not low <= (int(rest) if len(rest) < 11 else high + 1) <= high:
        raise ValueError(
            f"tokenizer={tokenizer!r}: expected between {low}{meaning} and {high} entries"
        )


def _check_integer(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: expected an integer in [{low}, {high}]")
