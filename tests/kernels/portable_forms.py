"""The forms of the portable backends: for a GPU, run on the CPU of the tests."""

from unittest import mock

from pallas_kernels import dispatch


def in_gpu_form(function):
    """Return a function whose calls take the form for a GPU, whatever is computed later.

    The platform is that of a GPU during the call and no longer: a gradient, which JAX traces
    after it, has to be of the form that the call chose.
    """

    def call(*args, **options):
        with mock.patch.object(dispatch, "target_platform", lambda: "gpu"):
            return function(*args, **options)

    return call


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
