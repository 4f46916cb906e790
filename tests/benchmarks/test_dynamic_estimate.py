"""Kernels and bytes of a compiled program, which predictions of its time are made of."""

from benchmarks.dynamic_estimate import count_kernels

PROGRAM = """
%fused (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[8]{0} add(%p, %p)
}

ENTRY %main (x: bf16[4,8], y: f32[8]) -> pred[4] {
  %x = bf16[4,8]{1,0} parameter(0)
  %y = f32[8]{0} parameter(1)
  %product = (f32[4,8]{1,0}, s8[1000]{0}) custom-call(%x, %x), custom_call_target="gemm"
  %out = f32[4,8]{1,0} get-tuple-element(%product), index=0
  ROOT %kept = pred[4]{0} fusion(%out, %y), kind=kLoop, calls=%fused
}
"""


def test_kernels_read_operands_and_write_results():
    # The product: 2 * 64 bytes read, 128 written, its scratch nothing; the fusion: 128 + 32 and 4.
    assert count_kernels(PROGRAM) == (2, 256 + 164)
