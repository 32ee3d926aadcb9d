"""Work counted in the HLO text of programs whose work is known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from dualsm.aot.hlo import Work, analyze


def work_of(function, *arguments, devices: int = 1) -> Work:
    return analyze(jax.jit(function).lower(*arguments).compile().as_text(), devices)


def test_products_in_nested_loops_are_multiplied_by_the_trip_counts():
    def nested(x, w):
        def outer(x, _):
            return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=3)[0], None

        return jax.lax.scan(outer, x, None, length=5)[0] @ w

    work = work_of(nested, jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert work.flops == 2 * 4 * 8 * 8 * (3 * 5 + 1)


def test_products_in_branches_count():
    x, w = jnp.ones((4, 8)), jnp.ones((8, 8))
    of_two = work_of(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w, lambda x: x, x), x, w)
    of_more = work_of(lambda i, x, w: jax.lax.switch(i, [lambda x: x @ w, jnp.sin, jnp.cos], x), 1, x, w)
    assert of_two.flops == of_more.flops == 2 * 4 * 8 * 8
    # The GPU compiler uses other attributes for a conditional with two branches.
    text = BRANCH.replace("BRANCHES", "true_computation=%yes, false_computation=%no")
    assert analyze(text, 1).flops == 2 * 4 * 8 * 8
    text = BRANCH.replace("BRANCHES", "branch_computations={%no, %yes}")
    assert analyze(text, 1).flops == 2 * 4 * 8 * 8


BRANCH = """
%yes (p: f32[4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %w = f32[8,8]{1,0} constant({...})
  ROOT %y = f32[4,8]{1,0} dot(%p, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%no (q: f32[4,8]) -> f32[4,8] {
  ROOT %q = f32[4,8]{1,0} parameter(0)
}

ENTRY %main (is: pred[], x: f32[4,8]) -> f32[4,8] {
  %is = pred[] parameter(0)
  %x = f32[4,8]{1,0} parameter(1)
  ROOT %c = f32[4,8]{1,0} conditional(%is, %x, %x), BRANCHES
}
"""


def test_only_the_used_slice_of_a_stack_counts_as_traffic():
    stack = jnp.ones((64, 128, 128))
    work = work_of(
        lambda x, ws: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0], jnp.ones((8, 128)), stack
    )
    assert stack.nbytes < work.hbm_bytes < 4 * stack.nbytes  # not 64 times the stack


# A matrix product with a windowed einsum, as compiled for TPUs: a loop whose counter increases by two, with a
# convolution in which one of the 3 x 3 index pairs along the first dimension reads an input element. Then an
# overlapped collective, which appears in several fusions, and two all-reduces of shard_map with the same
# channel.
RING = """
%body (p: (f32[1,8,4], f32[3,4,2], u32[])) -> (f32[1,8,4], f32[3,4,2], u32[]) {
  %two = u32[] constant(2)
  %p = (f32[1,8,4]{2,1,0}, f32[3,4,2]{2,1,0:S(1)}, u32[]) parameter(0)
  %x = f32[1,8,4]{2,1,0} get-tuple-element(%p), index=0
  %w = f32[3,4,2]{2,1,0:S(1)} get-tuple-element(%p), index=1
  %i = u32[] get-tuple-element(%p), index=2
  %sent = (f32[3,4,2]{2,1,0}, f32[3,4,2]{2,1,0}, u32[], u32[]) collective-permute-start(%w), channel_id=1
  %y = f32[3,8,2]{2,1,0} convolution(%x, %w), window={size=3 pad=2_2 rhs_reversal=1}, dim_labels=0bf_0io->0bf
  %next = u32[] add(%i, %two)
  ROOT %r = (f32[1,8,4]{2,1,0}, f32[3,4,2]{2,1,0}, u32[]) tuple(%x, %w, %next)
}

%condition (q: (f32[1,8,4], f32[3,4,2], u32[])) -> pred[] {
  %limit = u32[] constant(8)
  %q = (f32[1,8,4]{2,1,0}, f32[3,4,2]{2,1,0}, u32[]) parameter(0)
  %j = u32[] get-tuple-element(%q), index=2
  ROOT %less = pred[] compare(%j, %limit), direction=LT
}

%starts (v.1: f32[16]) -> f32[64] {
  %v.1 = f32[16] parameter(0)
  ROOT %g.1 = f32[64]{0} all-gather(%v.1), channel_id=2, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(1,0)) {'a'}, dimensions={0}, frontend_attributes={chain_id="7"}
}

%ends (v.2: f32[16]) -> f32[64] {
  %v.2 = f32[16] parameter(0)
  ROOT %g.2 = f32[64]{0} all-gather(%v.2), channel_id=2, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="7"}
}

ENTRY %main (a: (f32[1,8,4], f32[3,4,2], u32[])) -> f32[64] {
  %a = (f32[1,8,4]{2,1,0}, f32[3,4,2]{2,1,0}, u32[]) parameter(0)
  %loop = (f32[1,8,4]{2,1,0}, f32[3,4,2]{2,1,0}, u32[]) while(%a), condition=%condition, body=%body
  %v = f32[16] constant({...})
  %g = f32[64]{0} fusion(%v), kind=kCustom, calls=%starts
  %again = f32[64]{0} fusion(%v), kind=kCustom, calls=%ends
  %s = f32[64]{0} all-reduce(%g), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = f32[64]{0} all-reduce(%s), channel_id=3, replica_groups=[2,4]<=[8], to_apply=%add
}
"""  # noqa: E501


def test_work_of_a_tpu_program():
    work = analyze(RING, devices=8)
    assert work.flops == 4 * (2 * 8 * 4 * 2 * 3)
    assert work.collective_count == {"collective-permute": 4, "all-gather": 1, "all-reduce": 2}
    assert work.collective_bytes == {
        "collective-permute": 4 * 3 * 4 * 2 * 4,
        "all-gather": 64 * 4 * 3 / 4,
        "all-reduce": 2 * (2 * 64 * 4 * 3 / 4),
    }


# Collectives of a GPU program: the type of a "-start" instruction lists the operands before the results.
GPU_COLLECTIVES = """
ENTRY %main (x: f32[128,2048]) -> f32[32,2048] {
  %x = f32[128,2048]{1,0} parameter(0)
  %i = s32[1024]{0} constant({...})
  %w = f32[32,128]{1,0} constant({...})
  %f = f32[4096]{0} constant({...})
  %g = ((s32[1024]{0}, f32[32,128]{1,0}, f32[32,128]{1,0}), (s32[4096]{0}, f32[128,128]{1,0}, f32[128,128]{1,0})) all-gather-start(%i, %w, %w), channel_id=30, replica_groups=mesh['axis_0'=4,'axis_1'=1] {'axis_0'}, dimensions={0}
  %g.1 = (f32[32,128]{1,0}, f32[128,128]{1,0}) all-gather-start(%w), channel_id=8, replica_groups=[1,4]<=[4], dimensions={0}
  %t = ((f32[128,2048]{1,0}), f32[128,2048]{1,0}) all-to-all-start(%x), channel_id=50, replica_groups={{0,1,2,3}}
  %a = (f32[32,128]{1,0}, f32[4096]{0}) all-reduce-start(%w, %f), channel_id=42, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = ((f32[128,2048]{1,0}), f32[32,2048]{1,0}) reduce-scatter-start(%x), channel_id=85, replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_of_a_gpu_program():
    """Counts all results of combined collectives, but not their operands."""
    work = analyze(GPU_COLLECTIVES, devices=4)
    assert work.collective_count == {"all-gather": 2, "all-to-all": 1, "all-reduce": 1, "reduce-scatter": 1}
    assert work.collective_bytes == {
        "all-gather": 110_592 + 128 * 128 * 4 * 3 / 4,
        "all-to-all": 128 * 2048 * 4 * 3 / 4,
        "all-reduce": 2 * (32 * 128 + 4096) * 4 * 3 / 4,
        "reduce-scatter": 128 * 2048 * 4 * 3 / 4,
    }


# 2 heads of size 64; 8 blocks of 512 queries, each with 4 blocks of keys.
KERNEL = """
ENTRY %main (p: s32[1,8,4]) -> bf16[2,4096,64] {
  %next = s32[1,8,4]{2,1,0} parameter(0)
  %seen = s32[1,8,4]{2,1,0} parameter(1)
  %q = bf16[2,4096,64]{2,1,0} parameter(2)
  %k = bf16[2,4096,64]{2,1,0} parameter(3)
  %buffer = bf16[2,4096,64]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %splash_mha_dq_segmented.1 = bf16[2,4096,64]{2,1,0} custom-call(%next, %seen, %q, %k), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501


def test_work_of_a_splash_kernel():
    """The dq kernel has three products: scores, their gradient, dq. Heads are padded to 128."""
    whole = 3 * 2 * 2 * 128 * (8 * 4) * 512**2
    assert analyze(KERNEL, devices=1).flops == whole
    half = analyze(KERNEL, devices=1, block_fraction=0.5)
    assert half.flops == whole / 2
    assert half.hbm_bytes == 3 * 2 * 4096 * 64 * 2 + 2 * 8 * 4 * 4


GPU_KERNEL = """
ENTRY %main (q: bf16[2,256,4,64]) -> bf16[2,256,4,64] {
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(0)
  ROOT %pallas_call.1 = bf16[2,256,4,64]{3,2,1,0} custom-call(%q, %q, %q, %q), custom_call_target="__gpu$xla.gpu.triton", backend_config={grid_x = 2 : i32, name = "flash_backward_queries", num_stages = 3 : i32}
}
"""  # noqa: E501


def test_work_of_a_flash_kernel():
    work = analyze(GPU_KERNEL, devices=1, block_fraction=0.5)
    assert work.flops == 0.5 * 3 * 2 * (2 * 4) * 256**2 * 64
    assert work.hbm_bytes == 5 * 2 * 256 * 4 * 64 * 2


def test_collectives_of_a_sharded_product():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("a"))
    x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=split)
    total = jax.jit(lambda x: x.sum(0), out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile()
    work = analyze(total.as_text(), 8)
    assert work.collective_bytes == {"all-reduce": 2 * 32 * 4 * 7 / 8}


def gemm(target: str, x: str, dimensions: str) -> str:
    """Returns a program with one cuBLAS call that has a workspace of 1 MiB."""
    return f"""
ENTRY %main (x: {x}[32,64], w: {x}[16,64]) -> f32[32,16] {{
  %x = {x}[32,64]{{1,0}} parameter(0)
  %w = {x}[16,64]{{1,0}} parameter(1)
  %y = (f32[32,16]{{1,0}}, s8[1048576]{{0}}) custom-call(%x, %w), custom_call_target="{target}", \
backend_config={{"operation_queue_id":"0","gemm_backend_config":{{"alpha_real":1,"beta":0,\
"dot_dimension_numbers":{{{dimensions}}},"epilogue":"DEFAULT"}}}}
  ROOT %z = f32[32,16]{{1,0}} get-tuple-element(%y), index=0
}}
"""


@pytest.mark.parametrize(
    ("target", "x", "size"),
    [("gemm", "f32", 4), ("lt$matmul", "bf16", 2), ("lt$matmul$f8", "f8e4m3fn", 1)],
)
def test_cublas_calls_count_as_matrix_products(target, x, size):
    contracted = (
        '"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],'
        '"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]'
    )
    work = analyze(gemm(f"__cublas${target}", x, contracted), 1)
    assert work.flops == 2 * 32 * 16 * 64
    assert work.hbm_bytes == (32 + 16) * 64 * size + 32 * 16 * 4
