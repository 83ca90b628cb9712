"""Means, sums and resizes against Fractions: every tie where the exact 1 / n puts it, and a proof that says so."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.compiler.pipeline import to_packed
from hawq_tvm.core import arith, ops, thresholds, two_steps
from hawq_tvm.core.arith import QType
from hawq_tvm.core.threshold_search import round_exactly
from hawq_tvm.verify.reference import evaluate
from relay_passes.lower_to_integer import lower_to_integer

from .modules import dq, module, q

U8, S8, U16, S16 = (QType.of(n) for n in ("uint8", "int8", "uint16", "int16"))
RNG = np.random.default_rng(6)


def lowered(build: Callable[..., Any], shape: tuple[int, ...], qtype: QType) -> tuple[Any, list[relax.Call]]:
    after, _ = lower_to_integer(module(build, {"x": (shape, qtype.storage)}))
    calls = [
        b.value
        for block in after["main"].body.blocks
        for b in block.bindings
        if ops.op_name(b.value) == "hawq.requantize"
    ]
    return after, calls


def proved(calls: list[relax.Call]) -> int:
    """The thresholds that were compared; none may differ."""
    assert all(int(c.attrs["thresholds"]) >= 0 and int(c.attrs["differing"]) == 0 for c in calls), [
        str(c.attrs) for c in calls
    ]
    return sum(int(c.attrs["thresholds"]) for c in calls)


def clamped(values: Any, zero: int, qtype: QType) -> np.ndarray[Any, Any]:
    """Fractions rounded half to even, the zero point added, clamped."""
    return np.array([min(max(round(v) + zero, qtype.qmin), qtype.qmax) for v in values])


def sums_to_rows(sums: np.ndarray[Any, Any], n: int, qtype: QType) -> np.ndarray[Any, Any]:
    """Rows of n integers with the given sums: as even as they can be."""
    low = sums // n
    rows = low[:, None] + (np.arange(n) < (sums - low * n)[:, None])
    assert rows.min() >= qtype.qmin and rows.max() <= qtype.qmax
    return rows.astype(qtype.storage)


@pytest.mark.slow
@pytest.mark.parametrize(
    "qtype, zeros, scales",
    [
        (U8, (128, 128), (0.05, 0.05)),
        (S8, (-17, 4), (0.05, 0.05)),
        (U8, (3, 200), (0.1, 0.05)),
        (S8, (0, -5), (0.25, 0.75)),
        (U16, (1000, 1000), (0.001, 0.001)),
        (S16, (-7, 12), (0.001, 0.002)),
    ],
)
def test_means_of_1_to_256_integers(qtype: QType, zeros: tuple[int, int], scales: tuple[float, float]) -> None:
    """Every sum near a tie, and random ones; the ratio is the exact quotient of the file's two float32 scales."""
    ratio = Fraction(float(np.float32(scales[0]))) / Fraction(float(np.float32(scales[1])))
    for n in range(1, 257) if scales == (0.05, 0.05) else [3, 6, 12, 49, 90, 254]:
        low, high = qtype.qmin * n, qtype.qmax * n
        ks = RNG.integers(-60, 60, 40) + (0 if zeros[0] else 100)
        ties = [int((Fraction(2 * int(k) + 1, 2) / ratio + zeros[0]) * n) + d for k in ks for d in (-1, 0, 1)]
        sums = np.array([*np.clip(ties, low, high).tolist(), *RNG.integers(low, high + 1, 60).tolist(), low, high])

        def build(bb: relax.BlockBuilder, p: list[relax.Expr], n: int = n) -> Any:
            y = bb.emit(relax.op.mean(dq(bb, p[0], scales[0], zeros[0], qtype), [1]))
            return q(bb, y, scales[1], zeros[1], qtype)

        x = sums_to_rows(sums, n, qtype)
        after, calls = lowered(build, x.shape, qtype)
        wanted = clamped([(Fraction(int(s), n) - zeros[0]) * ratio for s in sums.tolist()], zeros[1], qtype)
        np.testing.assert_array_equal(evaluate(after, {"x": x})["out0"], wanted, err_msg=f"mean of {n}")
        if n > 1 or scales[0] != scales[1]:
            assert proved(calls) > 0
        tied = [f for s in sums.tolist() if (f := (Fraction(int(s), n) - zeros[0]) * ratio).denominator == 2]
        if n % 4 == 2 and n > 2 and scales[0] == scales[1]:
            assert tied and len(calls) == 2


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "kernel, pads", [((3, 3), (1, 1, 1, 1)), ((2, 3), (1, 0, 0, 2)), ((6, 1), (3, 0, 2, 0)), ((4, 5), (2, 3, 1, 2))]
)
def test_average_pools_with_a_divisor_per_position(
    kernel: tuple[int, int], pads: tuple[int, ...], include: bool
) -> None:
    zero = 117

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        pool = relax.op.nn.avg_pool2d(dq(bb, p[0], 0.1, zero), kernel, padding=list(pads), count_include_pad=include)
        return q(bb, bb.emit(pool), 0.1, zero)

    x = RNG.integers(110, 124, (1, 3, 8, 9)).astype(np.uint8)
    after, calls = lowered(build, x.shape, U8)
    assert proved(calls) > 0
    got = evaluate(after, {"x": x})["out0"]
    for _, c, i, j in np.ndindex(got.shape):
        ys, xs = (range(o - p, o - p + k) for o, p, k in ((i, pads[0], kernel[0]), (j, pads[1], kernel[1])))
        inside = [int(x[0, c, a, b]) - zero for a in ys for b in xs if 0 <= a < 8 and 0 <= b < 9]
        mean = Fraction(sum(inside), kernel[0] * kernel[1] if include else len(inside))
        assert got[0, c, i, j] == min(max(round(mean) + zero, 0), 255)


