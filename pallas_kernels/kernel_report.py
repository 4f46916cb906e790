"""What ptxas and the disassembler say of one kernel."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelReport:
    """One kernel as ptxas left it.

    Attributes:
      name: str, the name of the kernel function; of a Mosaic kernel with a number that makes it
        unique.
      registers: int, per thread.
      stack_bytes: int, per thread.
      spill_bytes: int, stored to and loaded from local memory per thread, together.
      shared_memory_bytes: int, per block: scratch buffers and barriers.
      remarks: tuple of str, what ptxas had to change so that tensor-core instructions are right:
        it made them wait for one another, or split a group of them.
      ptx: str, the program given to ptxas.
      sass: str, the machine program; of a Mosaic kernel with its scheduling control codes.
    """

    name: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_memory_bytes: int
    remarks: tuple[str, ...]
    ptx: str = dataclasses.field(repr=False)
    sass: str = dataclasses.field(repr=False)

    @property
    def is_serialized(self) -> bool:
        """Whether tensor-core instructions wait for one another."""
        return any("serialized" in remark for remark in self.remarks)


def make_kernel_report(name: str, ptxas: str, **programs: Any) -> KernelReport:
    """Read what ptxas wrote about a kernel.

    Args:
      name: of the kernel.
      ptxas: what it wrote with `-v`.
      **programs: shared_memory_bytes, ptx and sass of KernelReport.
    """
    stack, stores, loads = find_numbers(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", ptxas
    )
    return KernelReport(
        name=name,
        registers=find_numbers(r"Used (\d+) registers", ptxas)[0],
        stack_bytes=stack,
        spill_bytes=stores + loads,
        remarks=tuple(re.findall(r"\(C75\d\d\) .+", ptxas)),
        **programs,
    )


def find_numbers(pattern: str, text: str) -> tuple[int, ...]:
    """Return the numbers at the first place where a text matches a pattern.

    Args:
      pattern: regular expression; its groups are digits.
      text: of ptxas or Mosaic, which is taken to have such a place.
    """
    match = re.search(pattern, text)
    assert match, f"there is no line like {pattern!r} in:\n{text}"
    return tuple(int(group) for group in match.groups())
