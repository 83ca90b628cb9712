"""A normalization written out as its steps becomes the operator that it is (ANNOTATED -> ANNOTATED).

With d = x - mean(x) over some axes, or d = x for RMSNorm, and v = mean(d d) over the same axes, each of
    d / sqrt(v + epsilon),  d (1 / sqrt(v + epsilon)),  d rsqrt(v + epsilon),  d (v + epsilon)^-1/2
becomes relax.nn.layer_norm (or rms_norm) without scale and bias: what multiplies it and is added afterwards stays, and
the lowering takes constants into the scale of its integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.rewriter import Rebuild, rewrite_main


def match_normalization(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with every written-out normalization as one operator, and how many there were."""
    graph = _Graph({b.var: b.value for b in stages.bindings(module["main"])})
    count = 0

    def visit(rebuild: Rebuild, binding: relax.VarBinding, value: relax.Expr) -> relax.Expr | None:
        nonlocal count
        found = graph.normalization(binding.value)
        if found is None:
            return None
        x, axes, epsilon, centered = found
        count += 1
        ones = relax.const(np.ones([ops.shape_of(x)[a] for a in axes], np.float32))
        if not centered:
            return relax.op.nn.rms_norm(rebuild.map(x), ones, axes, epsilon)
        return relax.op.nn.layer_norm(rebuild.map(x), ones, ones, axes, epsilon, center=False, scale=False)

    return rewrite_main(module, visit), count


Found = tuple[relax.Expr, list[int], float, bool]


class _Graph:
    """What every variable of `main` stands for."""

    def __init__(self, values: dict[relax.Var, relax.Expr]) -> None:
        self.values = values

    def call(self, expr: relax.Expr, *names: str) -> Any:
        """The call that `expr` stands for where it is one of these operators, else None."""
        value = self.values.get(expr, expr) if isinstance(expr, relax.Var) else expr
        return value if ops.op_name(value) in names else None

    def number(self, expr: relax.Expr) -> float | None:
        """The only number of a float constant."""
        value = self.values.get(expr, expr) if isinstance(expr, relax.Var) else expr
        if not ops.is_const(value) or ops.const_value(value).size != 1 or not stages.is_float(value):
            return None
        return float(ops.const_value(value).reshape(-1)[0])

    def normalization(self, expr: relax.Expr) -> Found | None:
        """The data, the axes, epsilon, and whether the mean is taken away, where `expr` is the last step of one."""
        call = self.call(expr, "relax.divide", "relax.multiply")
        if call is None or not isinstance(expr, relax.Call):
            return None
        for d, factor in [tuple(call.args), tuple(call.args)[::-1]][: 1 + (ops.op_name(call) == "relax.multiply")]:
            variance = self._under_root(factor, inverse=ops.op_name(call) == "relax.multiply")
            found = None if variance is None else self._centered(d, *variance)
            if found is not None and ops.shape_of(found[0]) == ops.shape_of(call):
                return found
        return None

    def _under_root(self, expr: relax.Expr, inverse: bool) -> tuple[relax.Expr, float] | None:
        """v and epsilon where `expr` is the root of v + epsilon, or the inverse of it."""
        if inverse:
            quotient = self.call(expr, "relax.divide")
            if quotient is not None and self.number(quotient.args[0]) == 1.0:
                return self._under_root(quotient.args[1], inverse=False)
        root = self.call(expr, "relax.rsqrt" if inverse else "relax.sqrt")
        power = self.call(expr, "relax.power")
        if root is None and power is not None and self.number(power.args[1]) == (-0.5 if inverse else 0.5):
            root = power
        total = None if root is None else self.call(root.args[0], "relax.add")
        if total is None:
            return None
        for v, epsilon in (tuple(total.args), tuple(total.args)[::-1]):
            number = self.number(epsilon)
            if number is not None and number >= 0:
                return v, number
        return None

    def _centered(self, d: relax.Expr, variance: relax.Expr, epsilon: float) -> Found | None:
        """A normalization where `variance` is the mean of the squares of `d`, with or without its own mean."""
        mean = self.call(variance, "relax.mean")
        square = None if mean is None else self._squared(mean.args[0])
        if square is None or not bool(mean.attrs.keepdims) or not self._same(square, d):
            return None
        axes = self._axes(mean)
        difference = self.call(d, "relax.subtract")
        if difference is not None:
            x, average = difference.args[0], self.call(difference.args[1], "relax.mean")
            if (
                average is not None
                and self._same(average.args[0], x)
                and self._axes(average) == axes
                and bool(average.attrs.keepdims)
            ):
                return x, axes, epsilon, True
        return d, axes, epsilon, False

    def _squared(self, expr: relax.Expr) -> relax.Expr | None:
        call = self.call(expr, "relax.power", "relax.multiply", "relax.square")
        if call is None:
            return None
        name = ops.op_name(call)
        if name == "relax.power":
            return call.args[0] if self.number(call.args[1]) == 2.0 else None
        return call.args[0] if name == "relax.square" or self._same(*call.args) else None

    def _same(self, a: relax.Expr, b: relax.Expr, steps: int = 2) -> bool:
        """Whether two expressions are one tensor: one variable, or what at most two equal steps (a mean, a difference
        from it) make of the same one.
        """
        if isinstance(a, relax.Var) and isinstance(b, relax.Var) and a.same_as(b):
            return True
        if steps == 0:
            return False
        first, second = (self.call(e, "relax.subtract", "relax.mean") for e in (a, b))
        if first is None or second is None or ops.op_name(first) != ops.op_name(second):
            return False
        if ops.op_name(first) == "relax.mean" and (
            self._axes(first) != self._axes(second) or bool(first.attrs.keepdims) != bool(second.attrs.keepdims)
        ):
            return False
        return all(self._same(x, y, steps - 1) for x, y in zip(first.args, second.args, strict=True))

    @staticmethod
    def _axes(mean: relax.Call) -> list[int]:
        rank = len(ops.shape_of(mean.args[0]))
        return list(range(rank)) if mean.attrs.axis is None else sorted(int(a) % rank for a in mean.attrs.axis)