@pytest.mark.parametrize("divisor", [3, 6, 7, 10, 12, 24])
@pytest.mark.parametrize("how", ["divide", "sum then divide", "two scales", "subtract"])
def test_an_average_of_two_tensors(divisor: int, how: str) -> None:
    """(a + b) / n, also of scales of which one is a multiple of the other: one operand, one proof (A23c)."""
    second = 0.15 if how == "two scales" else 0.05

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        a, b = (
            dq(bb, p[0], 0.05, 128),
            dq(bb, bb.emit(relax.op.flip(p[0], 0)), np.float32(0.05) * (2 if how == "two scales" else 1), 100),
        )
        y = bb.emit((relax.op.subtract if how == "subtract" else relax.op.add)(a, b))
        y = bb.emit(relax.op.divide(y, relax.const(np.float32(divisor))))
        return q(bb, y, 0.05, 128)

    del second
    x = np.stack([np.repeat(np.arange(256), 8), RNG.integers(0, 256, 2048)]).astype(np.uint8)
    after, calls = lowered(build, x.shape, U8)
    assert proved(calls) > 0
    a, b = x.astype(int) - 128, (x[::-1].astype(int) - 100) * (2 if how == "two scales" else 1)
    total = a - b if how == "subtract" else a + b
    wanted = clamped([Fraction(int(t), divisor) for t in total.ravel()], 128, U8)
    np.testing.assert_array_equal(evaluate(after, {"x": x})["out0"].ravel(), wanted)


def test_both_steps_are_one_kernel() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.mean(dq(bb, p[0], 0.05, 128), [2, 3])), 0.05, 128)

    packed = to_packed(module(build, {"x": ((1, 16, 2, 3), "uint8")}))
    layers = [f for f in packed.functions.values() if "hawq.layer" in (f.attrs or {})]
    assert len(layers) == 1


@pytest.mark.parametrize("rounding", ["half_up", "half_even", "half_away", "half_toward_zero"])
def test_two_steps_are_exact_for_every_operand(rounding: str) -> None:
    """Brute force over the operand, and the proof must agree; ratios of both signs, constants of their own
    denominators.
    """
    steps = (-8 + 1, 7)
    for _ in range(60):
        ratio = Fraction(int(RNG.integers(-40, 41)) or 1, int(RNG.integers(1, 60)))
        constant = Fraction(int(RNG.integers(-90, 90)), int(RNG.integers(1, 30)))
        low, high = int(RNG.integers(-200, 0)), int(RNG.integers(0, 200))
        real = thresholds.Rescale((ratio,), constant, (0,), 0, 0, (low,), (high,))
        bits = two_steps.fraction_bits([real], steps)
        assert bits is not None
        first = two_steps.rounded_down(real, bits, (1,), "layer")
        assert first is not None
        assert two_steps.prove_two_steps(real, first, bits, rounding, steps).differing == 0
        for x in range(low, high + 1):
            fine = (x * first.multipliers[0] + first.offset) >> first.shift
            assert fine == (2**bits * (x * ratio + constant)).__floor__()
            got, wanted = (round_exactly(v, rounding) for v in (Fraction(fine, 2**bits), x * ratio + constant))
            assert got == wanted, (ratio, constant, x)


def test_a_proof_of_two_steps_finds_a_wrong_one() -> None:
    real = thresholds.Rescale((Fraction(1, 6),), Fraction(0), (0,), 0, 0, (-600,), (600,))
    first = two_steps.rounded_down(real, 3, (1,), "layer")
    assert first is not None
    assert two_steps.prove_two_steps(real, first, 3, "half_even", (-8, 8)).differing == 0
    # 2/6 of a step is taken for a tie at one bit after the point.
    coarse = two_steps.rounded_down(real, 1, (1,), "layer")
    assert coarse is not None
    assert two_steps.prove_two_steps(real, coarse, 1, "half_even", (-8, 8)).differing > 0


@pytest.mark.parametrize("relu", [False, True])
def test_the_double_rounding_of_tflite_is_kept(relu: bool) -> None:
    """(A8) for a mean, also behind a ReLU, whose bound is a real number: nothing replaces it by two steps."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.mean(dq(bb, p[0], 0.05, 3, S8), [1]))
        return q(bb, bb.emit(relax.op.nn.relu(y)) if relu else y, 0.05, -5, S8, rounding="double")

    x = RNG.integers(-128, 128, (500, 6)).astype(np.int8)
    after, calls = lowered(build, x.shape, S8)
    assert [str(c.attrs["rounding"]) for c in calls] == ["double"]
    (call,) = calls
    m, shift = (int(ops.const_value(a)) for a in (call.args[1].fields[0], call.args[3]))
    total = x.astype(np.int64).sum(axis=1) - 18
    wanted = np.clip(arith.double_round(total, m, shift) - 5, -5 if relu else -128, 127)
    np.testing.assert_array_equal(evaluate(after, {"x": x})["out0"], wanted)
