"""Exact comparison of a compiled library with the reference, layer by layer; the first difference is explained.

A float head or tail, where a user allowed one, computes in float32 with the library's own functions and is no part
of the
comparison: what the head feeds into the integer region is taken from the library, and what the tail makes of it is
listed as not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import HawqError
from hawq_tvm.core.operators import Kind, kind_of

from .instrument import watched
from .records import Record, Run, inputs_text
from .reference import evaluate, evaluate_call

Array = NDArray[Any]
Value = Array | tuple[Array, ...]


class MismatchError(HawqError):
    """A compiled layer computed something else than the reference."""

    exit_code = 1


@dataclass(frozen=True)
class LayerRun:
    """One run of a compiled library.

    outputs: the graph's outputs by name.  layers: what each layer function wrote, in order.  head: what a float head
    fed to them, by variable name.
    """

    outputs: dict[str, Array]
    layers: list[Value]
    head: dict[str, Array] = field(default_factory=dict)


RunLayers = Callable[[Mapping[str, Array]], LayerRun]


@dataclass(frozen=True)
class Difference:
    """The first element in which a layer differs; accumulator is the value before the layer's last requantize.

    reason: instead of an element, why nothing could be compared (another type or shape).
    """

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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**asdict(self), "index": list(self.index)}


@dataclass(frozen=True)
class LayerRow:
    """One compared layer over all inputs: its elements, how many differ, and the first that does."""

    layer: str
    elements: int
    different: int
    first: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {**asdict(self), "first": None if self.first is None else self.first.to_dict()}


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of every layer over all inputs; first is the first difference in order of execution."""

    rows: tuple[LayerRow, ...]
    inputs: int
    first: Difference | None = None
    not_compared: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every element of every layer is equal, and any was compared at all."""
        return self.first is None and self.inputs > 0 and self.elements > 0

    @property
    def elements(self) -> int:
        """How many elements were compared."""
        return sum(r.elements for r in self.rows)

    def summary(self) -> str:
        """The verdict in one line."""
        if self.first is None and not self.ok:
            over = f"{len(self.rows)} layers over {inputs_text(self.inputs)}"
            return f"NOT verified: nothing was compared ({over}){self._aside()}"
        if self.first is None:
            over = f"{self.elements} elements over {inputs_text(self.inputs)}"
            return f"bit-exact: {len(self.rows)} layers, {over}, 0 different{self._aside()}"
        return (
            f"NOT bit-exact: {sum(r.different for r in self.rows)} of {self.elements} elements differ; first:"
            f" {self.first}"
        )

    def _aside(self) -> str:
        return f"; float tail not compared: {', '.join(self.not_compared)}" if self.not_compared else ""

    def raise_if_mismatch(self) -> None:
        """Raise MismatchError unless `ok`, with the first difference if there is one."""
        if not self.ok:
            raise MismatchError(self.summary())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "ok": self.ok,
            "summary": self.summary(),
            "inputs": self.inputs,
            "elements": self.elements,
            "layers": [r.to_dict() for r in self.rows],
            "not_compared": list(self.not_compared),
            "first_difference": None if self.first is None else self.first.to_dict(),
        }


def layer_calls(module: tvm.IRModule) -> list[relax.VarBinding]:
    """The bindings of a PACKED main that call a layer function, in order: the compiled library calls one kernel
    each.
    """
    return [
        b
        for b in stages.bindings(module["main"])
        if isinstance(b.value, relax.Call) and isinstance(b.value.op, tvm.ir.GlobalVar)
    ]


def _float_variables(main: relax.Function) -> set[relax.Var]:
    """The variables of the float head and tail, and those that only rename or pick from them."""
    names, found = stages.float_tail(main), set()
    for b in stages.bindings(main):
        value = b.value.tuple_value if isinstance(b.value, relax.TupleGetItem) else b.value
        if b.var.name in names or (isinstance(value, relax.Var) and value in found):
            found.add(b.var)
    return found


class _Layers:
    """Gathers the layers of a run, kernel by kernel.

    module: the PACKED module that the library was made from.  kernels: the names of the kernels, one for each
    private function.
    """

    def __init__(self, module: tvm.IRModule, kernels: set[str]) -> None:
        self.main, self.kernels = module["main"], kernels
        self.calls, self.outside = layer_calls(module), _float_variables(module["main"])
        self.layers: list[Value] = []
        self.head: dict[str, Array] = {}
        self.seen = 0

    def add(self, kernel: str, buffers: Callable[[relax.Call, int], tuple[list[Array], list[Array]]]) -> None:
        """A kernel that ran; buffers(call, n): what it read, constants left out, and its n results, of the layer's
        call in `main`.
        """
        if kernel not in self.kernels:
            return
        self.seen += 1
        if self.seen > len(self.calls):
            return
        binding = self.calls[self.seen - 1]
        # How many results, the type of the layer's variable says.
        several = isinstance(binding.var.ty, relax.TupleType)
        read, written = buffers(binding.value, len(binding.var.ty.fields) if several else 1)
        for argument, array in zip((a for a in binding.value.args if not ops.is_const(a)), read, strict=False):
            if argument in self.outside:
                self.head[argument.name] = array
        self.layers.append(tuple(written) if several else written[0])

    def run(self, outputs: Sequence[Array]) -> LayerRun:
        """What was gathered, when the library has ended.

        Raises MismatchError when it called more or fewer kernels than the graph has layers.
        """
        if self.seen != len(self.calls):
            raise MismatchError(f"the library ran {self.seen} layers where the graph has {len(self.calls)}")
        names = [str(n) for n in (self.main.attrs or {}).get("hawq.output_names", [])] or [
            f"output{i}" for i in range(len(outputs))
        ]
        return LayerRun(dict(zip(names, outputs, strict=True)), self.layers, self.head)


def run_with_layers(
    vm: relax.VirtualMachine,
    module: tvm.IRModule,
    inputs: Mapping[str, Array],
    kernels: set[str],
    device: tvm.runtime.Device | None = None,
) -> LayerRun:
    """Run a virtual machine once and copy what each kernel wrote.

    module: the PACKED module that it was made from.  kernels: the names of the kernels, one for each private function.
    device: of the virtual machine (None: the CPU).
    Raises MismatchError when the library calls more or fewer kernels than the graph has layers.
    """
    main = module["main"]
    gathered = _Layers(module, kernels)

    def observe(func: Any, symbol: str, before: bool, ret: Any, *args: Any) -> None:
        del func, ret

        def buffers(call: relax.Call, results: int) -> tuple[list[Array], list[Array]]:
            # A kernel takes its inputs first, then constants of its own, and its results last.
            return [t.numpy() for a, t in zip(call.args, args, strict=False) if not ops.is_const(a)], [
                t.numpy() for t in args[-results:]
            ]

        if not before:
            gathered.add(symbol, buffers)

    with watched(vm, observe):
        result = vm["main"](*(tvm.runtime.tensor(np.asarray(inputs[p.name], order="C"), device) for p in main.params))
    return gathered.run([result[i].numpy() for i in range(len(result))])


def layers_of(run: Run, module: tvm.IRModule, kernels: set[str]) -> LayerRun:
    """A run through the C interface as layers of the PACKED module; kernels as for `run_with_layers`, and so are the
    errors.
    """
    gathered = _Layers(module, kernels)

    def buffers(record: Record, _: relax.Call, results: int) -> tuple[list[Array], list[Array]]:
        return list(record.read), list(record.written[-results:])

    for record in run.kernels:
        gathered.add(record.kernel, partial(buffers, record))
    return gathered.run(run.outputs)


def verify_executable(
    module: tvm.IRModule, run_layers: RunLayers, batches: Sequence[Mapping[str, Array]]
) -> VerifyReport:
    """Compare what a compiled library computes with the reference's evaluation of `module` (PACKED), for every input.

    run_layers: runs the library once, as `run_with_layers` does.
    """
    tally = Tally()
    for inputs in batches:
        run = run_layers(inputs)
        compare_run(expect(module, inputs, run.head), run, tally)
    return tally.report(len(batches))


@dataclass(frozen=True)
class Expected:
    """What the reference says of one input to `module` (PACKED): every variable of its main, and the outputs by
    name.
    """

    module: tvm.IRModule
    known: dict[relax.Var, Any]
    outputs: dict[str, Array]


def expect(module: tvm.IRModule, inputs: Mapping[str, Array], head: Mapping[str, Array]) -> Expected:
    """The reference's evaluation of `module` (PACKED); head: what a float head computed."""
    main = module["main"]
    values: list[Any] = []
    outputs = evaluate(module, inputs, lambda _, value: values.append(value), given=head)
    known: dict[relax.Var, Any] = {p: inputs[p.name] for p in main.params}
    known |= {b.var: v for b, v in zip(stages.bindings(main), values, strict=True)}
    return Expected(module, known, outputs)


