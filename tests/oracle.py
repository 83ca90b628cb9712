"""Other runtimes as oracles: they compute in float32, so they may land on the other side of a rounding boundary.

A difference counts as explained when it is one step and the exact real value lies within float32's reach of the
boundary; anything else fails.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.verify.reference import evaluate_call
from relay_passes.choose_layout import choose_layout


def integer_module(module: tvm.IRModule) -> tvm.IRModule:
    """The module after the passes that make its arithmetic, before those that change layouts."""
    return pipeline.until(module, choose_layout)


FLOAT32, FLOAT16 = 2.0**-18, 2.0**-8


def explained(
    real_steps: np.ndarray, ours: np.ndarray, theirs: np.ndarray, more: Any = 0.0, unit: float = FLOAT32
) -> np.ndarray:
    """Where a one-step difference sits on a rounding boundary, as far as float32 (or float16) can tell.

    The reach: float32 holds 24 bits, an accumulation and three multiplications lose a few units of the last place of
    the value, and of the sum's largest partial result, which a float path may keep 2^6 times larger; float16 holds 11
    bits.  more: steps that are known to be lost besides.  unit: the reach, relative to the value.
    """
    boundary = np.abs(real_steps - np.floor(real_steps) - 0.5)
    reach = unit * np.maximum(np.abs(real_steps), 1) + more
    return (np.abs(ours.astype(np.int64) - theirs.astype(np.int64)) == 1) & (boundary <= reach)


class Oracle:
    """Evaluates an ANNOTATED module layer by layer on another runtime's own integers, so that no difference propagates.

    theirs: the integers of every quantize by its layer.  rows: elements, differences and unexplained ones by layer.
    real: what was rounded, in steps, by layer.  unit: what their arithmetic loses.
    """

    def __init__(self, module: tvm.IRModule, theirs: dict[str, np.ndarray], unit: float = FLOAT32) -> None:
        self.main, self.theirs, self.unit = module["main"], theirs, unit
        self.rows: dict[str, tuple[int, int, int]] = {}
        self.real: dict[str, np.ndarray] = {}
        self.env: dict[Any, Any] = {}

    def value(self, expr: Any) -> Any:
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if ops.is_const(expr):
            return ops.const_value(expr)
        if isinstance(expr, relax.Tuple):
            return tuple(self.value(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self.value(expr.tuple_value)[expr.index]
        return evaluate_call(expr, [self.value(a) for a in expr.args]) if isinstance(expr, relax.Call) else expr

    def run(self, inputs: dict[str, np.ndarray]) -> None:
        self.env.update({p: inputs[p.name] for p in self.main.params})
        for b in stages.bindings(self.main):
            self.env[b.var] = self.value(b.value)
            if self.compares(b):
                self.compare(b)

    def compares(self, b: relax.VarBinding) -> bool:
        return ops.op_name(b.value) == "hawq.quantize" and b.var.name in self.theirs

    def compare(self, b: relax.VarBinding) -> None:
        name = b.var.name
        ours, theirs = self.env[b.var], self.theirs[name].astype(self.env[b.var].dtype)
        real = self.steps(b)
        different = ours != theirs
        fine = explained(real, ours, theirs, unit=self.unit)
        self.real[name] = real
        self.rows[name] = (ours.size, int(different.sum()), int((different & ~fine).sum()))
        self.env[b.var] = theirs

    def steps(self, b: relax.VarBinding) -> np.ndarray:
        return np.asarray(self.value(b.value.args[0]), np.float64) / ops.const_value(b.value.args[1]).astype(np.float64)

    def total(self) -> tuple[int, int, int]:
        elements, different, unexplained = (sum(r[i] for r in self.rows.values()) for i in range(3))
        return elements, different, unexplained


class IntegerOracle(Oracle):
    """The same for the INTEGER module: every layer computed in integers from the other runtime's own.

    real: the oracle of the ANNOTATED module, after its run.
    """

    def __init__(self, module: tvm.IRModule, real: Oracle) -> None:
        super().__init__(module, real.theirs, real.unit)
        self.given = real.real

    def compares(self, b: relax.VarBinding) -> bool:
        return b.var.name in self.given and not stages.is_float(b.var)

    def steps(self, b: relax.VarBinding) -> np.ndarray:
        return self.given[b.var.name]
