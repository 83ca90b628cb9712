"""What an ANNOTATED module is made of, as the comparison with simulated quantization reads it: weighted layers,
quantized tensors, residual sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.verify.compare import value_of
from hawq_tvm.verify.reference import evaluate_call

Array = np.ndarray[Any, Any]
WEIGHTED = ("relax.nn.conv2d", "relax.nn.conv2d_transpose", "relax.matmul")
CLAMPS = ("relax.nn.relu", "relax.clip", "relax.maximum", "relax.minimum")


@dataclass(frozen=True)
class Grid:
    """The integers qmin .. qmax, standing for (q - zero) scale (A1); scale broadcasts against the tensor."""

    scale: Array
    zero: int
    qmin: int
    qmax: int

    @staticmethod
    def of(call: relax.Call) -> Grid:
        """The grid of a hawq.quantize or hawq.dequantize of a tensor."""
        scale, zero = (ops.const_value(a) for a in call.args[1:3])
        return Grid(
            scale.astype(np.float64), int(zero.reshape(-1)[0]), int(call.attrs["qmin"]), int(call.attrs["qmax"])
        )

    @property
    def bits(self) -> int:
        """How many bits hold the range."""
        return max((self.qmax - self.qmin).bit_length(), 1)

    def real(self, q: Array) -> Array:
        """What integers stand for, in float64."""
        return (q.astype(np.float64) - self.zero) * self.scale


@dataclass(frozen=True)
class Weighted:
    """A convolution or matrix product with constant weights.

    weight: in float32, output channels first.  weight_bits: None where the weights are float.  reads: the quantize
    whose integers it reads, as they are or moved, and grid: theirs; None where it reads floats.
    """

    name: str
    weight: Array
    weight_bits: int | None
    reads: str | None
    grid: Grid | None


@dataclass(frozen=True)
class Sum:
    """An addition of two tensors that become one tensor of integers.

    sources: the weighted layers (by number) and inputs (-1 - number) from which its operands come without another
    layer between.
    clamps: what lies between the addition and the quantize, in order.
    """

    sources: frozenset[int]
    clamps: tuple[relax.Call, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor of integers: the quantize that makes it, its grid, and the residual sum that it holds, if it does."""

    name: str
    call: relax.Call
    grid: Grid
    sum: Sum | None


class Structure:
    """weighted: by order of execution.  tensors: the results of quantizes that depend on an input, by the name of
    the quantize.
    """

    def __init__(self, annotated: tvm.IRModule) -> None:
        main = annotated["main"]
        self.makers: dict[relax.Var, relax.Expr] = {b.var: b.value for b in stages.bindings(main)}
        self.sources: dict[relax.Var, frozenset[int]] = {p: frozenset([-1 - i]) for i, p in enumerate(main.params)}
        self.constants: dict[relax.Var, Any] = {}
        self.weighted: list[Weighted] = []
        self.tensors: dict[str, Tensor] = {}
        for b in stages.bindings(main):
            self._visit(b)

    def _visit(self, b: relax.VarBinding) -> None:
        read = [v for v in ops.variables(b.value) if v in self.sources]
        if not read:
            self.constants[b.var] = value_of(b.value, self.constants)
            return
        self.sources[b.var] = frozenset().union(*(self.sources[v] for v in read))
        name = ops.op_name(b.value)
        if name in WEIGHTED and b.value.args[0] in self.sources and not self._varies(b.value.args[1]):
            self.sources[b.var] = frozenset([len(self.weighted)])
            self.weighted.append(self._weighted(b))
        elif name == "hawq.quantize":
            self.tensors[b.var.name] = Tensor(b.var.name, b.value, Grid.of(b.value), self._sum(b.value.args[0]))

    def _varies(self, expr: relax.Expr) -> bool:
        return any(v in self.sources for v in ops.variables(expr))

    def _weighted(self, b: relax.VarBinding) -> Weighted:
        weight = value_of(b.value.args[1], self.constants).astype(np.float32)
        axis = {"relax.nn.conv2d": 0, "relax.nn.conv2d_transpose": 1}.get(ops.op_name(b.value), weight.ndim - 1)
        made = self._dequantize(b.value.args[1])
        read = self._dequantize(b.value.args[0])
        source = None if read is None or not isinstance(read.args[0], relax.Var) else read.args[0].name
        return Weighted(
            b.var.name,
            np.moveaxis(weight, axis, 0),
            None if made is None else Grid.of(made).bits,
            source,
            None if read is None else Grid.of(read),
        )

    def _dequantize(self, expr: relax.Expr) -> relax.Call | None:
        """The dequantize that a tensor comes from, through operators with one tensor operand that move values only."""
        while isinstance(expr, relax.Var) and expr in self.makers:
            call = self.makers[expr]
            if ops.op_name(call) == "hawq.dequantize":
                return call
            moved = ops.op_name(call) in (
                "relax.reshape",
                "relax.permute_dims",
                "relax.flatten",
                "relax.squeeze",
                "relax.expand_dims",
                "relax.nn.pad",
            )
            expr = call.args[0] if moved else call if isinstance(call, relax.Var) else None
        return None

    def _sum(self, expr: relax.Expr) -> Sum | None:
        """The residual sum that is quantized: of two tensors that do not come from the same layers, as those inside
        an activation do.
        """
        clamps: list[relax.Call] = []
        while isinstance(expr, relax.Var) and ops.op_name(self.makers.get(expr)) in CLAMPS:
            clamps.insert(0, self.makers[expr])
            expr = next(a for a in clamps[0].args if isinstance(a, relax.Var) and a in self.sources)
        call = self.makers.get(expr) if isinstance(expr, relax.Var) else None
        if (
            call is None
            or ops.op_name(call) != "relax.add"
            or not all(isinstance(a, relax.Var) and a in self.sources for a in call.args)
        ):
            return None
        one, two = (self.sources[a] for a in call.args)
        return Sum(one | two, tuple(clamps)) if one != two else None

    def applied(self, chain: tuple[relax.Call, ...], value: Array) -> Array:
        """A chain of operators with one varying operand each, on another value of the first one's."""
        for call in chain:
            value = evaluate_call(
                call,
                [
                    value if isinstance(a, relax.Var) and a in self.sources else value_of(a, self.constants)
                    for a in call.args
                ],
            )
        return value
