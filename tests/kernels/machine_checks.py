"""What every compiled kernel must show: nothing spilled, and asynchronous products left alone."""

from pallas_kernels import aot, machine_code, products_in_flight


def find_faults(kernel, *, in_flight_at_release=0):
    """Return what is wrong with a kernel, as far as its programs show.

    Args:
      kernel: KernelReport.
      in_flight_at_release: see `products_in_flight.find_hazards`.

    Returns:
      list of str.
    """
    program = machine_code.parse(kernel.sass)
    faults = list(kernel.remarks)
    for name in ("spill_bytes", "stack_bytes"):
        if getattr(kernel, name):
            faults.append(f"{name} is {getattr(kernel, name)}")
    if kernel.shared_memory_bytes > aot.H200.shared_memory_per_block_bytes:
        faults.append(f"shared_memory_bytes is {kernel.shared_memory_bytes}")
    asked, got = (
        products_in_flight.count_groups_asked_for(kernel.ptx),
        products_in_flight.count_groups(program),
    )
    if asked != got:
        faults.append(f"groups of products have {sorted(got)} instructions, not {sorted(asked)}")
    faults += products_in_flight.find_hazards(program, in_flight_at_release=in_flight_at_release)
    return faults


def check_attention(kernel, **options):
    """Assert that a kernel of attention has no faults; other kernels may be among them.

    The forward kernel hands over its turn while both products of a step run, and the tests of its
    loops say which arrivals may do so.
    """
    if is_attention_forward(kernel):
        options["in_flight_at_release"] = 2
    check_kernel(kernel, **options)


def is_attention_forward(kernel):
    """Whether a kernel is the forward one of attention; under `jax.vmap` JAX names it."""
    return "attention_forward" in kernel.name or kernel.name.startswith("batched_body")


def check_kernel(kernel, **options):
    """Assert that a kernel has no faults."""
    faults = find_faults(kernel, **options)
    assert not faults, f"{kernel.name}:\n" + "\n".join(faults)
