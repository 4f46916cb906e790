"""The forms of the portable backends, run where the tests run."""

import functools
from unittest import mock

from pallas_kernels import dispatch


def in_form(platform, function):
    """Return a function whose calls take the form for a platform, whatever they run on.

    The platform is in force during the call and no longer: a gradient, which JAX traces after it,
    has to be of the form that the call chose.
    """

    def call(*args, **options):
        with mock.patch.object(dispatch, "target_platform", lambda: platform):
            return function(*args, **options)

    return call


in_cpu_form = functools.partial(in_form, "cpu")
in_gpu_form = functools.partial(in_form, "gpu")


def find_loops(hlo):
    """Return the name of the computation that holds each loop of an optimized program.

    Args:
      hlo: str, the program.

    Returns:
      list of str, one for each `while`; "ENTRY" for those of the program itself.
    """
    holder, loops = "", []
    for line in hlo.splitlines():
        if line and not line[0].isspace():
            holder = line.split()[0]
        elif " while(" in line:
            loops.append(holder)
    return loops
