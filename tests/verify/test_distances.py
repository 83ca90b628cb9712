"""How far a tensor is from the real formula, operator by operator; none counts as exact that has no rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tvm import relax

from hawq_tvm.core import ops
from hawq_tvm.core.arith import QType
from hawq_tvm.core.division import divide
from hawq_tvm.core.errors import ModelError, StageError
from hawq_tvm.core.operators import OPERATORS, Kind
from hawq_tvm.verify import distances as walked
from hawq_tvm.verify.distances import distances

from .graphs_for_verify import graph


def near(emit: Any, x: relax.Expr, kind: str = "int32") -> relax.Expr:
    """A fixed-point value (A26) that is off by 3/4."""
    bits = QType.of(kind)
    return emit(ops.requantize([x], [1], 0, 0, qtype=bits, zero_point=0, rounding="half_up", bound=0.25), "near")


def ended(emit: Any, x: relax.Expr) -> relax.Expr:
    """A quantize that divides by 4."""
    four = emit(relax.op.astype(x, "int32"))
    return ops.requantize([four], [1], 0, 2, qtype=QType.of("int8"), zero_point=0, rounding="half_up", thresholds=-1)


def distance(make: Any) -> float:
    mod = graph(lambda emit, x: emit(ended(emit, emit(make(emit, near(emit, x)))), "last"), ((4, 6), "int8"))
    return distances(mod)["last"]


def test_rules() -> None:
    # What is lost by the last requantize itself: half a unit of its offset, and nothing of its multiplier of 1.
    own = 0.5 / 4
    assert distance(lambda emit, x: x) == 0.75 / 4 + own
    assert distance(lambda emit, x: relax.op.maximum(x, x)) == 0.75 / 4 + own
    assert distance(lambda emit, x: relax.op.flip(x, 1)) == 0.75 / 4 + own
    assert distance(lambda emit, x: relax.op.add(x, x)) == 1.5 / 4 + own
    assert distance(lambda emit, x: relax.op.sum(x, [1], keepdims=True)) == 6 * 0.75 / 4 + own


def test_quotients() -> None:
    """(A32d), where results lie up to 10 from their zero point, divisors 32 or more from 0, and both are off by 3/4."""

    def made(emit: Any, x: relax.Expr, least: int = 32, apart: float = 0.0) -> relax.Expr:
        b = emit(relax.op.clip(near(emit, x), least, 100))
        numbers = {"qtype": QType(-10, 4, "int8"), "zero_point": 0, "rounding": "half_even", "undefined": -10}
        return emit(divide(near(emit, x), b, 3, 2, apart=apart, **numbers), "last")

    def found(body: Any) -> float:
        return distances(graph(body, ((4, 6), "int8"))).get("last", 0.0)

    assert found(made) == (1.5 * 0.75 + 11 * 0.75) / (32 - 0.75)
    with pytest.raises(ModelError, match="no bound on its distance"):
        found(lambda emit, x: made(emit, x, least=0))
    apart = found(lambda emit, x: made(emit, x, apart=0.25))
    assert apart == 1.25 * ((1.5 * 0.75 + 11 * 0.75) / (32 - 0.75)) + 11 * 0.25


def test_a_decision_has_no_distance() -> None:
    mod = graph(lambda emit, x: emit(relax.op.greater(near(emit, x), ops.const(3, "int32")), "last"), ((4, 6), "int8"))
    assert distances(mod) == {}


def test_an_operator_without_a_rule_is_no_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walked, "_PASSING", frozenset())
    with pytest.raises(StageError, match=r"no rule for how far.*relax\.maximum"):
        distance(lambda emit, x: relax.op.maximum(x, x))


def test_every_operator_has_a_rule() -> None:
    """Those that the walk names itself, and what passes on or decides."""
    named = {
        *(
            "hawq.divide",
            "hawq.requantize",
            "hawq.lookup",
            "hawq.interpolate",
            "hawq.softmax",
            "hawq.softmax_wide",
            "hawq.layer_norm",
        ),
        *("hawq.i_erf", "hawq.i_gelu", "hawq.i_softmax", "hawq.i_layer_norm", "hawq.sum_pool2d", "relax.sum"),
        *("relax.add", "relax.subtract", "relax.multiply", "relax.nn.conv2d", "relax.matmul"),
    }
    rest = {n for n, row in OPERATORS.items() if row.kind not in (Kind.MOVEMENT, Kind.BORDER)}
    assert rest == named | walked._PASSING | walked._DECIDING


def test_an_exact_table_of_near_integers_is_as_far_as_its_steps() -> None:
    exponents, table = np.array([1 << 30, 1 << 29], np.int32), (np.arange(1 << 16) // 100).astype(np.int16)

    def made(emit: Any, x: relax.Expr) -> relax.Expr:
        two = emit(relax.op.clip(x, 0, 1))
        numbers = {"axis": 1, "multiplier": 32767, "shift": 0, "qtype": QType(0, 32767, "int16"), "zero_point": 0}
        p = emit(ops.softmax(two, exponents, **numbers, fixed=True))
        return emit(ops.lookup(p, table), "last")

    # Within 1/2 and a little of an integer, so one of two neighbours or the next.
    assert distances(graph(made, ((4, 6), "int8"))) == {"last": 6.0}
