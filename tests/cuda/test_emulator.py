"""The emulator itself: it refuses what a GPU may do wrong, and says where."""

from __future__ import annotations

import numpy as np
import pytest

from .emulate import Array, EmulationError, Launch, launch, needs_gxx
from .ptx import UnknownInstruction

pytestmark = needs_gxx
BYTES = 1024


def run(body: str, threads: int = 64, arch: int = 800, blocks: int = 1) -> Array:
    """The result of one kernel: out[i] for every thread of every block, from x[i] = i."""
    source = f"""
extern "C" __global__ void test(int* out, const int* x) {{
  extern __shared__ __align__(64) int s[];
  const int t = threadIdx.x, i = blockIdx.x * {threads} + t;
  {body}
}}
"""
    out, x = np.zeros(threads * blocks, np.int32), np.arange(threads * blocks, dtype=np.int32)
    launch(
        source,
        Launch("test", ("out", "x"), (blocks, 1, 1), (threads, 1, 1), BYTES),
        {"out": out, "x": x},
        ["out"],
        arch,
    )
    return out


def asm(text: str, operands: str = "::", clobber: str = ': "memory"') -> str:
    return f'asm volatile("{text}" {operands} {clobber});'


COPY = asm(
    "cp.async.ca.shared.global [%0], [%1], 4;",
    ':: "r"((unsigned)__cvta_generic_to_shared(s + t)), "l"(__cvta_generic_to_global(x + i))',
)
COMMIT, WAIT, SYNC = asm("cp.async.commit_group;"), asm("cp.async.wait_group 0;"), "__syncthreads();"


def test_what_is_right_passes() -> None:
    np.testing.assert_array_equal(
        run(f"s[t] = x[i]; {SYNC} out[i] = s[63 - t] + 64 * blockIdx.x;", blocks=3)[64:128], np.arange(127, 63, -1) + 64
    )
    np.testing.assert_array_equal(run(f"{COPY} {COMMIT} {WAIT} {SYNC} out[i] = s[63 - t];"), np.arange(64)[::-1])
    np.testing.assert_array_equal(
        run("out[i] = __shfl_down_sync(__activemask(), x[i], 4, 8);", threads=48)[:8], [4, 5, 6, 7, 4, 5, 6, 7]
    )
    np.testing.assert_array_equal(run("out[i] = __shfl_sync(__activemask(), x[i], 3, 32);")[::31], [3, 3, 35])
    np.testing.assert_array_equal(run("out[i] = __dp4a(x[i], 0x01FF0101, 5);"), np.arange(64) + 5)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "s[t] = x[i]; out[i] = s[63 - t];",
            r"thread \(0, 0, 0\) \(line 5\): reads shared byte 252, which nobody has written",
        ),
        (
            f"s[t] = 0; {SYNC} s[t] = x[i]; if (t == 63) out[i] = s[0]; else out[i] = 0;",
            r"thread \(63, 0, 0\).*reads shared byte 0 without a barrier after thread \(0, 0, 0\)",
        ),
        (
            "s[t / 2] = 1; out[i] = 1;",
            r"thread \(1, 0, 0\).*writes shared byte 0 without a barrier after thread \(0, 0, 0\) \(line 5\) wrote it",
        ),
        (
            f"s[t] = 1; {SYNC} out[i] = s[0]; s[t + 64] = 2; if (t == 63) s[0] = 7;",
            r"thread \(63, 0, 0\).*writes shared byte 0 without a barrier after several threads",
        ),
        ("out[i] = s[t];", "nobody has written"),
        ("s[t + 256] = 1; out[i] = 1;", "a write of 4 bytes at byte 1024 of shared memory, which has 1024"),
        ("s[t - 1] = 1; out[i] = 1;", "at byte -4 of shared memory"),
        ("*(int2*)(s + 2 * t + 1) = int2{1, 2}; out[i] = 1;", "byte 4 of shared memory, which is not aligned"),
        ("out[i] = x[i + 1];", "thread .63, 0, 0.*reads 4 bytes outside of all arrays, at byte 256 of array 1"),
        ("out[i] = ((const int2*)((const char*)x + 4))[0].x;", "byte 4 of array 1, which is not aligned"),
        ("((int*)x)[i] = 1; out[i] = 1;", "writes array 1, an input"),
        ("out[i / 2] = 1;", "thread .1, 0, 0.*writes byte 0 of array 0, which another thread has written"),
        ("if (t) out[i] = 1;", "nobody writes byte 0 of out, nor 3 others"),
        (f"if (t < 32) {{ {SYNC} }} out[i] = 1;", r"is at a barrier, but thread \(32, 0, 0\).* is at its end"),
        (f"if (t < 32) {{ {SYNC} }} else {{\n {SYNC} }} out[i] = 1;", r"is at a barrier, but thread \(32, 0, 0\)"),
        (f"{COPY} {COMMIT} {SYNC} out[i] = s[t];", "reads shared byte 0 while the copy of thread .0, 0, 0"),
        (f"{COPY} {WAIT} {SYNC} out[i] = s[t];", "reads shared byte 0 while the copy"),
        (f"{COPY} {COMMIT} {WAIT} out[i] = s[63 - t];", "reads shared byte 252, which nobody"),
        (f"{COPY} {COMMIT} out[i] = 1;", "ends without waiting"),
        (
            f"s[t] = 1; {SYNC} out[i] = s[63 - t]; {COPY} {COMMIT} {WAIT}",
            r"reads shared byte 124 without a barrier after thread \(31, 0, 0\)",
        ),
        (
            asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %0, %0, %0}, [%1];", ': "=r"(out[i]) : "r"(1024 + t)'),
            "is not aligned",
        ),
        ("out[i] = 1; if (t < 16) out[i] = __shfl_sync(__activemask(), x[i], 3, 32);", "at an instruction of its warp"),
        (
            "if (t & 1) { "
            + asm("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %0, %0, %0}, [%1];", ': "=r"(out[i]) : "r"(1024)')
            + " } else out[i] = 1;",
            "at an instruction of its warp|is at its end",
        ),
    ],
)
def test_refusals(body: str, why: str) -> None:
    with pytest.raises(EmulationError, match=why):
        run(body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (asm("bar.sync 0;"), "bar.sync"),
        (asm("cp.async.ca.shared.global [%0], [%1], 4;", ':: "r"(0), "l"(x)', ""), "memory clobber"),
        (
            asm(
                "mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};",
                ': "=r"(out[0]), "=r"(out[1]) : "r"(0), "r"(0)',
            ),
            "output and read",
        ),
        (
            asm(
                "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};",
                ': "+r"(out[0]), "+r"(out[1]) : "r"(0), "r"(0)',
            ),
            "with .2, 1, 1, 2. operands",
        ),
    ],
)
def test_instructions_that_it_does_not_know(body: str, why: str) -> None:
    with pytest.raises(UnknownInstruction, match=why):
        run(body)