def compare_run(expected: Expected, run: LayerRun, tally: Tally, graph: tvm.IRModule | None = None) -> None:
    """Count in `tally` where one run differs from what the reference expects.

    graph: the library's own (PACKED), some layers of which may be several of the expected one's; by default that one.
    Raises MismatchError when it ran more or fewer layers, or some that the expected graph has not.
    """
    module, known = expected.module, expected.known
    main = module["main"]
    calls, outside = layer_calls(graph or module), _float_variables(main)
    if len(run.layers) != len(calls):
        raise MismatchError(f"the library ran {len(run.layers)} layers where the graph has {len(calls)}")
    named = {b.var.name: b for b in layer_calls(module)}
    if unknown := [b.var.name for b in calls if b.var.name not in named]:
        raise MismatchError(f"the library has layers that are not in the graph: {', '.join(unknown)}")
    for binding, found in zip((named[b.var.name] for b in calls), run.layers, strict=True):
        for want, got in zip(_fields(known[binding.var]), _fields(found), strict=True):
            tally.compare(binding.var.name, want, got, partial(_accumulator, module, binding.value, known, want.shape))
    returned, _ = stages.outputs(main)
    fields = list(returned.fields) if isinstance(returned, relax.Tuple) else [returned]
    for (name, want), source in zip(expected.outputs.items(), fields, strict=True):
        if source in outside:
            tally.not_compared.setdefault(name)
        else:
            tally.compare(f"output {name}", want, run.outputs[name], lambda _: [])


