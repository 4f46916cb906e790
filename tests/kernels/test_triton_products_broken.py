"""Broken programs of the sparse products: each is rejected, by its values or by the machine."""

import re

import jax
import pytest

from pallas_kernels.nm_matmul.triton import tiles
from tests.kernels.test_triton_products import CONDITIONS, check_product
from tests.kernels.triton_interpreter import ptx_triton, triton_kernels
from tests.tiers import tier

pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="a GPU runs what is compiled, and checks no memory"
)
_PRODUCT = re.compile(r"(mma\.sp\S+ )\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, (\S+), 0x(\d);")


def change_products(change):
    """Return a function that changes the operands of every product.

    Args:
      change: (sums, A, B, sums before, metadata, selector) -> the same; lists of registers, but
        for the last two, which are str.
    """

    def write(match):
        name, *lists, word, selector = match.groups()
        operands = [[x.strip() for x in text.split(",")] for text in lists]
        *operands, word, selector = change(*operands, word, selector)
        braces = ", ".join(f"{{{', '.join(names)}}}" for names in operands)
        return f"{name}{braces}, {word}, 0x{selector};"

    return lambda ptx: _PRODUCT.sub(write, ptx)


def exchange_words(ptx):
    """Exchange the metadata of the first two blocks of rows."""
    names = list(dict.fromkeys(match[6] for match in _PRODUCT.finditer(ptx)))
    names = dict(zip(names, [names[1], names[0], *names[2:]], strict=True))
    return change_products(lambda d, a, b, c, word, s: (d, a, b, c, names[word], s))(ptx)


def exchange_sums(ptx):
    """Exchange the sums of the first two blocks of columns."""
    first, second = [match[2] for match in _PRODUCT.finditer(ptx)][:2]
    return ptx.replace(first, "FIRST").replace(second, first).replace("FIRST", second)


def wait_for_less(ptx):
    """Let one more group of copies be outstanding."""
    return re.sub(r"(cp\.async\.wait_group\s+)(\w+)", lambda m: f"{m[1]}{int(m[2], 0) + 1}", ptx)


def read_other_slot(ptx):
    """Read the ring one piece of 16 bytes further on, where that stays inside."""
    return re.sub(
        r"(ldmatrix\S+ \t?\{[^}]*\}, \[%r\d+)\];", lambda m: f"{m[1]} + 16];", ptx, count=1
    )


BROKEN = {
    "selector": change_products(lambda *x: (*x[:-1], 1 - int(x[-1]))),
    "halves of B": change_products(lambda d, a, b, *x: (d, a, b[2:] + b[:2], *x)),
    "rows of A": change_products(lambda d, a, *x: (d, [a[1], a[0], a[3], a[2]], *x)),
    "halves of A": change_products(lambda d, a, *x: (d, a[2:] + a[:2], *x)),
    "order of sums": exchange_sums,
    "metadata of other rows": exchange_words,
    "wait": wait_for_less,
    "barrier": lambda ptx: ptx.replace("bar.sync \t0;", "", 1),
    "address": read_other_slot,
}


WHOLE = {"narrow": tiles._NARROW, "wide": tiles._WIDE}


def is_right(cut, change, conditions):
    with triton_kernels(), ptx_triton.conditions(change=change, **CONDITIONS[conditions]):
        try:
            check_product(cut, (cut.rows, 64 * (cut.stages + 1), cut.columns))
        except AssertionError:
            return False
        except jax.errors.JaxRuntimeError as error:
            assert "PtxError" in str(error)
            return False
        return True


@pytest.mark.parametrize("change", tier(BROKEN, fast=["selector", "barrier"]))
@pytest.mark.parametrize("cut", tier(WHOLE, fast=["narrow"]))
def test_a_broken_program_is_rejected(cut, change):
    def changed(ptx):
        broken = change(ptx)
        assert broken != ptx, "nothing was changed"
        return broken

    assert not all(is_right(cut, changed, conditions) for conditions in ("late", "mixed"))


@pytest.mark.ci
@pytest.mark.parametrize("cut", WHOLE.values(), ids=WHOLE)
def test_the_program_as_it_is_is_right(cut):
    assert all(is_right(cut, lambda ptx: ptx, conditions) for conditions in ("late", "mixed"))
