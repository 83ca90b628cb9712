"""Whole tensor-core kernels: the CUDA source that TVM generates, executed thread by thread, against the arithmetic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import arith, ops
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.verify.reference import evaluate
from schedules.gpu.cuda_mma import Mma
from schedules.gpu.mma_tiles import MmaTile
from schedules.spelling.mma_intrinsics import Form

from ..schedules import test_cpu_contract as contract
from ..schedules.one_layer import in_two_steps, layer_of, packed
from ..schedules.test_cpu_contract import Conv, accumulate, convolve, full
from .emulate import ARCHITECTURES, Array, Counts, EmulationError, Generated, generate, launch, needs_gxx

R = relax.op
pytestmark = needs_gxx
rng = np.random.default_rng(21)
TARGET = cuda.make(cuda.ARCHITECTURES)
SMALL, WIDE, SLICED = MmaTile((2, 2), 1, 2), MmaTile((1, 2), 2, 4, stages=4), MmaTile((1, 1), 1, 4, slices=4, stages=2)


@dataclass(frozen=True)
class Case:
    """A convolution with bias, requantization, and a residual or not.

    tile: None for the cost model's.  data: its type, of 4 bits packed.  weights: bits.  fill: of the border.  twice:
    it rounds in two steps (A23a).
    """

    conv: Conv
    tile: MmaTile | None
    data: str = "uint8"
    weights: int = 8
    residual: bool = True
    fill: int = 0
    twice: bool = False

    def __str__(self) -> str:
        c, t = self.conv, self.tile
        shape = f"{c.n}x{c.h}x{c.w}x{c.ci}-{c.co}-k{c.k[0]}x{c.k[1]}s{c.stride[0]}g{c.groups}"
        tile = f"{t.pixels}x{t.channels}x{t.step_bytes}x{t.slices}x{t.stages}" if t else "model"
        more = ("-residual" if self.residual else "") + ("-twice" if self.twice else "")
        return f"{shape}-{self.data}-w{self.weights}-{tile}{more}"


class Built:
    """The kernel of a case with its operands and what it must give."""

    def __init__(self, case: Case) -> None:
        c, four = case.conv, case.data.endswith("4")
        x = full(case.data.replace("4", "8"), c.n, c.h, c.w, c.ci)
        w = full("int8", *c.k, c.ci // c.groups, c.co)
        x, w = x >> 4 if four else x, w >> 4 if case.weights == 4 else w
        acc = convolve(c, x, w, case.fill)
        bias = rng.integers(-(2**20), 2**20, (1, 1, 1, c.co)).astype(np.int32)
        m, shift = rng.integers(2**30, 2**31, (1, 1, 1, c.co)), rng.integers(36, 46, (1, 1, 1, c.co))
        kw: dict[str, Any] = {"rounding": "half_even", "zero_point": -3}
        residual = [full("int8", *acc.shape)] if case.residual else []

        def body(emit: Any, p: relax.Expr, *other: relax.Expr) -> relax.Expr:
            data = emit(ops.unpack_int4(p, x.shape, case.data == "int4")) if four else p
            weights = relax.const(w) if case.weights == 8 else emit(ops.unpack_int4(arith.pack_int4(w), w.shape, True))
            a = emit(R.add(accumulate(emit, c, data, weights, case.fill, "int32"), relax.const(bias)))
            if case.twice:
                return in_two_steps(emit, a, 12)
            return ops.requantize(
                [a, *other], [m, 2**29][: 1 + len(other)], 5, shift, qtype=arith.QType.of("int8"), **kw
            )

        self.inputs = [arith.pack_int4(x).reshape(*x.shape[:-1], -1) if four else x, *residual]
        module = packed(body, [(a.shape, str(a.dtype)) for a in self.inputs])
        layer = layer_of(module)
        assert Mma().applies(layer, TARGET) is None
        self.kernel = Mma().build(layer, TARGET, case.tile)
        if case.twice:
            self.expected = evaluate(module, {f"x{i}": x for i, x in enumerate(self.inputs)})["output0"]
            self.generated = generate(self.kernel.func, TARGET)
            return
        self.expected = arith.requantize(
            [acc + bias, *residual], [m, 2**29][: 1 + len(residual)], 5, shift, qmin=-128, qmax=127, **kw
        ).astype(np.int8)
        self.generated: Generated = generate(self.kernel.func, TARGET)

    def run(self, arch: int, source: str = "") -> tuple[Array, Counts]:
        """The result for an architecture, of another source perhaps."""
        out = np.zeros(self.expected.shape, np.int8)
        names = [str(p.name) for p in self.kernel.func.params]
        arrays = dict(zip(names, [*self.inputs, *self.kernel.arguments, out], strict=True))
        return out, launch(source or self.generated.source, self.generated.launches, arrays, names[-1:], arch)

    def check(self, arch: int) -> Counts:
        """The result is what the arithmetic says."""
        out, counts = self.run(arch)
        np.testing.assert_array_equal(out, self.expected, strict=True)
        return counts


CASES = [
    Case(Conv(1, 14, 14, 24, 40, pad=(1, 1, 1, 1)), SMALL),
    Case(Conv(1, 6, 7, 64, 64, (1, 1)), WIDE, "int8"),
    Case(Conv(1, 15, 15, 3, 24, (7, 7), (2, 2), pad=(3, 3, 3, 3)), SMALL, residual=False),
    Case(Conv(1, 7, 9, 64, 64, groups=4, pad=(1, 1, 1, 1)), MmaTile((1, 1), 1, 2), "int8"),
    Case(Conv(1, 4, 7, 96, 17, pad=(1, 1, 1, 1)), SLICED),
    Case(Conv(1, 5, 7, 96, 65, pad=(1, 1, 1, 1)), MmaTile((2, 1), 1, 4, slices=2, depth=4), "int8", 4),
    Case(Conv(1, 9, 9, 32, 32, pad=(1, 1, 1, 1)), MmaTile((2, 2), 1, 2, depth=4, stages=2), "uint8", 4),
    Case(Conv(1, 9, 7, 32, 32, pad=(1, 1, 1, 1)), SMALL, "uint4", 4),
    Case(Conv(3, 7, 7, 64, 24, (1, 1)), WIDE, "int4", 4, residual=False),
    Case(Conv(1, 7, 31, 1, 2, (1, 7), pad=(0, 3, 0, 3)), SMALL),
    Case(Conv(3, 5, 1, 17, 3, (3, 1), pad=(1, 0, 1, 0)), SMALL, "int8", fill=3),
    Case(Conv(1, 6, 7, 64, 24, (1, 1)), SMALL, residual=False, twice=True),
]
FORMS = {
    ("uint8", 8): Form.U8S8,
    ("int8", 8): Form.S8S8,
    ("uint8", 4): Form.U8S4,
    ("int8", 4): Form.S8S4,
    ("uint4", 4): Form.U4S4,
    ("int4", 4): Form.S4S4,
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_generated_source_gives_the_reference_s_integers(case: Case) -> None:
    built = Built(case)
    assert f"hawq::{FORMS[case.data, case.weights].value}>(" in built.generated.source
    # Without 4-bit tensor cores, sm_90 differs only in products of nibbles; sm_89 is sm_80.
    for arch in (750, 800, 900) if case.data.endswith("4") else (750, 800):
        assert built.check(arch).conflicts == 0


TILES = [
    MmaTile(warps, *fragments, slices, depth, stages)
    for warps, fragments, slices, depth, stages in [
        ((1, 1), (1, 2), 1, 2, 2),
        ((2, 2), (1, 4), 1, 4, 3),
        ((1, 2), (2, 2), 2, 2, 4),
        ((4, 1), (2, 4), 1, 2, 3),
        ((1, 1), (1, 8), 8, 4, 2),
        ((2, 2), (2, 8), 1, 4, 4),
    ]
]


ODD = [c for c in contract.CONVS if c.groups == 1 or c.groups != c.ci]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2 * len(ODD)), ids=lambda n: str(ODD[n // 2]))
def test_odd_shapes_with_every_kind_of_tile(number: int) -> None:
    """Two tiles for each shape, and every tile with several shapes."""
    c, tile = ODD[number // 2], TILES[(number + number // 6) % len(TILES)]
    case = Case(
        c, tile, ("uint8", "int8")[number % 2], (8, 4)[number // 2 % 2], bool(number % 3), 3 * (number % 5 == 0)
    )
    Built(case).check(ARCHITECTURES[number % 4])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("data", ["uint4", "int4"])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_packed_data_with_every_kind_of_tile(tile: MmaTile, data: str, arch: int) -> None:
    for c in (
        Conv(1, 7, 9, 40, 24, pad=(1, 1, 1, 1)),
        Conv(2, 9, 5, 64, 32, (5, 5), (2, 2), pad=(2, 1, 2, 3)),
        Conv(1, 3, 3, 8, 17, (1, 1)),
    ):
        Built(Case(c, tile, data, 4)).check(arch)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "weights"), FORMS)
@pytest.mark.parametrize(
    "c",
    [
        Conv(1, 7, 7, 512, 512, pad=(1, 1, 1, 1)),
        Conv(1, 14, 14, 256, 256, pad=(1, 1, 1, 1)),
        Conv(1, 14, 14, 1024, 256, (1, 1)),
        Conv(2, 28, 28, 128, 128, (3, 3), (2, 2), pad=(1, 1, 1, 1)),
        Conv(8, 7, 7, 512, 1024, (1, 1)),
    ],
    ids=str,
)
def test_layers_of_resnet_with_the_cost_model_s_tile(c: Conv, data: str, weights: int) -> None:
    """Their own sizes; products of nibbles on sm_90, which opens them."""
    Built(Case(c, None, data, weights)).check(900 if data.endswith("4") else 800)


PIPELINED = Case(Conv(1, 6, 7, 64, 32, pad=(1, 1, 1, 1)), MmaTile((2, 2), 1, 2))


def _without(source: str, pattern: str, number: int, instead: str = "") -> str:
    """A source whose kernel lacks the match of a pattern of that number."""
    prelude, mark, kernel = source.rpartition('extern "C" __global__')
    m = list(re.finditer(pattern, kernel))[number]
    return prelude + mark + kernel[: m.start()] + m.expand(instead) + kernel[m.end() :]


@pytest.mark.parametrize("case", [PIPELINED, Case(PIPELINED.conv, SLICED)], ids=str)
def test_every_barrier_is_needed(case: Case) -> None:
    built = Built(case)
    built.check(800)
    barriers = built.generated.source.rpartition('extern "C" __global__')[2].count("__syncthreads();")
    assert barriers >= 3
    for number in range(barriers):
        with pytest.raises(EmulationError, match=r"without a barrier|copy of thread|nobody has written"):
            built.run(800, _without(built.generated.source, r"__syncthreads\(\);", number))


def test_every_wait_is_needed_and_long_enough() -> None:
    built = Built(PIPELINED)
    waits = re.findall(
        r"wait_group_async_wait_group_(\d)\(\);", built.generated.source.rpartition('extern "C" __global__')[2]
    )
    assert sorted(waits) == ["0", "1", "2"]
    for number, groups in enumerate(waits):
        for instead in ("", f"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_{int(groups) + 1}();"):
            source = _without(
                built.generated.source, r"tvm_builtin_ptx_cp_async_wait_group_async_wait_group_\d\(\);", number, instead
            )
            source = source.replace(
                'extern "C" __global__',
                "__device__ void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_3() { asm"
                ' volatile("cp.async.wait_group 3;" ::: "memory"); }\nextern "C" __global__',
                1,
            )
            with pytest.raises(EmulationError, match="while the copy"):
                built.run(800, source)


@pytest.mark.parametrize(
    ("pattern", "instead"),
    [(r"mask_local_ptr(_\d+)?\[0\]\)", "1)"), (r"\+ 2\) % 3\)", "+ 1) % 3)")],  # padding is read  # a copy's stage
)
def test_a_wrong_index_or_guard_shows(pattern: str, instead: str) -> None:
    built = Built(PIPELINED)
    kernel = built.generated.source.rpartition('extern "C" __global__')[2]
    found = [m.start() for m in re.finditer(pattern, kernel)]
    used = [i for i, at in enumerate(found) if "hawq::copy" in kernel[kernel.rfind("\n", 0, at) : at]]
    assert used
    for number in used:
        with pytest.raises(AssertionError):  # EmulationError is one
            out, _ = built.run(800, _without(built.generated.source, pattern, number, instead))
            np.testing.assert_array_equal(out, built.expected)


def test_a_tile_has_a_pipeline() -> None:
    """Without one, nothing would wait for the copies."""
    with pytest.raises(ValueError, match="not a tile"):
        MmaTile((1, 1), 1, 2, stages=1)
