"""Where the implementations of an op run: on the device that is there, or interpreted."""

import contextlib


def interpret(implementation):
    """Return the context in which an implementation runs here.

    The test is skipped where what it needs is not installed.

    Args:
      implementation: name of a backend.
    """
    if implementation == "mosaic_sm90":
        from tests.kernels.interpreter import hopper

        return hopper()
    if implementation == "triton":
        from tests.kernels.triton_interpreter import triton_kernels

        return triton_kernels()
    return contextlib.nullcontext()
