"""Which files of a set are for training and which for validation, by their names or by a share."""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from sparsejax.data.config import DataConfig
from sparsejax.data.files import list_files
from sparsejax.data.source import Split

# The first of them that a set has is its validation split, unless settings name one.
_VALIDATION_NAMES = ("validation", "valid", "val", "dev", "test")
_NUM_SHOWN = 8


class Division[T](NamedTuple):
    """The members of a set, files or splits, by what they are for.

    Attributes:
      members: By split, in order.
      fraction: Share that must be held out of them, where both splits have the same; otherwise 0.
    """

    members: dict[Split, list[T]]
    fraction: float


def find_files(config: DataConfig, suffixes: tuple[str, ...]) -> dict[Path, str]:
    """Find the files of a source: one of any name, or those below a folder.

    Args:
      config: Settings with `source="kind:/path"`.
      suffixes: How names below a folder end.

    Returns:
      Their names by path, in order; hidden ones are left out.

    Raises:
      ValueError: There is no such file or folder, or nothing in it.
    """
    path = Path(config.rest)
    if path.is_file():
        return {path: path.name}
    if not path.is_dir():
        raise ValueError(f"source={config.source!r}: no such file or folder")
    found = {file: file.relative_to(path).as_posix() for file in list_files(path, suffixes)}
    if not found:
        expected = " or ".join(f"*{suffix}" for suffix in suffixes)
        raise ValueError(f"source={config.source!r}: the folder holds no {expected}")
    return found


def divide_files(config: DataConfig, names: dict[Path, str]) -> Division[Path]:
    """Divide files by the words of their names: `train-0001.x`, `sub/val.x`, `c4_train_01.x`.

    One that is alone is divided by `validation_fraction`, whatever its name.

    Args:
      config: Settings; `train_split` and `validation_split` are such words.
      names: By path, folders included.

    Returns:
      The files of each split.

    Raises:
      ValueError: The names do not say it, or contradict settings.
    """

    def belongs(file: Path, word: str) -> bool:
        return bool(re.search(rf"(?<![A-Za-z]){re.escape(word)}(?![A-Za-z])", names[file]))

    files = list(names)
    if len(files) == 1 and not (config.train_split or config.validation_split):
        return Division({"train": files, "validation": files}, config.validation_fraction)
    return divide(config, files, belongs, names.__getitem__)


def divide[T](
    config: DataConfig,
    members: Sequence[T],
    belongs: Callable[[T, str], bool],
    describe: Callable[[T], str] = str,
) -> Division[T]:
    """Divide members of a set by the names of splits.

    A set that has names of splits nowhere, or all members in the training split, is divided
    within its members, by `validation_fraction`.

    Args:
      config: Settings; empty names of splits stand for `"train"`, and for the first of
        `"validation"`, `"valid"`, `"val"`, `"dev"` and `"test"` that the set has.
      members: Of the set.
      belongs: Whether a member is of the split of a name.
      describe: A member's name, for messages.

    Returns:
      The members of each split; some may be of neither.

    Raises:
      ValueError: One of the two splits has no member or they share some, or a
        `validation_fraction` is set where there is a validation split.
    """

    def find(name: str) -> list[T]:
        return [member for member in members if belongs(member, name)]

    train = find(config.train_split or "train")
    names = [config.validation_split] if config.validation_split else _VALIDATION_NAMES
    validation = next(filter(None, map(find, names)), [])
    if not (train or validation or config.train_split or config.validation_split):
        train = list(members)
    held_out = not (validation or config.validation_split) and (
        len(train) == len(members) or bool(config.train_split)
    )
    if not train or not (validation or held_out):
        wanted = f"{config.train_split or 'train'!r} and {' or '.join(map(repr, names))}"
        raise ValueError(
            f"source={config.source!r}: found {_show(map(describe, members))}; expected splits "
            f"{wanted}, or others that train_split and validation_split name"
        )
    known = set(validation)
    if shared := [describe(member) for member in train if member in known]:
        raise ValueError(
            f"source={config.source!r}: found {_show(shared)} in both splits; expected names of one"
        )
    if held_out:
        return Division({"train": train, "validation": train}, config.validation_fraction)
    if config.validation_fraction != DataConfig.validation_fraction:
        raise ValueError(
            f"validation_fraction={config.validation_fraction} does not apply to "
            f"source={config.source!r}, which has a validation split, "
            f"{_show(map(describe, validation))}; leave it at {DataConfig.validation_fraction}"
        )
    return Division({"train": train, "validation": validation}, 0.0)


def _show(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, _NUM_SHOWN + 1))
    return ", ".join(first[:_NUM_SHOWN]) + (", ..." if len(first) > _NUM_SHOWN else "")
