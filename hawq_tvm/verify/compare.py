"""Exact comparison of a compiled library with the reference, layer by layer; the first difference is explained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from ..errors import HawqError
from .reference import evaluate, evaluate_call

Array = NDArray[Any]
RunLayers = Callable[[Mapping[str, Array]], tuple[dict[str, Array], list[Array]]]


class MismatchError(HawqError):
    """A compiled layer computed something else than the reference."""

    exit_code = 1


@dataclass(frozen=True)
class Difference:
    """The first element in which a layer differs; accumulator is the value before the layer's last requantize."""

    layer: str
    index: tuple[int, ...]
    accumulator: list[int]
    expected: float | int
    found: float | int
    reason: str = ""

    def __str__(self) -> str:
        if self.reason:
            return f"layer {self.layer}: {self.reason}"
        return (
            f"layer {self.layer}, index {list(self.index)}, accumulator {self.accumulator or 'none'}: "
            f"expected {self.expected}, found {self.found}"
        )


@dataclass(frozen=True)
class LayerRow:
    """One compared layer: how many elements, and how many of them differ."""

    layer: str
    elements: int
    different: int


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of every layer over all inputs."""

    rows: tuple[LayerRow, ...]
    inputs: int
    first: Difference | None = None

    @property
    def ok(self) -> bool:
        """Whether every element of every layer is equal."""
        return self.first is None

    @property
    def elements(self) -> int:
        """How many elements were compared."""
        return sum(r.elements for r in self.rows)

    def summary(self) -> str:
        """The verdict in one line."""
        if self.first is None:
            return f"bit-exact: {len(self.rows)} layers, {self.elements} elements over {self.inputs} inputs, 0 different"
        return f"NOT bit-exact: {sum(r.different for r in self.rows)} of {self.elements} elements differ; first: {self.first}"

    def raise_if_mismatch(self) -> None:
        """Raise MismatchError with the first difference, if there is one."""
        if self.first is not None:
            raise MismatchError(self.summary())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        first = None if self.first is None else {**self.first.__dict__, "index": list(self.first.index)}
        return {
            "ok": self.ok, "summary": self.summary(), "inputs": self.inputs, "elements": self.elements,
            "layers": [r.__dict__ for r in self.rows], "first_difference": first,
        }  # fmt: skip


def layer_calls(module: tvm.IRModule) -> list[relax.VarBinding]:
    """The bindings of a PACKED main that call a layer function, in order: the compiled library calls one kernel each."""
    return [
        b
        for block in module["main"].body.blocks
        for b in block.bindings
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)
    ]


def run_with_layers(
    vm: relax.VirtualMachine, module: tvm.IRModule, inputs: Mapping[str, Array], kernels: set[str]
) -> tuple[dict[str, Array], list[Array]]:
    """Run a virtual machine once; its outputs by name, and a copy of what each kernel wrote, in order.

    module: the PACKED (or TIR) module, for the names and order of inputs and outputs.  kernels: the names of the PrimFuncs.
    """
    main = module["main"]
    written: list[Array] = []
    # A kernel writes its results last; how many there are is in the type of the layer's variable.
    counts = [len(b.var.ty.fields) if isinstance(b.var.ty, relax.TupleType) else 1 for b in layer_calls(module)]

    def observe(func: Any, symbol: str, before: bool, ret: Any, *args: Any) -> None:
        del func, ret
        if not before and symbol in kernels:
            n = counts[observe.calls]  # type: ignore[attr-defined]
            observe.calls += 1  # type: ignore[attr-defined]
            values = tuple(a.numpy() for a in args[-n:])
            written.append(values[0] if n == 1 else values)  # type: ignore[arg-type]

    observe.calls = 0  # type: ignore[attr-defined]
    vm.set_instrument(observe)
    try:
        result = vm["main"](*(tvm.runtime.tensor(np.ascontiguousarray(inputs[p.name])) for p in main.params))
    finally:
        vm.set_instrument(_ignore)
    names = [str(n) for n in (main.attrs or {}).get("hawq.output_names", [])]
    outputs = {n: result[i].numpy() for i, n in enumerate(names)}
    return outputs, written


def _ignore(*_: Any) -> None:
    return None


def verify_executable(module: tvm.IRModule, run_layers: RunLayers, batches: list[Mapping[str, Array]]) -> VerifyReport:
    """Compare what a compiled library computes with the reference's evaluation of `module` (PACKED), for every input.

    run_layers: runs the library once and returns (outputs by name, values written by each layer in order).
    """
    calls = layer_calls(module)
    tally: dict[str, list[int]] = {}
    first: Difference | None = None
    for inputs in batches:
        known: dict[str, Any] = {}
        wanted_outputs = evaluate(module, inputs, known.__setitem__)
        outputs, written = run_layers(inputs)
        if len(written) != len(calls):
            raise MismatchError(f"the library ran {len(written)} layers where the graph has {len(calls)}")
        for binding, found in zip(calls, written, strict=True):
            name = binding.var.name
            expected = known[name]
            for want, got in zip(_fields(expected), _fields(found), strict=True):
                different = _count(tally, name, want, got)
                if different and first is None:
                    first = _explain(module, binding, known | dict(inputs), want, got)
        for name, want in wanted_outputs.items():
            different = _count(tally, f"output {name}", want, outputs[name])
            if different and first is None:
                first = _difference(f"output {name}", want, outputs[name], [])
    rows = tuple(LayerRow(name, elements, different) for name, (elements, different) in tally.items())
    return VerifyReport(rows, len(batches), first)


def _fields(value: Any) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


def _unequal(want: Array, got: Array) -> Array:
    """Where two arrays differ; NaN equals NaN, since both sides compute the same float operation at the border."""
    return ~((want == got) | ((want != want) & (got != got)))


def _count(tally: dict[str, list[int]], name: str, want: Array, got: Array) -> int:
    same_type = want.dtype == got.dtype and want.shape == got.shape
    different = int(_unequal(want, got).sum()) if same_type else int(want.size or 1)
    row = tally.setdefault(name, [0, 0])
    row[0] += int(want.size)
    row[1] += different
    return different


def _difference(layer: str, want: Array, got: Array, accumulator: list[int]) -> Difference:
    if want.dtype != got.dtype or want.shape != got.shape:
        reason = f"expected {want.dtype}{list(want.shape)}, found {got.dtype}{list(got.shape)}"
        return Difference(layer, (), [], 0, 0, reason)
    index = tuple(int(i) for i in np.argwhere(_unequal(want, got))[0])
    return Difference(layer, index, accumulator, want[index].item(), got[index].item())


def _explain(module: tvm.IRModule, binding: relax.VarBinding, known: Mapping[str, Any], want: Array, got: Array) -> Difference:
    plain = _difference(binding.var.name, want, got, [])
    if plain.reason:
        return plain
    return _difference(binding.var.name, want, got, _accumulator(module[binding.value.op], binding.value, known, plain.index))


def _accumulator(func: relax.Function, call: relax.Call, known: Mapping[str, Any], index: tuple[int, ...]) -> list[int]:
    """The operands of the layer's last requantize at `index`, from the reference."""
    env: dict[relax.Var, Any] = {p: known[a.name] for p, a in zip(func.params, call.args, strict=True)}

    def value(expr: relax.Expr) -> Any:
        if isinstance(expr, relax.Var):
            return env[expr]
        if isinstance(expr, tvm.ir.GenericConst):
            return expr.value.numpy()
        if isinstance(expr, relax.Tuple):
            return tuple(value(f) for f in expr.fields)
        return expr

    operands: list[int] = []
    for block in func.body.blocks:
        for b in block.bindings:
            if not isinstance(b.value, relax.Call):
                env[b.var] = value(b.value)
                continue
            args = [value(a) for a in b.value.args]
            if b.value.op.name == "hawq.requantize":
                shape = tuple(int(d) for d in b.var.ty.shape.values)
                operands = [int(np.broadcast_to(x, shape)[index]) for x in args[0]] if len(shape) == len(index) else []
            env[b.var] = evaluate_call(b.value, args)
    return operands
