"""The device functions of cuda_device.py, executed for every architecture, against the TVMScript meaning of their
intrinsics.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import numpy as np
import pytest
import tvm
from tvm import s_tir

from schedules.spelling.cuda_prelude import PRELUDE
from schedules.spelling.mma_intrinsics import Form, copy_always, copy_or_zero, multiply_step, parts

from .emulate import ARCHITECTURES, Array, EmulationError, Launch, launch, needs_gxx

pytestmark = needs_gxx
rng = np.random.default_rng(5)
SIZES = [(1, 1, 2), (2, 3, 2), (1, 4, 4)]  # rows and columns of fragments, depth
SHARED = "extern __shared__ __align__(64) unsigned char shared[];"
FILL_SHARED = "for (int i = threadIdx.x; i < {bytes}; i += 32) {to}[i] = {source}[blockIdx.x * {bytes} + i];"
WAIT = """
#if __CUDA_ARCH__ >= 800
asm volatile("cp.async.commit_group;" ::);
asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
__syncthreads();
"""


def _step(rows: int, columns: int, depth: int, form: Form) -> str:
    """A kernel of one warp that adds one step to what `sums` holds, as the generated kernels call it."""
    chunk, fragment = 16 * rows * 16 + 32, 32 * depth * form.width
    data, weights = 2 * depth * chunk, columns * fragment
    return f"""
