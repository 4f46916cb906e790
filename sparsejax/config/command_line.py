"""What flags leave open: names of GPUs and configs, settings that are cleared, one-line errors."""

import ast
import contextlib
import difflib
import functools
import importlib
import pathlib
import re
import tomllib
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from sparsejax.config.shipped import extend_path, find_config, suggest

_CONFIG_FLAG = ("--config", "-config")
# A run has recorded its settings, and a pretrained model has none.
_WITHOUT_CONFIG = re.compile(r"--?mode=(eval|generate)")
_HELP = re.compile(r"--?(\?|help\w*)")
_CLEARED = re.compile(r"--?config\.([\w.]+)=None")
_SET_RECIPE = re.compile(r"--?(?:no)?config\.recipe\.(\w+)\.")
# What absl and ml_collections say of a value that is not of its setting's type.
_MISTYPED = re.compile(
    r"flag --(?:config\.)?([\w.]+)=(.*?): "
    r"(invalid literal for int|could not convert string to float"
    r"|\('Non-boolean|Failed to parse)",
    re.DOTALL,
)
_KINDS = ("a whole number", "a number", "True or False", "set by one of its keys, KEY.NAME=VALUE")
_UNKNOWN_FLAG = re.compile(r"Unknown command line flag '([\w.]+)'")
_UNKNOWN_KEY = re.compile(r"""[\\"']+(\w+)[\\"']+(?:.*Did you mean.*)?""", re.DOTALL)
_NO_VARIANTS = re.compile(r"get_config\(\) takes 0 positional arguments but 1 was given")
_NO_FILE = re.compile(r"No such file or directory: '(.*)'")

# Read as a file: importing anything of pallas_kernels imports JAX, and --help would wait for it.
_TARGETS = pathlib.Path(__file__).parents[2] / "pallas_kernels" / "gpu_targets.toml"


def list_targets() -> list[str]:
    """Return the names of the GPUs that programs can be compiled for.

    Example:
      >>> list_targets()[:2]
      ['h200', 'h100']
    """
    return list(tomllib.loads(_TARGETS.read_text()))


