"""Sets that Hugging Face `datasets` saved to disk, mapped by Apache Arrow.

What `save_to_disk` writes are streams of Arrow and a description in JSON. `pyarrow` reads both, and
is installed with TensorFlow Datasets; `datasets` itself would bring pandas and a dozen more.
"""

import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sparsejax.data.arrow import check_columns, iterate_rows, refuse_damaged
from sparsejax.data.cache import identify_files
from sparsejax.data.config import DataConfig
from sparsejax.data.pictures import identify_images, prepare_images
from sparsejax.data.rows import (
    TEXT_OPTIONS,
    Classes,
    Documents,
    Table,
    describe_rows,
    find_classes,
    make_text_documents,
    open_rows,
)
from sparsejax.data.source import Contents, Options, Source
from sparsejax.data.splits import Division, divide
from sparsejax.strict_json import load_json

OPTIONS = Options(
    TEXT_OPTIONS | {"patch_size", "image_size"},
    with_patches=("image_channels", "random_crop", "random_flip"),
)

_INFO, _STATE, _DICT = "dataset_info.json", "state.json", "dataset_dict.json"
_TEXTS = ("string", "large_string")
_EXPECTED = "what save_to_disk of datasets writes"


class _Set(NamedTuple):
    """What is known of a set without its rows, but for those of labels that are not declared."""

    division: Division[Path]
    keys: tuple[str, str]
    classes: Classes | None
    documents: Documents


def describe_hf(config: DataConfig) -> Contents:
    """Describe a set by its JSON; labels that no ClassLabel declares are read.

    Args:
      config: Settings with `source="hf:/folder"`.

    Returns:
      Its contents.

    Raises:
      ValueError: As `open_hf`.
    """
    found = _understand(config)
    return describe_rows(found.classes, found.documents)


def open_hf(config: DataConfig) -> Source:
    """Open a folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.

    Texts with a ClassLabel, if there is one, are classified, and so are images; texts without are a
    corpus. A set without a validation split is divided by `validation_fraction`.

    Args:
      config: Settings with `source="hf:/folder"`; `input_key` is the feature to read, `"text"` or
        the only text or image if empty, `label_key` a label: a ClassLabel, numbers or names.

    Returns:
      The set.

    Raises:
      ValueError: The folder is no such set or damaged, or lacks the split or feature asked for.
    """
    found = _understand(config)
    return open_rows(
        config,
        _TABLE,
        found.division,
        keys=found.keys,
        classes=found.classes,
        documents=found.documents,
        identity=identify_images(config) if found.documents.num_values else {},
    )


def _understand(config: DataConfig) -> _Set:
    division = _divide(config, Path(config.rest))
    info = division.members["train"][0].with_name(_INFO)
    features = _get(_load(info), info, "features", dict)
    input_key, is_image = _choose_input(config, features)
    label_key = _choose_label(config, features, is_image)
    classes = _find_classes(division, features, label_key)
    if is_image:
        documents = prepare_images(config, *_read_first_image(division, input_key))
    else:
        _refuse_image_options(config)
        documents = make_text_documents(may_be_empty=classes is None)
    return _Set(division, (input_key, label_key), classes, documents)


def _divide(config: DataConfig, root: Path) -> Division[Path]:
    """Return the files of each split: of a DatasetDict by name, of a Dataset by a share."""
    if (root / _DICT).is_file():
        names = _get(_load(root / _DICT), root / _DICT, "splits", list)
        splits = divide(config, names, operator.eq)
        return Division(
            {
                split: [file for name in found for file in _list_shards(root / name)]
                for split, found in splits.members.items()
            },
            splits.fraction,
        )
    if not (root / _STATE).is_file():
        raise ValueError(
            f"source={config.source!r}: the folder holds neither {_DICT} nor {_STATE}; expected "
            f"{_EXPECTED}"
        )
    if config.train_split or config.validation_split:
        raise ValueError(
            f"source={config.source!r} has no splits with names; leave train_split and "
            "validation_split empty"
        )
    files = _list_shards(root)
    return Division({"train": files, "validation": files}, config.validation_fraction)