extern "C" __global__ void step_{form.value}_{rows}_{columns}_{depth}(
    int* sums, const unsigned char* a, const unsigned char* b) {{
  {SHARED}
  {FILL_SHARED.format(bytes=data, to="shared", source="a")}
  {FILL_SHARED.format(bytes=weights, to="(shared + " + str(data) + ")", source="b")}
  __syncthreads();
  int c[{4 * rows * columns}];
  int* own = sums + (blockIdx.x * 32 + threadIdx.x) * {4 * rows * columns};
  for (int i = 0; i < {4 * rows * columns}; ++i) c[i] = i;
  hawq::step<{rows}, {columns}, {depth}, hawq::{form.value}>(
      c, shared + (threadIdx.x >> 2) * 16, {chunk},
      shared + {data} + (threadIdx.x & 3) * {8 * depth * form.width}, {fragment});
  for (int i = 0; i < {4 * rows * columns}; ++i) own[i] = c[i];
}}
"""


SOURCE = PRELUDE + "".join(_step(*size, form) for size, form in product(SIZES, Form))
FEWER = PRELUDE + "".join(_step(*SIZES[1], form) for form in Form)  # to be changed


@cache
def _operands(rows: int, columns: int, depth: int, form: Form) -> tuple[Array, Array]:
    """Data [case, chunk, bytes of a chunk] and weights [case, fragment, lane, bytes]: random bytes, and all pairs of
    some extreme ones.
    """
    pairs = [
        (0x80, 0x80),
        (0xFF, 0x80),
        (0xFF, 0x7F),
        (0x7F, 0x81),
        (0x88, 0x88),
        (0xFF, 0x88),
        (0x77, 0x77),
        (0x00, 0xFF),
    ]
    a = rng.integers(0, 256, (2 + len(pairs), 2 * depth, 256 * rows + 32), np.uint8)
    b = rng.integers(0, 256, (2 + len(pairs), columns, 32, depth * form.width), np.uint8)
    for i, (data, weights) in enumerate(pairs):
        a[2 + i], b[2 + i] = data, weights
    return a, b


@cache
def _meant(rows: int, columns: int, depth: int, form: Form) -> Array:
    """The sums [case, lane, 2 * rows, 2 * columns] that the intrinsic's meaning gives."""
    a, b = _operands(rows, columns, depth, form)
    meaning = s_tir.TensorIntrin.get(multiply_step(rows, columns, depth, form, 16)).desc
    function = tvm.tirx.build(
        meaning.with_attr("global_symbol", "main"), target=tvm.target.Target("llvm"), pipeline="s_tir"
    )["main"]
    data = a[:, :, : 256 * rows].reshape(len(a), 2 * depth, 1, 2 * rows, 8, 1, 16).view(form.data)
    weights = b.reshape(len(b), columns, 4, 8, *parts(depth * form.width, 16)).view(form.weights)
    start = np.arange(4 * rows * columns, dtype=np.int32).reshape(2 * rows, 2 * columns)
    found = np.zeros((len(a), 32, 2 * rows, 2 * columns), np.int32)
    for case, lane in product(range(len(a)), range(32)):
        sums = tvm.runtime.tensor(start)
        own = (data[case][:, :, :, lane // 4], weights[case][:, lane % 4])
        function(*(tvm.runtime.tensor(np.ascontiguousarray(o)) for o in own), sums)
        found[case, lane] = sums.numpy()
    return found


def run_step(source: str, size: tuple[int, int, int], form: Form, arch: int) -> Array:
    """What `source` gives on the operands of `_operands`."""
    a, b = _operands(*size, form)
    rows, columns, _ = size
    sums = np.zeros((len(a), 32, 2 * rows, 2 * columns), np.int32)
    name = f"step_{form.value}_{'_'.join(map(str, size))}"
    config = Launch(name, ("sums", "a", "b"), (len(a), 1, 1), (32, 1, 1), a[0].nbytes + b[0].nbytes)
    counts = launch(source, config, {"sums": sums, "a": a, "b": b}, ["sums"], arch)
    assert counts.products and not counts.conflicts
    return sums


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_step_of_every_form_is_its_meaning(arch: int) -> None:
    for size, form in product(SIZES, Form):
        np.testing.assert_array_equal(
            run_step(SOURCE, size, form, arch), _meant(*size, form), err_msg=f"{size} {form}", strict=True
        )


@pytest.mark.parametrize(
    ("before", "after", "forms"),
    [
        ("data[half][m], w[2 * half], w[2 * half + 1]", "data[half][m], w[2 * half + 1], w[2 * half]", list(Form)),
        ("{%8, %9}, {%0, %1, %2, %3};", "{%9, %8}, {%0, %1, %2, %3};", list(Form)),
        ("{%4, %5, %6, %7}, {%8", "{%5, %4, %6, %7}, {%8", list(Form)),
        ("(lane & 15) * 16 + (lane >> 4) * chunk", "(lane & 15) * 16", list(Form)),
        (
            "(packed.x << 4) & 0xF0F0F0F0u; w[1] = packed.x",
            "packed.x & 0xF0F0F0F0u; w[1] = (packed.x << 4)",
            [Form.U8S4, Form.S8S4],
        ),
        ('"u4.s4"', '"s4.s4"', [Form.U4S4]),
        ('"u8.s8"', '"s8.s8"', [Form.U8S8, Form.U8S4]),
    ],
)
def test_a_wrong_fragment_shows(before: str, after: str, forms: list[Form]) -> None:
    source = FEWER.replace(before, after)
    assert source != FEWER
    for form in forms:
        assert (run_step(source, SIZES[1], form, 800) != _meant(*SIZES[1], form)).any()


def test_wrong_nibbles_show_where_nibbles_are_opened() -> None:
    for before, after in (
        (">> 4), nibbles_s(b1 >> 4)", ">> 4), nibbles_s(b1)"),
        ("^ 0x08080808u", "^ 0x80808080u"),
        ("OPEN(a[i] >> 4)", "OPEN(a[i])"),
    ):
        source = FEWER.replace(before, after)
        assert source != FEWER
        assert (run_step(source, SIZES[1], Form.S4S4, 900) != _meant(*SIZES[1], Form.S4S4)).any()


def _copies(count: int) -> str:
    return f"""
extern "C" __global__ void copy_{count}(unsigned char* out, const unsigned char* from, const int* take) {{
  {SHARED}
  const int t = threadIdx.x;
  hawq::copy<{count}>(shared + t * {count}, from + (t * 7 % 32) * {count}, take[t]);
  {WAIT}
  for (int i = 0; i < {count}; ++i) out[(31 - t) * {count} + i] = shared[(31 - t) * {count} + i];
}}
"""


COPIES = PRELUDE + "".join(map(_copies, (4, 8, 16)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("count", [4, 8, 16])
def test_copies_of_every_width_are_their_meaning(count: int, arch: int) -> None:
    start, take = rng.integers(0, 256, (32, count), np.uint8), rng.integers(0, 2, 32, np.int32)
    out, wanted = np.zeros_like(start), np.zeros_like(start)
    launch(
        COPIES,
        Launch(f"copy_{count}", ("out", "from", "take"), (1, 1, 1), (32, 1, 1), 32 * count),
        {"out": out, "from": start, "take": take},
        ["out"],
        arch,
    )
    masked, always = (
        tvm.tirx.build(
            s_tir.TensorIntrin.get(name("uint8", count)).desc.with_attr("global_symbol", "main"),
            target="llvm",
            pipeline="s_tir",
        )["main"]
        for name in (copy_or_zero, copy_always)
    )
    for t in range(32):
        result, data = (tvm.runtime.tensor(np.ascontiguousarray(x)) for x in (wanted[t], start[t * 7 % 32]))
        masked(tvm.runtime.tensor(take[t : t + 1]), data, result) if take[t] == 0 else always(data, result)
        wanted[t] = result.numpy()
    np.testing.assert_array_equal(out, wanted, strict=True)


def test_data_outside_is_not_touched_when_nothing_is_taken() -> None:
    """Padding is copied as no bytes from an address before or behind the array."""
    source = COPIES.replace("from + (t * 7 % 32) * 16", "from - 512")
    out, take = np.ones((32, 16), np.uint8), np.zeros(32, np.int32)
    config = Launch("copy_16", ("out", "from", "take"), (1, 1, 1), (32, 1, 1), 512)
    for arch in ARCHITECTURES:
        launch(source, config, {"out": out, "from": np.ones((32, 16), np.uint8), "take": take}, ["out"], arch)
        assert not out.any()
    with pytest.raises(EmulationError, match="outside of all arrays"):
        launch(source, config, {"out": out, "from": np.ones((32, 16), np.uint8), "take": take + 1}, ["out"], 800)