def take_cleared(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take --config.KEY=None out of a command line.

    A flag has the type of its default, and no number is written None.

    Args:
      argv: sequence of str.

    Returns:
      (argv, keys): the other arguments, and the settings to clear.

    Example:
      >>> take_cleared(["train.py", "--config.optimizer.clip_norm=None", "--config.seed=1"])
      (['train.py', '--config.seed=1'], ['optimizer.clip_norm'])
    """
    found = [(argument, _CLEARED.fullmatch(argument)) for argument in argv]
    return [a for a, match in found if not match], [match[1] for _, match in found if match]


def clear_settings(config: ConfigDict, keys: Sequence[str]) -> None:
    """Set settings to None, whatever their types.

    Args:
      config: ConfigDict, changed.
      keys: with dots between the parts.

    Raises:
      AttributeError: if there is no such setting.

    Example:
      >>> config = ConfigDict({"optimizer": {"clip_norm": 1.0}})
      >>> clear_settings(config, ["optimizer.clip_norm"])
      >>> print(config.optimizer.clip_norm)
      None
    """
    for key in keys:
        *sections, name = key.split(".")
        section = functools.reduce(getattr, sections, config)
        if not isinstance(section, ConfigDict) or isinstance(getattr(section, name), ConfigDict):
            raise AttributeError(f"--config.{key} must be a setting with a value, and no section")
        with section.ignore_type():
            setattr(section, name, None)


def name_files(argv: Sequence[str]) -> list[str]:
    """Replace the name of a shipped config after --config by its file.

    Args:
      argv: sequence of str.

    Raises:
      ValueError: if there is no such config.

    Example:
      >>> name_files(["train.py", "--config", "mine.py", "--config.seed=1"])
      ['train.py', '--config=mine.py', '--config.seed=1']
    """
    named, rest = [], list(argv)
    while rest:
        argument = rest.pop(0)
        if argument in _CONFIG_FLAG and rest:
            argument = f"{argument}={rest.pop(0)}"
        flag, equals, value = argument.partition("=")
        if flag in _CONFIG_FLAG and equals:
            argument = f"{flag}={find_config(value)}"
        named.append(argument)
    return named


def read_settings(argv: Sequence[str], flags: Any, config: Any) -> list[str]:
    """Parse a command line, and change the settings of a config file as it says.

    Args:
      argv: program and arguments.
      flags: `absl.flags.FLAGS`.
      config: the flag that `config_flags.DEFINE_config_file` returned; its settings are changed.

    Returns:
      list of str: the program, and arguments that are no flags.

    Raises:
      ValueError: if a flag, file, key or value is wrong, in one line.
    """
    program, *arguments = argv
    arguments = flags.read_flags_from_files(arguments)
    _refuse_without_config(arguments)
    argv, cleared = take_cleared([program, *name_files(arguments)])
    extend_path()
    try:
        rest = flags(argv)
        if config.value is not None:
            config.value.to_dict()  # a missing file shows only when the settings are read
            clear_settings(config.value, cleared)
            _refuse_unused(arguments, str(config.value.recipe["name"]))
    # absl's own error is none of these, and absl is not imported here.
    except Exception as error:
        known = [f"--{name}" for name in flags] + _list_setting_flags()
        raise ValueError(describe_error(error, known, arguments)) from error
    return rest


def _list_setting_flags() -> list[str]:
    """List --config.KEY of every setting."""
    # Configs build on this package, which knows them by name only.
    settings = importlib.import_module("configs.base").get_config().to_dict()

    def list_keys(section, prefix):
        for key, value in section.items():
            yield from (
                list_keys(value, f"{prefix}{key}.")
                if isinstance(value, dict)
                else (f"{prefix}{key}",)
            )

    return list(list_keys(settings, "--config."))


def _refuse_without_config(arguments: Sequence[str]) -> None:
    """Ask for a config: without one absl knows no --config.KEY, and there is nothing to change."""
    if any(argument.partition("=")[0] in _CONFIG_FLAG for argument in arguments):
        return
    if any(_HELP.fullmatch(argument) for argument in arguments):
        return  # absl lists the flags, and ends the process
    changes = any(re.match(r"--?(no)?config\.", argument) for argument in arguments)
    if not changes and any(_WITHOUT_CONFIG.fullmatch(argument) for argument in arguments):
        return
    names = {re.split(r"[.=]", argument)[0] for argument in arguments if argument.startswith("-")}
    close = difflib.get_close_matches(_CONFIG_FLAG[0], sorted(names - {*_CONFIG_FLAG}), n=1)
    hint = f"; {close[0]} is no flag" if close else ""
    raise ValueError(f"--config must be the name of a config or a .py file, got none{hint}")


def _refuse_unused(arguments: Sequence[str], name: str) -> None:
    """Refuse flags that set another method than the recipe of this name."""
    used = {"own" if ":" in method else method for method in name.split("+")}
    for argument in arguments:
        match = _SET_RECIPE.match(argument)
        if match and match[1] not in used:
            raise ValueError(
                f"{argument.lstrip('-').partition('=')[0]} must not be set in recipe {name!r}, "
                "which has no use for it"
            )


def describe_error(
    error: Exception, known: Sequence[str] = (), arguments: Sequence[str] = ()
) -> str:
    """Return what ml_collections raised, as one line.

    Args:
      error: for an unknown flag or key, a mistyped value or a missing file.
      known: flags that may have been meant, such as --config.num_steps.
      arguments: of the command line.

    Example:
      >>> describe_error(KeyError("no such key"))
      'no such key'
      >>> describe_error(ValueError("flag --config.seed=1e3: invalid literal for int() ..."))
      "seed must be a whole number, got '1e3'"
    """
    text = str(error)
    if match := _MISTYPED.match(text):
        starts = ("invalid", "could", "('Non", "Failed")
        kind = next(k for s, k in zip(starts, _KINDS, strict=True) if match[3].startswith(s))
        return f"{match[1]} must be {kind}, got {match[2]!r}"
    if match := _UNKNOWN_FLAG.search(text):
        same = [flag for flag in known if re.fullmatch(rf"--config\.(.*\.)?{match[1]}", flag)]
        others = [flag for flag in known if not flag.startswith("--config.")]
        meant = suggest(f"--{match[1]}", others)
        if same:
            meant = f"; did you mean {min(same, key=len)!r}?"
        return f"there is no flag --{match[1]}; settings are given as --config.KEY=VALUE{meant}"
    if match := _NO_FILE.search(text):
        return f"--config must be the name of a config or an existing .py file, got {match[1]!r}"
    if _NO_VARIANTS.search(text):
        (given,) = [a for a in arguments if a.partition("=")[0] in _CONFIG_FLAG][-1:] or ["?"]
        return f"this config has no variants, so that ':NAME' must not follow it, got {given}"
    # The text of a KeyError is quoted, sometimes twice.
    if match := _UNKNOWN_KEY.fullmatch(text):
        key = _find_key(match[1], arguments)
        settings = [flag.removeprefix("--config.") for flag in known if "." in flag]
        meant = suggest(key, settings)
        return f"there is no setting {key!r}{meant or '; `sparsejax settings` lists them all'}"
    if "Traceback" in text:  # of a config that refuses its argument
        text = text.strip().splitlines()[-1]
    # An unknown key arrives as the text of a KeyError, which is a quoted string.
    if text[:1] == text[-1:] and text[:1] in ("'", '"'):
        with contextlib.suppress(SyntaxError, ValueError):
            text = ast.literal_eval(text)
    return " ".join(text.split())


def _find_key(part: str, arguments: Sequence[str]) -> str:
    """Return the whole key, of those that are set, that has a part; the part if none has."""
    keys = (re.match(r"--?(?:no)?config\.([\w.]+)", argument) for argument in arguments)
    return next((m[1] for m in keys if m and part in m[1].split(".")), part)
