"""Functions and classes of a user's own, by names that settings can hold: "module:function"."""

import importlib
import sys
from collections.abc import Callable
from typing import Any

_EXPECTED = "the module and name of a function, as in 'my_package.my_module:make_it'"


def name_function(function: Callable[..., Any], what: str) -> str:
    """Return the name that `find_function` finds a function by.

    Args:
      function: at the top of a module.
      what: it is, for the message.

    Raises:
      ValueError: if it is none, so that a run could not say what it was.

    Example:
      >>> name_function(find_function, "it")
      'sparsejax.dotted:find_function'
    """
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module == "__main__":
        # As it was started with `python -m`; a script has no name to be imported by.
        spec = sys.modules["__main__"].__spec__
        module = spec and spec.name
    if not callable(function) or not module or not name.isidentifier():
        raise ValueError(
            f"{what} must be a function at the top of a module that can be imported, so that a run "
            f"can name it, got {function!r}"
        )
    return f"{module}:{name}"


def find_function(name: str, setting: str) -> Any:
    """Import a function.

    Args:
      name: "package.module:function".
      setting: that holds the name, for the message.

    Raises:
      ValueError: if there is no such module or function; the message says which.

    Example:
      >>> find_function("sparsejax.dotted:name_function", "it").__name__
      'name_function'
    """
    module_name, _, function_name = name.partition(":")
    refused = f"{setting} must be {_EXPECTED}, got {name!r}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{refused}: {error}") from error
    except (TypeError, ValueError) as error:
        raise ValueError(refused) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{refused}: {module_name} has no function {function_name!r}")
    return function
