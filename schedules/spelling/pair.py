"""Tensor intrinsics as pairs: what each means, in loops over its operands, and how it is spelled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T


@dataclass(frozen=True)
class Operand:
    """A buffer of an intrinsic; free: so many of its first strides may be any, the others are those of its shape."""

    shape: tuple[int, ...]
    dtype: str
    scope: str = "global"
    free: int = 0

    def declared(self, name: str) -> Any:
        """The buffer as a parameter of the function that is being built."""
        strides = [prod(self.shape[i + 1 :]) for i in range(len(self.shape))] if self.free else []
        strides[: self.free] = [tirx.Var("stride", "int32") for _ in range(self.free)]
        return T.arg(name, T.buffer(self.shape, self.dtype, strides=strides, offset_factor=1, scope=self.scope))

    def region(self, buffer: Any) -> Any:
        """All of it."""
        return buffer[tuple(slice(0, n) for n in self.shape)]


def register(
    name: str,
    operands: Sequence[Operand],
    loops: Sequence[tuple[int, str]],
    value: Callable[..., Any],
    spelled: Callable[..., Any] | None,
    *,
    adds: bool = True,
    hints: Callable[..., Sequence[Any]] = lambda *_: (),
) -> str:
    """Register the tensor intrinsic result[s] += value, and return its name.

    operands: in the order in which the kernels read them, the result last.  loops: from the outermost, each with its
    length and "S" (an index of the result) or "R" (summed over).  value: what is added at the operands, then the
    variables of the "S" loops, then of the "R" loops.  adds: False stores the value instead.
    spelled: gives for the operands the call that does all this, or a list of vectors, which are stored one after
    another, or each as a row of a result of two dimensions; None repeats the meaning, for another machine than the one
    that it is spelled for.
    hints: for the operands, calls without an effect on results that go before.
    """

    def function(body: Callable[[Sequence[Any]], None]) -> tirx.PrimFunc:
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            buffers = [o.declared(f"x{i}") for i, o in enumerate(operands)]
            with T.sblock("root"):
                *read, result = [o.region(b) for o, b in zip(operands, buffers, strict=True)]
                T.reads(*([result] if adds else []), *read)
                T.writes(result)
                body(buffers)
        return builder.get()

    def meaning(buffers: Sequence[Any]) -> None:
        with T.grid(*(n for n, _ in loops)) as variables, T.sblock("step"):
            turns = list(zip(loops, variables if len(loops) > 1 else [variables], strict=True))
            axes = {
                kind: [(T.axis.spatial if kind == "S" else T.axis.reduce)(n, v) for (n, k), v in turns if k == kind]
                for kind in "SR"
            }
            result, at = buffers[-1], axes["S"]
            new = value(*buffers[:-1], *at, *axes["R"])
            T.buffer_store(result, result[tuple(at)] + new if adds else new, at)

    def spelling(buffers: Sequence[Any]) -> None:
        made = spelled(*buffers) if spelled else None
        if made is None:
            meaning(buffers)
        elif isinstance(made, list):
            for hint in hints(*buffers):
                T.evaluate(hint)
            *rows, size = operands[-1].shape
            lanes = size if rows else size // len(made)
            for i, vector in enumerate(made):
                at = [i, T.ramp(0, 1, lanes)] if rows else [T.ramp(i * lanes, 1, lanes)]
                T.buffer_store(buffers[-1], vector, at)
        else:
            for hint in hints(*buffers):
                T.evaluate(hint)
            T.evaluate(made)

    s_tir.TensorIntrin.register(name, function(meaning), function(spelling), override=True)
    return name


def prefetch(element: tirx.Expr, writes: int, second: bool = False) -> tirx.Expr:
    """The cache line of an element into the first cache, or the second, to be read or to be written."""
    flags = [tirx.const(n, "int32") for n in (writes, 2 if second else 3, 1)]
    return tirx.call_llvm_intrin("void", "llvm.prefetch", tirx.address_of(element), *flags)
