"""What a library does, in a list: the buffers of `main` after TVM planned its memory, and the kernels that it calls,
in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.compiler.build import LOWERING
from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import StageError

MAX_ARGUMENTS = 64  # as in deploy/native/plan.h
CONSTANT = -1


@dataclass(frozen=True)
class Tensor:
    """A dense buffer: `offset` bytes into a storage, or a constant (storage -1) with its value."""

    storage: int
    offset: int
    shape: tuple[int, ...]
    dtype: str
    value: NDArray[Any] | None = field(default=None, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        """Its size."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """A kernel's name and arguments (numbers of tensors), the last `written` of which it writes."""

    name: str
    arguments: tuple[int, ...]
    written: int


@dataclass(frozen=True)
class Plan:
    """storages: their sizes in bytes.  inputs, outputs: numbers of tensors.  ranges: the least and the greatest integer
    of every input, None where any of its type will do.
    """

    storages: tuple[int, ...]
    tensors: tuple[Tensor, ...]
    calls: tuple[Call, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    ranges: tuple[tuple[int, int] | None, ...]


def lowered(tir: tvm.IRModule, target: tvm.target.Target) -> tvm.IRModule:
    """A TIR-stage module with the memory of `main` planned as the executable's is."""
    steps = LOWERING[: 1 + next(i for i, p in enumerate(LOWERING) if p.info.name == "LowerAllocTensor")]
    with target:
        return tvm.transform.Sequential(list(steps))(tir)


def make(tir: tvm.IRModule, target: tvm.target.Target) -> Plan:
    """The plan of a TIR-stage module.

    Raises StageError for a call in a float head or tail that is no kernel.
    """
    return _Reader(lowered(tir, target)["main"]).plan()


class _Reader:
    """Follows the bindings of a lowered `main` once."""

    def __init__(self, main: relax.Function) -> None:
        self.main = main
        self.storages: list[int] = []
        self.tensors: list[Tensor] = []
        self.calls: list[Call] = []
        self.places: dict[relax.Var, int] = {}  # variables of storages
        self.values: dict[relax.Var, Any] = {}  # variables of tensors and tuples of them
        self.constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}
        self.written: set[int] = set()

    def plan(self) -> Plan:
        for p in self.main.params:
            number = self._add(Tensor(len(self.storages), 0, ops.shape_of(p), ops.dtype_of(p)))
            self.storages.append(self.tensors[number].bytes)
            self.values[p] = number
            self.written.add(number)
        inputs = tuple(range(len(self.tensors)))
        for binding in stages.bindings(self.main):
            self._read(binding)
        outputs = tuple(_flat(self._value(self.main.body.body)))
        tensors, calls, ranges = tuple(self.tensors), tuple(self.calls), stages.narrow_inputs(self.main)
        return Plan(tuple(self.storages), tensors, calls, inputs, outputs, tuple(ranges))

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _read(self, binding: relax.VarBinding) -> None:
        var, value = binding.var, binding.value
        name = ops.op_name(value)
        if name == "relax.memory.alloc_storage":
            self.places[var] = len(self.storages)
            self.storages.append(int(value.args[0].values[0]))
        elif name == "relax.memory.alloc_tensor":
            storage = self.places[value.args[0]]
            self.values[var] = self._add(Tensor(storage, int(value.args[1]), ops.shape_of(var), ops.dtype_of(var)))
        elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
            self._call(value, var.name)
        elif isinstance(value, relax.Call):
            if not name.startswith("relax.memory.kill"):
                raise StageError(
                    "has no C code", where=var.name, expected="a call of a kernel", found=name or str(value.op)
                )
        else:
            self.values[var] = self._value(value)

    def _call(self, call: relax.Call, where: str) -> None:
        name = call.op.name_hint
        arguments = tuple(n for a in call.args for n in _flat(self._value(a)))
        if len(arguments) > MAX_ARGUMENTS:
            raise StageError(
                "has too many arguments for C",
                where=name or where,
                expected=f"at most {MAX_ARGUMENTS}",
                found=str(len(arguments)),
            )
        # What a kernel writes comes last, and nobody has written it before: every result has a variable of its own.
        fresh = [n for n in arguments if self.tensors[n].storage != CONSTANT and n not in self.written]
        if not fresh or tuple(fresh) != arguments[-len(fresh) :]:
            raise StageError("does not write its last arguments", where=name, found=str(arguments))
        self.written |= set(fresh)
        self.calls.append(Call(name, arguments, len(fresh)))

    def _value(self, expr: relax.Expr) -> Any:
        """The number of a tensor, or a tuple of them."""
        if isinstance(expr, relax.Var):
            return self.values[expr]
        if isinstance(expr, relax.Tuple):
            return tuple(self._value(f) for f in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._value(expr.tuple_value)[expr.index]
        if ops.is_const(expr):
            value = ops.const_value(expr)
            key = (str(value.dtype), value.shape, value.tobytes())
            if key not in self.constants:
                self.constants[key] = self._add(Tensor(CONSTANT, 0, ops.shape_of(expr), ops.dtype_of(expr), value))
            return self.constants[key]
        raise StageError("has no C code", where="main", expected="a tensor or a tuple", found=type(expr).__name__)


def _flat(value: Any) -> Iterator[int]:
    if isinstance(value, tuple):
        for v in value:
            yield from _flat(v)
    else:
        yield value
