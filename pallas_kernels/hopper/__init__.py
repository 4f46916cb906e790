"""What the kernels for Hopper have in common: a program of three warpgroups and a ring.

*Who does what.* A program has three warpgroups, each of 128 threads. Two compute: they wait for
tiles in shared memory and multiply them on the tensor cores, 64 rows to an instruction. The third
copies tiles from global to shared memory, ahead of them. Copying needs few registers, so that it
gives most of its own to the two that compute (`budget`, `launch`).

*Ring.* Tiles go through a ring of slots in shared memory (`ring`). Each slot has two barriers. A
copy arrives at `full` when it has landed, and whoever computes waits there before it reads. Each
reader arrives at `free` when nothing reads the slot any more, and the copying warpgroup waits there
before it fills the slot again; the first time around there is nothing to wait for. A product is
asynchronous and reads its slot until it has been waited for: only then may the slot be given back.

*Turns.* Tensor cores are one and the two computing warpgroups share them. In turns, one starts its
products while the other computes on registers (`turns`).

*Drain.* A barrier must not be left with an arrival that nobody has waited for. After its last copy,
the copying warpgroup waits until every slot that it filled is free.

*Clusters.* Programs of a cluster run side by side. What all of them read is copied once: each
copies a part of it to all (multicast), so that the second-level cache is read once for all of them.
A slot is free when nothing reads it in any of the programs, for each fills the slots of all.

*Staying programs.* Most kernels start as many programs as the GPU has processors. Each takes tile
after tile of the result, and the ring runs on while a tile is written (`launch.for_each_tile`).

What a step reads and computes is the op's own: this package knows none of them.
"""
