"""What all Triton kernels share: the device, tiles by compute capability, and the launch.

Kernels are written in Triton and called through jax-triton. Both are imported when a kernel is
launched and not before: they are the extra `triton`, and importing them takes seconds.
"""
