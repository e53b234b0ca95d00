"""The cost reader against programs small enough to count by hand."""

import pytest

from sharding.compiled import Kernel, array_bytes, read_costs

# Two loops inside each other (5 x 3 turns), an in-place update, exchanges in each way the compiler writes them.
PROGRAM = """HloModule small, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (input.1: f32[8,4]) -> f32[2,4] {
  %input.1 = f32[8,4]{1,0} parameter(0)
  %all-reduce.9 = f32[8,4]{1,0} all-reduce(%input.1), replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %dynamic-slice.9 = f32[2,4]{1,0} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={2,4}
}

%keep (stack.1: bf16[5,8], row.1: bf16[1,8], at.1: s32[]) -> bf16[5,8] {
  %stack.1 = bf16[5,8]{1,0} parameter(0)
  %row.1 = bf16[1,8]{1,0} parameter(1)
  %at.1 = s32[] parameter(2)
  ROOT %dynamic-update-slice.1 = bf16[5,8]{1,0} dynamic-update-slice(%stack.1, %row.1, %at.1, %at.1)
}

%inner_condition (state.1: (s32[], f32[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(3)
  %state.1 = (s32[], f32[8,4]) parameter(0)
  %count.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less.1 = pred[] compare(%count.1, %constant.1), direction=LT
}

%inner_body (state.2: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state.2 = (s32[], f32[8,4]) parameter(0)
  %x.2 = f32[8,4]{1,0} get-tuple-element(%state.2), index=1
  %fusion.2 = f32[8,4]{1,0} fusion(%x.2), kind=kOutput, calls=%add, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-gather.2 = bf16[16,4]{1,0} all-gather(%x.2), replica_groups=mesh['x'=2,'y'=4] {'x','y'}, dimensions={0}
  ROOT %tuple.2 = (s32[], f32[8,4]) tuple(%count.9, %fusion.2)
}

%outer_condition (state.3: (s32[], f32[8,4])) -> pred[] {
  %constant.3 = s32[] constant(5)
  %state.3 = (s32[], f32[8,4]) parameter(0)
  %count.3 = s32[] get-tuple-element(%state.3), index=0
  ROOT %less.3 = pred[] compare(%count.3, %constant.3), direction=LT
}

%outer_body (state.4: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state.4 = (s32[], f32[8,4]) parameter(0)
  %stack.4 = bf16[5,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %row.4 = bf16[1,8]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %at.4 = s32[] get-tuple-element(%state.4), index=0
  %kept.4 = bf16[5,8]{1,0} fusion(%stack.4, %row.4, %at.4), kind=kLoop, calls=%keep, backend_config={"window_config":{"estimated_cycles":"9223372036854775807"}}
  ROOT %while.4 = (s32[], f32[8,4]) while(%state.4), condition=%inner_condition, body=%inner_body
}

ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  %scattered = f32[2,4]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %sent = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}
  %came = f32[8,4]{1,0} collective-permute-done(%sent)
  %while.5 = (s32[], f32[8,4]) while(%tuple.5), condition=%outer_condition, body=%outer_body
  ROOT %result = f32[8,4]{1,0} get-tuple-element(%while.5), index=1
}
"""  # noqa: E501


def test_what_is_in_a_loop_counts_as_often_as_the_loop_turns():
    costs = read_costs(PROGRAM)
    assert costs.cycles == 5 * 3 * 100  # the fusion without an estimate adds nothing
    found = {exchange.kind: exchange for exchange in costs.collectives}
    assert len(found) == len(costs.collectives) == 3
    gathered = found["all-gather"]
    assert (gathered.times, gathered.group, gathered.bytes, gathered.shapes) == (15, 8, 128, ("bf16[16,4]",))
    assert not gathered.overlapped


def test_an_exchange_is_told_by_what_it_does():
    found = {exchange.kind: exchange for exchange in read_costs(PROGRAM).collectives}
    scattered, sent = found["reduce-scatter"], found["collective-permute"]
    assert (scattered.bytes, scattered.group, scattered.times) == (128, 4, 1)
    assert (sent.bytes, sent.overlapped, sent.times) == (128, True, 1)


def test_an_array_updated_in_place_moves_what_is_new():
    moved = read_costs(PROGRAM).bytes
    update = 5 * (16 + 4 + 16)  # the row and its index are read, the row is written: never the whole stack
    inside = 15 * ((128 + 128) + (128 + 128))  # the fusion and the all-gather, read and written
    once = 128 + 32
    assert moved == update + inside + once


def test_of_an_array_that_is_only_sliced_the_slice_is_read():
    slicing = """%part (whole.1: f32[8,4]) -> f32[1,4] {
  %whole.1 = f32[8,4]{1,0} parameter(0)
  ROOT %slice.1 = f32[1,4]{1,0} slice(%whole.1), slice={[3:4], [0:4]}
}

ENTRY"""
    program = PROGRAM.replace("ENTRY", slicing).replace(
        "  %came =", "  %row = f32[1,4]{1,0} fusion(%x), kind=kLoop, calls=%part\n  %came ="
    )
    assert read_costs(program).bytes - read_costs(PROGRAM).bytes == 16 + 16


@pytest.mark.parametrize(
    ("shape", "size"),
    [("f32[8,4]{1,0:T(8,128)}", 128), ("(bf16[3], s32[])", 10), ("pred[7]", 7), ("s4[8]", 4), ("token[]", 0)],
)
def test_sizes_of_arrays(shape, size):
    assert array_bytes(shape) == size


def test_what_cannot_be_read_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        read_costs("nothing of the kind")
    with pytest.raises(ValueError, match=r"while\.4 ends by no constant in its condition inner_condition"):
        read_costs(PROGRAM.replace("%constant.1 = s32[]{:T(128)} constant(3)", ""))


def test_a_kernel_costs_what_it_says_of_itself():
    said = '"cost_estimate":{"flops":"7000","transcendentals":"1","bytes_accessed":"90"}'
    used = '"used_scoped_memory_configs":[{"memory_space":"1","offset":"0","size":"4096"}]'
    call = (
        '%it.1 = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call", '
        f'metadata={{op_name="jit(f)/kind/pallas_call"}}, backend_config={{{said},{used}}}'
    )
    costs = read_costs(PROGRAM.replace("  %came =", f"  {call}\n  %came ="))
    assert costs.kernels == (Kernel("kind", 7000, 90, 4096, 1),)
    differentiated = call.replace("/kind/", "/transpose(jvp(kind))/")
    assert read_costs(PROGRAM.replace("  %came =", f"  {differentiated}\n  %came =")).kernels == costs.kernels
    silent = call.replace('"cost_estimate"', '"nothing"').replace("used_", "").replace("metadata", "nothing")
    silent = silent.replace("pallas_call", "call")
    costs = read_costs(PROGRAM.replace("  %came =", f"  {silent}\n  %came ="))
    assert costs.kernels == (Kernel("it.1", 0, 256, 0, 1),)
