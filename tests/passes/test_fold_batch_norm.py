"""BatchNorm folding: the weights' integers stay, their scales change, and the model computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.verify.reference import evaluate
from relay_passes.fold_batch_norm import fold_batch_norm
from relay_passes.lower_to_integer import lower_to_integer
from relay_passes.remove_dead_code import remove_dead_code

from .modules import RNG, U8, dq, full_range, module, op_names, q, weight


def norm(bb: relax.BlockBuilder, x: relax.Expr, channels: int, negative: bool = False) -> relax.Expr:
    gamma = RNG.uniform(0.5, 1.5, channels)
    gamma[0] = -gamma[0] if negative else gamma[0]
    values = [gamma, RNG.normal(size=channels), RNG.normal(size=channels) * 3, RNG.uniform(0.5, 2, channels)]
    constants = [relax.const(v.astype("float32")) for v in values]
    whole = bb.emit(relax.op.nn.batch_norm(x, *constants, axis=1, epsilon=1e-3), "bn")
    return bb.emit(relax.TupleGetItem(whole, 0), "bn_out")


def close(before: tvm.IRModule, after: tvm.IRModule) -> None:
    """Equal up to the float32 rounding of the constants that folding creates: at most one step, rarely."""
    feed = {p.name: full_range(ops.shape_of(p), ops.dtype_of(p)) for p in before["main"].params}
    wanted, got = (evaluate(m, feed)["out0"].astype(int) for m in (before, after))
    # Float32 constants against float64 formula.
    assert np.abs(wanted - got).max() <= 1 and np.mean(wanted != got) < 0.01


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_into_a_convolution(bias: bool, negative: bool) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.0531, 90), bb.emit(weight((6, 3, 3, 3), 0.0117)), padding=1))
        if bias:
            y = bb.emit(relax.op.add(y, relax.const(RNG.normal(size=(1, 6, 1, 1)).astype("float32"))))
        return q(bb, bb.emit(relax.op.nn.relu(norm(bb, y, 6, negative))), 0.113, 3)

    before = module(build, {"x": ((2, 3, 7, 7), "uint8")})
    after, count = fold_batch_norm(before)
    after, _ = remove_dead_code(after)
    stages.verify(after, stages.Stage.ANNOTATED)
    assert count == 1 and "batch_norm" not in op_names(after) and op_names(after).count("add") == 1
    (w,) = [
        b.value
        for b in stages.bindings(after["main"])
        if ops.op_name(b.value) == "hawq.dequantize" and ops.is_const(b.value.args[0])
    ]
    assert ops.const_value(w.args[1]).shape == (6, 1, 1, 1) and ops.dtype_of(w.args[1]) == "float64"
    close(before, after)
    lowered, _ = remove_dead_code(lower_to_integer(after)[0])
    assert op_names(lowered).count("requantize") == 1
    close(before, lowered)


def test_after_something_else_it_becomes_arithmetic() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, norm(bb, dq(bb, p[0], 0.0531, 90), 3), 0.113, 120)

    before = module(build, {"x": ((2, 3, 7, 7), "uint8")})
    after, count = fold_batch_norm(before)
    assert count == 1 and [n for n in op_names(after) if n in ("multiply", "add")] == ["multiply", "add"]
    close(before, after)


def test_a_convolution_read_twice_keeps_its_weights() -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        y = bb.emit(relax.op.nn.conv2d(dq(bb, p[0], 0.0531, 90), bb.emit(weight((6, 3, 1, 1), 0.0117))))
        return [q(bb, norm(bb, y, 6), 0.113, 120), q(bb, y, 0.117, 120)]

    after, count = fold_batch_norm(module(build, {"x": ((2, 3, 7, 7), "uint8")}))
    assert count == 1 and "multiply" in op_names(after)


def test_nothing_to_do() -> None:
    before = module(lambda bb, p: q(bb, dq(bb, p[0], 0.1, 3, U8), 0.2, 3), {"x": ((2, 3), "uint8")})
    after, count = fold_batch_norm(before)
    assert count == 0 and op_names(after) == op_names(before)
