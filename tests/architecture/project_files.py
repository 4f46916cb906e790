"""The project's own files, as the architecture tests see them."""

import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
PACKAGES = ("pallas_kernels", "sparsejax", "benchmarks", "configs")
FOLDERS = (*PACKAGES, "tests", "docs", "requirements", ".ci", ".github")


def list_files() -> list[pathlib.Path]:
    """List the files of the project, without what tools leave behind.

    Returns:
      list of paths relative to the root.
    """
    files = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in FOLDERS:
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path.relative_to(ROOT) for path in sorted(files) if "__pycache__" not in path.parts]


def list_modules() -> dict[str, pathlib.Path]:
    """List the modules of the shipped packages and `train.py`.

    Returns:
      dict from dotted name to path relative to the root; a package goes by its own name.
    """
    paths = [pathlib.Path("train.py")]
    paths += [path for path in list_files() if path.suffix == ".py" and path.parts[0] in PACKAGES]
    return {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in paths}
