"""What a program may use of a processor: threads, registers and shared memory."""

NUM_COMPUTE = 2
"""Computing warpgroups of a program. One more copies."""

ROWS = 64
"""Rows of the result of one tensor-core instruction, which a warpgroup executes."""

# Registers per thread, of 65536 for 384 threads: a copying thread needs few.
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24

SHARED_MEMORY_BYTES = 232_448
"""The most that one program may have."""

SPARE_BYTES = 4096
"""Of these, what is left to barriers and to Mosaic itself."""