def _refuse_image_options(config: DataConfig) -> None:
    for name in ("patch_size", "image_size"):
        if getattr(config, name):
            raise ValueError(
                f"{name}={getattr(config, name)} does not apply to the texts of {config.source}; "
                "leave it at 0"
            )


def _choose_input(config: DataConfig, features: dict[str, Any]) -> tuple[str, bool]:
    """Return the key of the text or image, and whether it is an image."""
    texts = [key for key, feature in features.items() if _get_type(feature) in _TEXTS]
    images = [key for key, feature in features.items() if _get_type(feature) == "Image"]
    found = [*texts, *images]
    key = config.input_key or ("text" if "text" in texts else "")
    key = key or (found[0] if len(found) == 1 else images[0] if len(images) == 1 else "")
    if key not in found:
        shown = ", ".join(f"{name}: {_get_type(feature)}" for name, feature in features.items())
        raise ValueError(
            f"input_key={config.input_key!r}: {config.source} has {shown}; expected the name of a "
            "string or an Image"
        )
    if key in images and config.tokenizer != "bytes":
        raise ValueError(
            f"tokenizer={config.tokenizer!r} does not apply to the images of {config.source}; "
            "leave it at 'bytes'"
        )
    return key, key in images


def _choose_label(config: DataConfig, features: dict[str, Any], image: bool) -> str:
    declared = [key for key, feature in features.items() if _get_type(feature) == "ClassLabel"]
    key = config.label_key or (declared[0] if len(declared) == 1 else "")
    if key not in features and (key or image):
        raise ValueError(
            f"label_key={config.label_key!r}: {config.source} has {', '.join(features)}; expected "
            "the name of a label"
        )
    return key


def _find_classes(
    division: Division[Path], features: dict[str, Any], label_key: str
) -> Classes | None:
    if not label_key:
        return None
    if _get_type(features[label_key]) == "ClassLabel":
        return Classes(len(features[label_key]["names"]))
    files = tuple(dict.fromkeys(division.members["train"] + division.members["validation"]))
    return find_classes(
        _TABLE, files, label_key, identify_files((str(file), file) for file in files)
    )


def _get_type(feature: Any) -> str:
    """Return the name of a feature's class, or of its type where it is a plain value."""
    if not isinstance(feature, dict):
        return type(feature).__name__
    kind = feature.get("_type")
    return str(feature.get("dtype") if kind == "Value" else kind)


def _list_shards(folder: Path) -> list[Path]:
    state = _load(folder / _STATE)
    if isinstance(state, dict) and state.get("_indices_data_files"):
        raise ValueError(
            f"{folder} was saved with its rows out of order, as datasets did before version 2.1; "
            "expected them in order: flatten_indices() before save_to_disk()"
        )
    entries = _get(state, folder / _STATE, "_data_files", list)
    names = [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in entries]
    if not all(name and name == Path(name).name for name in names):
        raise ValueError(f"{folder / _STATE} names the files {names}; expected {_EXPECTED}")
    return [folder / name for name in names]


def _load(path: Path) -> Any:
    try:
        return load_json(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read: {reason}; expected {_EXPECTED}") from error


def _get(value: Any, path: Path, key: str, expected: type) -> Any:
    found = value.get(key) if isinstance(value, dict) else None
    if not found or not isinstance(found, expected):
        raise ValueError(f"{path} has {found!r} for {key!r}; expected {_EXPECTED}")
    return found


def _read_first_image(division: Division[Path], key: str) -> tuple[Any, str]:
    """Return the value, and where it stands."""
    for file in division.members["train"]:
        for (value,) in _read(file, (key,)):
            return value, f"{file}, {_TABLE.unit} 1"
    raise ValueError(f"{division.members['train'][0].parent} has no rows; expected images")


def _read(path: Path, keys: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    import pyarrow

    with refuse_damaged(path, _EXPECTED), pyarrow.memory_map(str(path)) as file:
        reader = pyarrow.ipc.open_stream(file)
        check_columns(path, reader.schema, keys)
        for batch in reader:
            for row in iterate_rows(batch, keys):
                # An image is a struct of its file's contents and name.
                yield tuple(x.get("bytes") if isinstance(x, dict) else x for x in row)


_TABLE = Table("row", (".arrow",), _read, may_be_empty=True)
