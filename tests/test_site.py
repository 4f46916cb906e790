"""The documentation site builds without a warning, leads everywhere, and leaves nothing out."""

import importlib
import pathlib
import pkgutil
import re
import subprocess
import sys
import types
import urllib.parse

import pytest

import sparsejax

pytestmark = pytest.mark.ci

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGES = (
    "pallas_kernels",
    "sparsejax",
    "sparsejax.calibration",
    "sparsejax.data",
    "sparsejax.generation",
    "sparsejax.masks",
    "sparsejax.models",
    "sparsejax.pretrained",
    "sparsejax.recipes",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does; return {path: HTML} of its pages, from its folder on."""
    folder = tmp_path_factory.mktemp("docs")
    (command,) = re.findall(r"-m sphinx (.+) -c", (_ROOT / "Makefile").read_text())
    build = [sys.executable, "-m", "sphinx", *command.split(), "-c", "docs", "-d"]
    build += [folder / "doctrees", ".", folder / "site"]
    done = subprocess.run(build, cwd=_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: path.read_text() for path in (folder / "site").rglob("*.html")}


def _find_start(site):
    return min(site, key=lambda path: len(path.parts) + (path.name != "index.html"))


def _list_links(path, text):
    """Yield the file and the heading that each link inside the site names."""
    for link in re.findall(r'<a\b[^>]*? href="([^"]*)"', text):
        url = urllib.parse.urlsplit(link)
        if not url.scheme:
            name = urllib.parse.unquote(url.path)
            yield (path.parent / name).resolve() if name else path, url.fragment


def test_every_link_leads_somewhere(site):
    # Those from Sphinx's copies of modules back to the reference are its own affair.
    pages = {path: text for path, text in site.items() if "_modules" not in path.parts}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in site.items()}
    dead = [
        f"{path.name}: {file.name}#{heading}"
        for path, text in pages.items()
        for file, heading in _list_links(path, text)
        if not file.is_file() or (heading and file in ids and heading not in ids[file])
    ]
    assert not dead, "\n".join(dead)


def test_every_page_is_reached_from_the_first(site):
    start = _find_start(site)
    reached, waiting = set(), [start]
    while waiting:
        path = waiting.pop()
        if path in site and path not in reached:
            reached.add(path)
            waiting += [file for file, _ in _list_links(path, site[path])]
    pages = [*_ROOT.glob("docs/**/*.md"), *_ROOT.glob("docs/**/*.rst")]
    pages += [*_ROOT.glob("benchmarks/results/*.md"), *_ROOT.glob("*.md")]
    expected = {start.parent / page.relative_to(_ROOT).with_suffix(".html") for page in pages}
    assert len(expected) > 70 and expected <= reached


def _list_public(package):
    """Return {name: object} of what a package offers, modules aside."""
    module = importlib.import_module(package)
    names = sparsejax._API if module is sparsejax else getattr(module, "__all__", vars(module))
    found = {name: getattr(module, name) for name in names if not name.startswith("_")}
    return {name: it for name, it in found.items() if not isinstance(it, types.ModuleType)}


def _resolve(name):
    """Return what a name stands for; of a module and a function of one name, the function."""
    owner, _, attribute = name.rpartition(".")
    return getattr(pkgutil.resolve_name(owner), attribute)


@pytest.fixture(scope="module")
def reference(site):
    """Return {name of a page: HTML} of the API reference."""
    return {path.stem: text for path, text in site.items() if path.parent.name == "api"}


@pytest.mark.parametrize("package", _PACKAGES)
def test_the_reference_has_every_public_name(package, reference):
    described = {
        name
        for text in reference.values()
        for name in re.findall(r'<dt [^>]*?id="((?:sparsejax|pallas_kernels)\.[\w.]+)"', text)
    }
    # A name that two packages offer is described once.
    elsewhere = {id(_resolve(name)) for name in described}
    public = _list_public(package)
    assert public
    assert [
        name
        for name, it in public.items()
        if f"{package}.{name}" not in described and id(it) not in elsewhere
    ] == []


def test_formulas_signatures_and_code_stand_as_they_are_written(reference):
    texts = {name: re.sub(r"<[^>]+>", "", text) for name, text in reference.items()}
    assert re.search(r"^kept\[i, j\] = \|i - j\| &lt; width$", texts["masks"], re.M)
    assert re.search(r"SparseLinear\(\s*in_features: int,\s*out_features", texts["models"])
    assert re.search(r"Returns:\s+Mesh whose axes are Auto: XLA", texts["devices"])
    paragraphs = re.findall(r"<p>.*?</p>", "".join(reference.values()), re.S)
    assert [text for text in paragraphs if "`" in text] == []
