"""Find out which kernels are right on the GPU of this machine, and how fast they are there.

  python -m pallas_kernels.doctor

Every backend is tried in a process of its own, so that one that hangs or dies harms no other. What
comes out are verdicts (`pallas_kernels.verdicts`), kept in the user's cache folder: calls that name
no backend go by them from the next process on. See docs/doctor.md.
"""
