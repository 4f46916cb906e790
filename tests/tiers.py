"""Which cases `make test` runs, and which wait for `make test-ci` or for `make test-all`."""

import pytest


def tier(cases, *, fast, slow=()):
    """Return a parameter for each case, those that are not named marked `ci`.

    Args:
      cases: dict of name -> case.
      fast: names of those that `make test` runs.
      slow: names of those that `make test-all` alone runs.

    Returns:
      list of `pytest.param`.
    """
    named = {*fast, *slow}
    assert named <= set(cases), f"{named - set(cases)} are no cases"
    marks = dict.fromkeys(cases, pytest.mark.ci) | dict.fromkeys(fast, ())
    marks |= dict.fromkeys(slow, pytest.mark.slow)
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in cases.items()]