def _fields(value: Any) -> tuple[Array, ...]:
    return value if isinstance(value, tuple) else (value,)


class Tally:
    """The rows by layer, in order of execution, and the first difference met."""

    def __init__(self) -> None:
        self.rows: dict[str, LayerRow] = {}
        self.first: Difference | None = None
        self.not_compared: dict[str, None] = {}

    def report(self, inputs: int) -> VerifyReport:
        """What was counted over so many inputs."""
        return VerifyReport(tuple(self.rows.values()), inputs, self.first, tuple(self.not_compared))

    def compare(self, layer: str, want: Array, got: Array, accumulator: Callable[[tuple[int, ...]], list[int]]) -> None:
        row = self.rows.get(layer, LayerRow(layer, 0, 0))
        first = row.first
        if want.dtype != got.dtype or want.shape != got.shape:
            different = max(int(want.size), 1)
            reason = f"expected {want.dtype}{list(want.shape)}, found {got.dtype}{list(got.shape)}"
            first = first or Difference(layer, (), [], 0, 0, reason)
        else:
            unequal = _unequal(want, got)
            different = int(np.count_nonzero(unequal))
            if different and first is None:
                index = tuple(int(i) for i in np.argwhere(unequal)[0])
                first = Difference(layer, index, accumulator(index), want[index].item(), got[index].item())
        self.rows[layer] = LayerRow(layer, row.elements + int(want.size), row.different + different, first)
        self.first = self.first or first


def _unequal(want: Array, got: Array) -> Array:
    """Where two arrays differ: floats bit by bit, except that every NaN equals every other."""
    if want.dtype.kind != "f":
        return want != got
    bits = f"u{want.dtype.itemsize}"
    return (want.view(bits) != got.view(bits)) & ~(np.isnan(want) & np.isnan(got))


def _accumulator(
    module: tvm.IRModule,
    call: relax.Call,
    known: Mapping[relax.Var, Any],
    shape: tuple[int, ...],
    index: tuple[int, ...],
) -> list[int]:
    """The operands of the layer's last requantize at `index` of its result, from the reference; empty where there is
    none.
    """
    func = module[call.op]
    env: dict[relax.Var, Any] = {p: value_of(a, known) for p, a in zip(func.params, call.args, strict=True)}
    operands: list[int] = []
    for b in stages.bindings(func):
        if not isinstance(b.value, relax.Call):
            env[b.var] = value_of(b.value, env)
            continue
        args = [value_of(a, env) for a in b.value.args]
        # Where a layer moves elements after its last requantize, an index of its result means nothing there.
        if ops.op_name(b.value) == "hawq.requantize":
            same = ops.shape_of(b.var) == shape
            operands = [int(np.broadcast_to(x, shape)[index]) for x in args[0]] if same else []
        elif kind_of(ops.op_name(b.value)) in (Kind.MOVEMENT, Kind.REDUCTION):
            operands = []
        env[b.var] = evaluate_call(b.value, args)
    return operands


def value_of(expr: relax.Expr, known: Mapping[relax.Var, Any]) -> Any:
    """The value of an expression of `known` variables by the reference; what is no tensor stays as it is."""
    if isinstance(expr, relax.Var):
        return known[expr]
    if ops.is_const(expr):
        return ops.const_value(expr)
    if isinstance(expr, relax.Tuple):
        return tuple(value_of(f, known) for f in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return value_of(expr.tuple_value, known)[expr.index]
    return evaluate_call(expr, [value_of(a, known) for a in expr.args]) if isinstance(expr, relax.Call) else expr
