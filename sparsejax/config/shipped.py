"""The configs that come with the project, found by name in a clone and in an installed package."""

import difflib
import importlib
import os
import pathlib
import sys
from collections.abc import Sequence

_PACKAGE = pathlib.Path(__file__).parents[1]


def find_root() -> pathlib.Path:
    """Return the folder that holds the package `configs`.

    A wheel carries it inside `sparsejax/shipped`, so that no other project's `configs` is in its
    way; a clone has it beside `sparsejax`.
    """
    installed = _PACKAGE / "shipped"
    return installed if (installed / "configs").is_dir() else _PACKAGE.parent


def list_configs() -> list[str]:
    """Return the names of the configs that are runs: those whose docstring has a command.

    Example:
      >>> "quickstart" in list_configs(), "base" in list_configs()
      (True, False)
    """
    files = sorted((find_root() / "configs").glob("*.py"))
    return [path.stem for path in files if "\nCommand: " in path.read_text(encoding="utf-8")]


def find_config(value: str) -> str:
    """Return the file that a value of --config names, with the argument after its colon.

    Args:
      value: name of a shipped config or path to a .py file, maybe with `:ARGUMENT`.

    Raises:
      ValueError: if it is neither.

    Example:
      >>> find_config("mine.py:small")
      'mine.py:small'
      >>> find_config("spion:listops").endswith("configs/spion.py:listops")
      True
    """
    name, colon, argument = value.partition(":")
    if name.endswith(".py"):
        return value
    names = list_configs()
    if name not in names:
        expected = f"a .py file or one of {', '.join(names)}"
        raise ValueError(f"--config must be {expected}, got {name!r}{suggest(name, names)}")
    return f"{find_root() / 'configs' / name}.py{colon}{argument}"


def suggest(word: str, words: Sequence[str]) -> str:
    """Return the end of an error message that names the word that was probably meant, or "".

    Example:
      >>> suggest("trian", ["train", "eval"])
      "; did you mean 'train'?"
    """
    close = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def extend_path() -> None:
    """Let config files import the package `configs`, and modules in the current folder.

    A command that pip installed finds neither by itself. The current folder comes last, so that
    nothing in it takes the place of an installed package.
    """
    root, folder = str(find_root()), os.getcwd()
    if sys.path[:1] != [root]:
        sys.path.insert(0, root)
    if folder not in sys.path:
        sys.path.append(folder)


def describe_settings(sections: Sequence[str] = ()) -> str:
    """Write keys, defaults and meanings for a person, as `python -m configs.base` does.

    Args:
      sections: only those whose keys begin with one of these; empty for all.
    """
    extend_path()
    # Configs build on this package, which knows them by name only.
    return importlib.import_module("configs.base").describe_settings(sections)
