"""What a program's text says of its collectives: loops, groups in every notation, bytes."""

import pytest

from sparsejax.accounting.collectives import find_collectives, group_collectives, sum_traffic

_SIZES = {"data": 2, "fsdp": 4, "context": 1, "tensor": 1}

_PROGRAM = """HloModule jit_step, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %add = f32[] add(%a, %b)
}

%layer (p.1: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %p.1 = (s32[], bf16[2,16]{1,0}) parameter(0)
  %w = bf16[2,16]{1,0} get-tuple-element(%p.1), index=1
  %m = pred[2,16]{1,0} constant({...})
  %all-gather-start = ((bf16[2,16]{1,0}, pred[2,16]{1,0}), (bf16[8,16]{1,0}, pred[8,16]{1,0})) \
all-gather-start(%w, /*index=1*/%m), channel_id=1, replica_groups=mesh['data'=2,'fsdp'=4,\
'context'=1,'tensor'=1] {'fsdp'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %all-gather-done = (bf16[8,16]{1,0}, pred[8,16]{1,0}) all-gather-done(%all-gather-start)
  ROOT %tuple = (s32[], bf16[2,16]{1,0}) tuple(%i, %w)
}

%part (p.2: (s32[], bf16[2,16])) -> (s32[], bf16[2,16]) {
  %p.2 = (s32[], bf16[2,16]{1,0}) parameter(0)
  %layers = (s32[], bf16[2,16]{1,0}) while(%p.2), condition=%less, body=%layer, \
backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
  %g = bf16[8,16]{1,0} constant({...})
  %reduce-scatter = bf16[2,16]{1,0} reduce-scatter(%g), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %tuple.1 = (s32[], bf16[2,16]{1,0}) tuple(%i, %reduce-scatter)
}

%wrapped (p.3: f32[8,16]) -> f32[8,16] {
  %p.3 = f32[8,16]{1,0} parameter(0)
  ROOT %all-to-all = f32[8,16]{1,0} all-to-all(%p.3), replica_groups={{0,4},{1,5},{2,6},{3,7}}
}

%yes (p.4: f32[8,16]) -> f32[8,16] {
  %p.4 = f32[8,16]{1,0} parameter(0)
  ROOT %all-reduce = f32[8,16]{1,0} all-reduce(%p.4), replica_groups=[4,2]<=[2,4]T(1,0), \
to_apply=%sum
}

%no (p.5: f32[8,16]) -> f32[8,16] {
  ROOT %p.5 = f32[8,16]{1,0} parameter(0)
}

ENTRY %main (x: f32[8,16], w: (s32[], bf16[2,16])) -> f32[8,16] {
  %x = f32[8,16]{1,0} parameter(0)
  %w = (s32[], bf16[2,16]{1,0}) parameter(1)
  %parts = (s32[], bf16[2,16]{1,0}) while(%w), condition=%less, body=%part, \
backend_config={"known_trip_count":{"n":"5"}}
  %start = ((f32[8,16]), f32[8,16]{1,0}) async-start(%x), calls=%wrapped
  %done = f32[8,16]{1,0} async-done(%start), calls=%wrapped
  %if = f32[8,16]{1,0} conditional(%c, %x, %x), true_computation=%yes, false_computation=%no
  ROOT %permute = f32[8,16]{1,0} collective-permute(%if), source_target_pairs={{0,1},{1,0}}
}
"""


def test_every_operation_is_found_with_its_loops_axes_and_bytes():
    found = find_collectives(_PROGRAM, _SIZES, hosts=2)
    assert [(x.kind, x.axes, x.trips, x.whole_bytes, x.group_size) for x in found] == [
        ("all-gather", ("fsdp",), (5, 3), 8 * 16 * 3, 4),
        ("reduce-scatter", ("fsdp",), (5,), 8 * 16 * 2, 4),
        ("all-to-all", ("data",), (), 8 * 16 * 4, 2),
        ("all-reduce", ("data",), (), 8 * 16 * 4, 2),
        ("collective-permute", ("fsdp",), (), 8 * 16 * 4, 2),
    ]
    gather, scatter, exchange, total, permute = found
    assert gather.source == "jit(step)/gather" and scatter.source == ""
    assert [x.group_hosts for x in found] == [1, 1, 2, 2, 1]
    assert gather.sent_bytes == 3 / 4 * 384 and scatter.sent_bytes == 3 / 4 * 256
    assert exchange.sent_bytes == exchange.crossing_bytes == 256
    assert total.sent_bytes == total.crossing_bytes == 512
    assert permute.sent_bytes == 512 and permute.crossing_bytes == 0
    assert sum_traffic([gather, scatter]) == (15 + 5, 15 * 288 + 5 * 192, 0)
    assert sum_traffic([gather, scatter], loops=1) == (3 + 1, 3 * 288 + 192, 0)


def test_a_ring_leaves_a_host_once():
    text = _PROGRAM.replace("{'fsdp'}", "{'data','fsdp'}")
    gather = find_collectives(text, _SIZES, hosts=2)[0]
    assert gather.axes == ("data", "fsdp") and gather.group_size == 8 and gather.group_hosts == 2
    assert gather.crossing_bytes == gather.sent_bytes / 4


def test_operations_alike_are_grouped_the_most_bytes_first():
    groups = group_collectives(find_collectives(_PROGRAM, _SIZES))
    assert [*groups][:2] == [("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",))]
    assert sum(map(len, groups.values())) == 5


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="has an entry"):
        find_collectives("", _SIZES)
