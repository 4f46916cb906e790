"""Figures of measurements in README and docs/ are those of the committed tables that pages link to.

A figure is a number of three digits or more with a decimal point or a unit. It must stand, rounded
as it is shown, in a table of `benchmarks/results` that its page links to, or be computed from such
numbers as `_DERIVED` says. `_GIVEN` are figures that no run of ours measured.
"""

import functools
import math
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_RESULTS = _ROOT / "benchmarks" / "results"
# Written from records, and compared with them by tests of their own.
_GENERATED = ("results.md", "scaling.md")
_PAGES = [
    _ROOT / "README.md",
    *sorted(p for p in (_ROOT / "docs").glob("*.md") if p.name not in _GENERATED),
]

_FIGURE = re.compile(
    r"(?<![\w.,/^=-])(\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?![\w]*[.]\d)"
    r"(?:\s?(ms|us|MB|GB|TFLOP/s|GFLOP/s|x))?(?![\w/])"
)
# Seconds are shown as milliseconds, shares as percents, and the other way round.
_SCALES = (1, 1e3, 1e-3, 1e2, 1e-2)

# Page -> figure -> why it is right.
_GIVEN: dict[str, dict[str, str]] = {
    "mst.md": {"22.5": "counted from the schedule of configs/mst_gpt2.py"},
    "nm_matmul.md": dict.fromkeys(("1.895", "2.011"), "variances, see tests/kernels/test_mvue.py"),
    "pretrained.md": {"5.24": "a version"},
    "proofs.md": {"13.5": "a version"},
    "s_ste.md": {"1.4837": "of a normal distribution, see tests/masks/test_soft_threshold.py"},
    "sat.md": {"2.84x": "what the authors report"},
    "triton.md": {
        "11.8": "predicted by counting the instructions of the compiled program",
        "10.5": "predicted: 3 bytes of each of 4096 x 4096 weights, at 4.8 TB/s",
    },
}
# Page -> figure -> how it follows from numbers of the tables.
_DERIVED: dict[str, dict[str, str]] = {
    "fixed_patterns.md": {"119 MB": "119040648 / 10**6"},
    "mst.md": {
        "23.4": "100 * 1366622208000 / 5841616896000",
        "24.5": "100 * 1431196139520 / 5841616896000",
        "24.0": "100 * 1404267381652 / 5841616896000",
        "24.8": "100 * 1448969781940 / 5841616896000",
        "24.9": "100 * 1456673528280 / 5841616896000",
        "25.1": "100 * 1467119172499 / 5841616896000",
        "24.2": "100 * 1412493315000 / 5841616896000",
    },
    "pruning.md": {"1.37": "log(76.61 / 19.43)", "1.17": "log(55.32 / 17.19)"},
    "sat.md": {"29.3x": "10.7020 / 0.3656"},
}


def _read_text(page):
    """The text of a page without code and without where its links lead."""
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\]\([^)]*\)|arXiv:\S+|doi:\S+", "]", text)


def _list_figures(page):
    """Return (figure as shown, number, half a unit of its last digit) of a page."""
    for match in _FIGURE.finditer(_read_text(page)):
        digits = match[1].replace(",", "")
        if (match[2] or "." in digits) and len(digits.replace(".", "").lstrip("0")) >= 3:
            yield match[0], *_read_figure(digits)


def _read_figure(digits):
    """Return a number, and half a unit of its last digit."""
    return float(digits), 0.5 * 10.0 ** -len(digits.partition(".")[2])


@functools.cache
def _read_numbers(path):
    """Every number of a table or of records."""
    numbers = re.findall(r"\d[\d,]*\.?\d*|\.\d+", path.read_text())
    return frozenset(float(number.replace(",", "")) for number in numbers)


def _find_numbers(page, *, with_records=False):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    files = {(page.parent / link).resolve() for link in links if "://" not in link}
    tables = {f for f in files if f.parent == _RESULTS and f.suffix in (".md", ".json")}
    tables |= {f for f in (f.with_suffix(".md") for f in tables) if f.exists()}
    tables = {f for f in tables if f.suffix == ".md" or not f.with_suffix(".md").exists()}
    tables |= {f for f in files if f.name in _GENERATED}
    if with_records:
        tables |= {f.with_suffix(".json") for f in tables if f.parent == _RESULTS}
    return frozenset().union(*(_read_numbers(table) for table in tables))


def _is_among(number, half_unit, numbers):
    return any(
        abs(scale * n - number) <= half_unit * (1 + 1e-6) for scale in _SCALES for n in numbers
    )


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_figures_are_those_of_linked_tables(page):
    numbers = _find_numbers(page)
    explained = _GIVEN.get(page.name, {}).keys() | _DERIVED.get(page.name, {}).keys()
    unknown = [
        shown
        for shown, number, half_unit in _list_figures(page)
        if shown not in explained and not _is_among(number, half_unit, numbers)
    ]
    assert not unknown, "not in any table that the page links to"


@pytest.mark.parametrize("name", _DERIVED)
def test_derived_figures_follow_from_the_tables(name):
    page = next(page for page in _PAGES if page.name == name)
    shown = {figure: (number, half) for figure, number, half in _list_figures(page)}
    records = _find_numbers(page, with_records=True)
    for figure, formula in _DERIVED[name].items():
        for operand in re.findall(r"[\d.]{3,}", formula):
            assert _is_among(*_read_figure(operand), records), f"{operand} of {figure}"
        number, half_unit = shown[figure]
        value = eval(formula, {"log": math.log})
        assert abs(value - number) <= half_unit, f"{figure} is {value}"


def test_explained_figures_are_on_their_pages():
    pages = {page.name: page for page in _PAGES}
    for name, figures in [*_GIVEN.items(), *_DERIVED.items()]:
        shown = {figure for figure, *_ in _list_figures(pages[name])}
        assert not figures.keys() - shown, name
