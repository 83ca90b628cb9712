"""Tables: every entry is the real function rounded once; what is linear, or has two inputs, is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core.arith import QType
from hawq_tvm.core.errors import ModelError
from relay_passes.remove_dead_code import remove_dead_code
from relay_passes.tabulate_unary import tabulate_unary

from .modules import S8, U8, dq, module, op_names, q, same_values

S16 = QType.of("int16")
FUNCTIONS: dict[str, Any] = {
    "sigmoid": lambda bb, x: relax.op.sigmoid(x),
    "tanh": lambda bb, x: relax.op.tanh(x),
    "gelu": lambda bb, x: relax.op.nn.gelu(x),
    "silu_in_pieces": lambda bb, x: relax.op.multiply(x, bb.emit(relax.op.sigmoid(x))),
    "hard_swish_in_pieces": lambda bb, x: relax.op.multiply(
        x,
        bb.emit(
            relax.op.clip(
                bb.emit(
                    relax.op.add(
                        bb.emit(relax.op.multiply(x, relax.const(np.float32(1 / 6)))), relax.const(np.float32(0.5))
                    )
                ),
                0,
                1,
            )
        ),
    ),
    "erf_of_half": lambda bb, x: relax.op.erf(bb.emit(relax.op.multiply(x, relax.const(np.float32(0.5))))),
    "exp_negative_square": lambda bb, x: relax.op.exp(bb.emit(relax.op.negative(bb.emit(relax.op.square(x))))),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("kind, zero", [(U8, 131), (S8, -7)])
def test_functions(function: str, kind: QType, zero: int) -> None:
    def build(bb: relax.BlockBuilder, p: list[relax.Expr]) -> Any:
        return q(bb, bb.emit(FUNCTIONS[function](bb, dq(bb, p[0], 0.0317, zero, kind))), 0.0127, 17, kind)

    before = module(build, {"x": ((4, 96), kind.storage)})
    after, count = tabulate_unary(before)
    after, _ = remove_dead_code(after)
    assert count == 1 and op_names(after) == ["lookup", ""] and len(before["main"].params) == 1
    same_values(before, after, runs=4)


def test_sixteen_bits_have_a_table_of_65536() -> None:
    before = module(
        lambda bb, p: q(bb, bb.emit(relax.op.tanh(dq(bb, p[0], 2.0**-12, 5, S16))), 0.00005, 0, S16),
        {"x": ((64, 64), "int16")},
    )
    after, count = tabulate_unary(before)
    assert count == 1
    same_values(before, after)


@pytest.mark.parametrize(
    "make",
    [
        lambda bb, p: relax.op.nn.relu(dq(bb, p[0], 0.1, 3)),
        lambda bb, p: relax.op.multiply(dq(bb, p[0], 0.1, 3), relax.const(np.float32(0.7))),
        lambda bb, p: relax.op.multiply(dq(bb, p[0], 0.1, 3), dq(bb, p[1], 0.1, 3)),
        lambda bb, p: relax.op.sigmoid(bb.emit(relax.op.add(dq(bb, p[0], 0.1, 3), dq(bb, p[1], 0.1, 3)))),
        lambda bb, p: relax.op.sigmoid(dq(bb, p[0], np.full((1, 3), 0.1), 3)),
    ],
)
def test_what_is_left_alone(make: Any) -> None:
    before = module(lambda bb, p: q(bb, bb.emit(make(bb, p)), 0.2, 3), {"x": ((2, 3), "uint8"), "y": ((2, 3), "uint8")})
    after, count = tabulate_unary(before)
    assert count == 0 and op_names(after) == op_names(before)


def test_a_function_that_is_no_number_is_refused() -> None:
    before = module(
        lambda bb, p: q(bb, bb.emit(relax.op.log(dq(bb, p[0], 0.1, 3))), 0.2, 3, name="the_log"),
        {"x": ((2, 3), "uint8")},
    )
    with pytest.raises(ModelError, match=r"the_log: .*not a number.*NaN at x = "):
        tabulate_unary(before)
