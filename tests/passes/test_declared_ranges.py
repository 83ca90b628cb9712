"""Float inputs whose range the user declares: integers at the graph's entry that saturate at its ends (A26b), (A12)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import ops, ranges, stages
from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.verify.distances import distances
from hawq_tvm.verify.reference import evaluate
from relay_passes.declare_ranges import with_declared_ranges
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from .modules import RNG, S8, dq, module, op_names, q, weight

SHAPE = (16, 5)
LOW, HIGH = -3.1, 7.77


def declared(build: Any, inputs: dict[str, Any], low: float = LOW, high: float = HIGH, **attrs: Any) -> tvm.IRModule:
    """A module whose input x has a declared range."""
    main = module(build, inputs, **attrs)["main"]
    return tvm.IRModule({"main": with_declared_ranges(main, {"x": (low, high)})})


def lowered(mod: tvm.IRModule) -> tvm.IRModule:
    after, _ = remove_dead_code(lower_to_integer(mod)[0])
    stages.verify(after, stages.Stage.INTEGER)
    ranges.margins(after)
    return after


def quantizes(mod: tvm.IRModule) -> list[relax.Call]:
    return [b.value for b in stages.bindings(mod["main"]) if ops.op_name(b.value) == "hawq.quantize"]


def residual(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
    """x and a product of quantized tensors, added and quantized."""
    y = bb.emit(relax.op.matmul(dq(bb, p[1], 0.013, 3), bb.emit(weight((5, 5), 0.011))))
    return q(bb, bb.emit(relax.op.add(p[0], y), "the_sum"), 0.1, 128)


def beyond(low: float = LOW, high: float = HIGH) -> np.ndarray:
    """Values of the range, its ends, those beside them, and far beyond."""
    low32, high32 = np.float32(low), np.float32(high)
    ends = [v for e in (low32, high32) for v in (e, np.nextafter(e, np.float32(99)), np.nextafter(e, np.float32(-99)))]
    more = np.array([*ends, 1e30, -1e30, np.inf, -np.inf, 0.0, 1e-30], np.float32)
    x = RNG.uniform(low * 1.2, high * 1.2, SHAPE).astype(np.float32)
    x.flat[: more.size] = more
    return x


def test_a_declared_input_is_integers_of_28_bits_that_saturate_at_its_ends() -> None:
    inputs: dict[str, Any] = {"x": (SHAPE, "float32"), "y": (SHAPE, "uint8")}
    before = declared(residual, inputs)
    after = lowered(before)
    (grid,) = quantizes(after)
    scale, one = float(ops.const_value(grid.args[1])), Fraction(1, 2**24)
    assert (scale, str(grid.attrs["out_dtype"])) == (2.0**-24, "int32")
    ends = [round(Fraction(float(np.float32(v))) / one) for v in (LOW, HIGH)]
    assert [int(grid.attrs[k]) for k in ("qmin", "qmax")] == ends
    x, y = beyond(), RNG.integers(0, 255, SHAPE, dtype=np.uint8)
    clipped = np.clip(x, np.float32(LOW), np.float32(HIGH))
    got = evaluate(after, {"x": x, "y": y})["out0"]
    np.testing.assert_array_equal(got, evaluate(after, {"x": clipped, "y": y})["out0"])
    plain = tvm.IRModule({"main": before["main"].without_attr("hawq.declared_ranges")})
    wanted = evaluate(plain, {"x": clipped, "y": y})["out0"]
    assert np.max(np.abs(got.astype(int) - wanted.astype(int))) <= 1
    assert 0 < distances(after)["q"] < 1e-4


@pytest.mark.parametrize("moved", [False, True])
def test_its_own_quantizes_saturate_there_too(moved: bool) -> None:
    """(A12), exactly: those of the clipped input."""

    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        x = bb.emit(relax.op.permute_dims(p[0])) if moved else p[0]
        return [q(bb, x, 0.0731, 3, S8), q(bb, x, 0.2, 7)]

    inputs: dict[str, Any] = {"x": (SHAPE, "float32")}
    after, x = lowered(declared(build, inputs)), beyond()
    got = evaluate(after, {"x": x})
    wanted = evaluate(module(build, inputs), {"x": np.clip(x, np.float32(LOW), np.float32(HIGH))})
    for name, value in wanted.items():
        np.testing.assert_array_equal(got[name], value)
    assert [int(c.attrs["qmin"]) for c in quantizes(after)] == [3 - 42, 0]


def test_a_declared_range_stands_before_what_quantizes_tell() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.matmul(dq(bb, q(bb, p[0], 0.05, 128), 0.05, 128), bb.emit(weight((5, 5), 0.01))))
        return q(bb, bb.emit(relax.op.add(p[0], y)), 0.1, 128)

    grids = [c for c in quantizes(lowered(declared(build, {"x": (SHAPE, "float32")}, -1, 1))) if c.attrs["qmax"] > 255]
    assert [float(ops.const_value(c.args[1])) for c in grids] == [2.0**-26]


def test_a_float_head_reads_what_has_saturated() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(relax.op.multiply(p[0], relax.const(np.float32(0.3)))), 0.05, 20)

    inputs: dict[str, Any] = {"x": (SHAPE, "float32")}
    after, x = lowered(declared(build, inputs, **{"hawq.allow_float_tail": 1})), beyond()
    assert op_names(after)[:2] == ["clip", "multiply"]
    wanted = evaluate(module(build, inputs), {"x": np.clip(x, np.float32(LOW), np.float32(HIGH))})
    np.testing.assert_array_equal(evaluate(after, {"x": x})["out0"], wanted["out0"])


def test_scales_per_channel_and_scales_of_run_time_take_no_range() -> None:
    def channels(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, p[0], np.array([0.1, 0.2, 0.3, 0.4, 0.5], np.float32), 0, S8)

    def dynamic(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return bb.emit(relax.TupleGetItem(bb.emit(ops.dynamic_quantize(p[0])), 0))

    for build, reason in ((channels, "its scales differ between channels"), (dynamic, "computed at run time")):
        with pytest.raises(ModelError, match=reason):
            lower_to_integer(declared(build, {"x": (SHAPE, "float32")}))


@pytest.mark.parametrize(
    ("name", "ends", "said"),
    [
        ("x", (1.0, 1.0), "--range x: is no range .*LOW:HIGH with LOW below HIGH.*found 1:1"),
        ("x", (2.0, -2.0), "--range x: is no range .*found 2:-2"),
        ("x", (0.0, 1e39), "--range x: is no range .*finite float32 numbers.*found 0:1e[+]39"),
        ("x", (-np.inf, 0.0), "--range x: is no range .*found -inf:0"),
        ("x", (np.nan, 0.0), "--range x: is no range .*found nan:0"),
        ("x", (0.0, 1e-30), "--range x: is no range"),
        ("y", (0.0, 1.0), "--range y: is an input of integers.*a float input: x; found uint8; remedy: leave out"),
        ("z", (0.0, 1.0), "--range z: is not an input of the model; expected x, y; found z"),
    ],
)
def test_what_is_no_range_is_refused(name: str, ends: tuple[float, float], said: str) -> None:
    main = module(residual, {"x": (SHAPE, "float32"), "y": (SHAPE, "uint8")})["main"]
    with np.errstate(over="ignore"), pytest.raises(UsageError, match=said):
        with_declared_ranges(main, {name: ends})


def test_without_a_range_the_sentence_names_the_input_and_the_option() -> None:
    inputs: dict[str, Any] = {"x": (SHAPE, "float32"), "y": (SHAPE, "uint8")}
    said = "the_sum: .*it reads the float input x, and nothing tells its range.*declare it with --range x=LOW:HIGH"
    with pytest.raises(ModelError, match=said):
        lower_to_integer(module(residual, inputs))
