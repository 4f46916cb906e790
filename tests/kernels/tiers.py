"""Which cases `make test` runs, and which wait for `make test-ci`."""

import pytest


def tier(cases, *, fast):
    """Return a parameter for each case, those that are not named marked `ci`.

    Args:
      cases: dict of name -> case.
      fast: names of those that `make test` runs.

    Returns:
      list of `pytest.param`.
    """
    assert set(fast) <= set(cases), f"{set(fast) - set(cases)} are no cases"
    return [
        pytest.param(case, id=name, marks=() if name in fast else pytest.mark.ci)
        for name, case in cases.items()
    ]
