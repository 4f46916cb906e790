"""Triton kernels broken on purpose, in a copy of their file."""

import importlib
import importlib.util
import inspect


def break_kernel(monkeypatch, folder, package, module_name, old, new):
    """Put another text in a file of kernels; the broken copy takes the place of its module.

    Args:
      monkeypatch: of pytest.
      folder: pathlib.Path of the copy.
      package: module of the folder that the kernels are in, from which they are imported when they
        are launched.
      module_name: of the file, without its folder.
      old: what stands in the file.
      new: what is put in its place, everywhere.
    """
    source = inspect.getsource(importlib.import_module(f"{package.__name__}.{module_name}"))
    assert old in source, f"{module_name} has no {old!r}"
    path = folder / "broken.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"broken_{module_name}", path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    monkeypatch.setattr(package, module_name, broken)
