"""The operator table: every row can be computed and emitted, and a new operator takes a row, a reference function
and an emitter.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tvm
from tvm import relax, te

import schedules
from hawq_tvm.compiler import build
from hawq_tvm.core import operators, ops, stages
from hawq_tvm.core.intervals import Interval
from hawq_tvm.core.operators import OPERATORS, Kind, Operator
from hawq_tvm.core.ranges import module_ranges
from hawq_tvm.verify import reference
from relay_passes.choose_layout import choose_layout
from relay_passes.fuse_epilogues import fuse_epilogues
from schedules.emit.emit import EMITTERS, Emission, emitter, out_shape

from .modules import full_range, module

TARGET = tvm.target.Target({"kind": "llvm"})
TOY = "hawq.test_mirror"


@pytest.mark.parametrize("name", OPERATORS)
def test_every_row_is_emitted_and_known_to_tvm(name: str) -> None:
    assert name in EMITTERS and tvm.ir.Op.get(name).name == name


@pytest.fixture
def mirror() -> Iterator[None]:
    """hawq.test_mirror(x, c) = c - x, element by element: what a new operator needs, and nothing else."""

    def infer(call: relax.Call, _: object) -> relax.TensorType:
        return relax.TensorType(ops.shape_of(call.args[0]), ops.dtype_of(call.args[0]))

    def interval(call: relax.Call, x: Interval, c: Interval) -> Interval:
        return Interval(c.low - x.high, c.high - x.low)

    @emitter(TOY)
    def emit(e: Emission, call: relax.Call) -> te.Tensor:
        x, c = (e.operand(a) for a in call.args)
        return te.compute(out_shape(call), lambda *i: c.at(i) - x.at(i), name="mirror")

    operators.add(Operator(TOY, Kind.ELEMENTWISE, interval), infer)
    reference._INTEGER[TOY] = lambda call, x, c: c.astype(np.int64) - x
    yield
    del OPERATORS[TOY], EMITTERS[TOY], reference._INTEGER[TOY]


def test_a_row_a_reference_and_an_emitter_are_all_that_a_new_operator_takes(mirror: None) -> None:
    """It follows the layout of the convolution before it, joins its layer, has an interval, is scheduled, and is
    exact.
    """
    w = full_range((8, 4, 3, 3), "int8")

    def body(bb: relax.BlockBuilder, params: list[relax.Expr]) -> relax.Expr:
        acc = bb.emit(relax.op.nn.conv2d(params[0], relax.const(w), out_dtype="int32"), "conv")
        constant = ops.const(np.arange(8).reshape(1, 8, 1, 1), "int32")
        return bb.emit(relax.Call(tvm.ir.Op.get(TOY), [acc, constant]), "mirror")

    made = module(body, {"x": ((1, 4, 7, 6), "int8")})
    x = full_range((1, 4, 7, 6), "int8")
    (wanted,) = reference.evaluate(made, {"x": x}).values()
    for function, stage in ((choose_layout, stages.Stage.INTEGER), (fuse_epilogues, stages.Stage.PACKED)):
        made, _ = function(made)
        stages.verify(made, stage)
    assert len([f for f in stages.private_functions(made) if "conv2d" in f and "mirror" in f]) == 1
    assert "mirror" in module_ranges(made)
    lowered, _ = schedules.lower_to_tir(made, TARGET)
    vm = relax.VirtualMachine(build.build(lowered, TARGET), tvm.cpu())
    np.testing.assert_array_equal(vm["main"](tvm.runtime.tensor(x))[0].numpy(), wanted, strict=True)
