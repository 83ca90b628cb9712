"""The walk over an exported program that writes an ANNOTATED module, one handler call per operator."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.common.inputs import SUPPORTED, Declared, fixed_inputs
from hawq_tvm.frontend.common.text import last_line
from hawq_tvm.frontend.common.values import Constant, Failed, Tensor, Value
from hawq_tvm.frontend.common.writer import TYPE_RULE_ERRORS, Env, Writer

from .node import HANDLERS, Node
from .program import QUANTIZATION, Call, Program, Ref

# Arithmetic of sizes, which programs with symbolic dimensions hold.
SCALARS: dict[str, Callable[..., Any]] = {
    "operator.add": operator.add,
    "operator.sub": operator.sub,
    "operator.mul": operator.mul,
    "operator.floordiv": operator.floordiv,
    "operator.mod": operator.mod,
    "operator.neg": operator.neg,
    "operator.truediv": operator.truediv,
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
}
# Checks of sizes: every shape is known here, and operators check their own.
CHECKS = frozenset(
    {
        "aten._assert_async",
        "aten._assert_scalar",
        "aten._assert_tensor_metadata",
        "aten.sym_constrain_range",
        "aten.sym_constrain_range_for_size",
        *(f"operator.{n}" for n in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")),
    }
)
STATIC = "quantize statically: calibrate with prepare_pt2e and convert_pt2e, is_dynamic=False"


class Importer(Writer):
    """Imports one program; `failures` holds every operator that could not be imported, in order."""

    def __init__(self, program: Program, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.program = program
        inputs, failures = fixed_inputs(program.inputs, shapes or {})
        super().__init__(inputs)
        for error in failures:
            self.failed(error, "input")
        declared = {i.name: i for i in program.inputs}
        for given in self.inputs:
            self._check_limits(given.shape, declared[given.name])
        self.titles = {**program.titles, **{c.name: c.layer for c in program.calls}}
        self.values: dict[str, Any] = dict(program.literals)

    def quantizes(self) -> bool:
        """Whether anything in the program is quantized."""
        return any(c.op.startswith(QUANTIZATION) for c in self.program.calls)

    def run(self) -> tvm.IRModule:
        """The module, complete when `failures` stays empty."""

        def body(env: Env) -> list[Value]:
            self.values |= env
            self.values |= {name: Constant(array) for name, array in self.program.constants.items()}
            for call in self.program.calls:
                self.values[call.name] = self._guarded(call)
            outputs = [self._output(name, value) for name, value in self.program.outputs]
            if not self.failures:
                results = [
                    *((name, v.name) for name, v in self.program.outputs if isinstance(v, Ref)),
                    *((c.layer, c.name) for c in self.program.calls),
                ]
                for i, (name, value) in enumerate(results):
                    said = [self.program.promises[value]] if value in self.program.promises else []
                    self.keep(name, self.values.get(value), said, output=i < len(self.program.outputs))
            return outputs

        return self.write(body, [name for name, _ in self.program.outputs], [c.layer for c in self.program.calls])

    def _check_limits(self, shape: Sequence[int], declared: Declared) -> None:
        for size, dim in zip(shape, declared.dims or [], strict=True):
            low, high = self.program.limits.get(str(dim), (size, size))
            if not low <= size <= high:
                raise UsageError(
                    f"gives the dimension {dim!r} a size that the program was not exported for",
                    where=f"--shape {declared.name}",
                    expected=f"{low} to {high}",
                    found=str(size),
                )

    def _guarded(self, call: Call) -> Any:
        try:
            return self._import(call)
        except ModelError as e:
            return self.failed(e, call.op, [self.values.get(r.name) for r in call.refs()])

    def _import(self, call: Call) -> Any:
        """What a call gives: a value, a list of values, or a plain number."""
        if call.op in CHECKS:
            return None
        arguments = {name: self._resolved(value) for name, value in call.arguments.items()}
        flat = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
        if not supported(call.op):
            raise unsupported_operator(call)
        if any(isinstance(v, Failed) for v in flat):
            return Failed()
        if call.op == "operator.getitem":
            return _item(call, arguments["arg0"], arguments["arg1"])
        if call.op in SCALARS:
            return SCALARS[call.op](*arguments.values())
        tensors = [v for v in flat if isinstance(v, Constant | Tensor)]
        sources = [self._title(r.name) for r in call.refs() if isinstance(self.values.get(r.name), Constant | Tensor)]
        node = Node(
            name=call.layer,
            op=call.op,
            inputs=list(tensors),
            sources=sources,
            graph_inputs=self.input_names,
            bind=self.bind,
            overload=call.overload,
            arguments=arguments,
        )
        if call.op == "aten.sym_size":
            return node.shape()[node.axis(node.integer("dim"), len(node.shape()))]
        if any(v.kind == "float64" for v in tensors) and not call.op.startswith(QUANTIZATION):
            raise node.fail("computes in float64", expected="float32", remedy="convert the model to float32")
        try:
            results = HANDLERS[call.op](node)
            bound = self.bind_results(node.name, results if isinstance(results, list) else [results])
        except TYPE_RULE_ERRORS as e:
            shapes = ", ".join(f"{v.kind}{list(v.shape)}" for v in tensors)
            raise node.fail(f"does not fit its operands: {last_line(e)}", found=shapes) from None
        return bound if isinstance(results, list) else bound[0]

    def _title(self, name: str) -> str:
        return self.titles.get(name, name)

    def _resolved(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._resolved(v) for v in value]
        return self.values.get(value.name, Failed()) if isinstance(value, Ref) else value

    def _output(self, name: str, value: Any) -> Value:
        value = self._resolved(value)
        if isinstance(value, Constant | Tensor) and value.kind in SUPPORTED:
            return value
        if not isinstance(value, Failed):
            found = value.kind if isinstance(value, Constant | Tensor) else "no tensor"
            self.failed(
                ModelError(
                    "is an output that cannot be returned",
                    where=name,
                    expected=", ".join(sorted(SUPPORTED)),
                    found=found,
                ),
                "output",
            )
        return Constant(np.zeros((), np.float32))


def _item(call: Call, values: Any, index: Any) -> Any:
    if not isinstance(values, list) or not isinstance(index, int) or not -len(values) <= index < len(values):
        raise ModelError(
            "reads a result that is not supported",
            where=call.layer,
            expected="the values of a pool or reduction, the parts of a split",
            found=f"result {index}",
            remedy="do not use the indices of pools and reductions",
        )
    return values[index]


def supported(op: str) -> bool:
    """Whether an operator is imported at all."""
    return op in HANDLERS or op in SCALARS or op in CHECKS or op in ("operator.getitem", "aten.sym_size")


def known_operators() -> list[str]:
    """Every operator that is imported, without overloads."""
    return sorted(HANDLERS)


def unsupported_operator(call: Call) -> ModelError:
    """The error for an operator that has no handler, with the remedy that fits it."""
    kind = call.op.removeprefix(QUANTIZATION)
    if call.op.startswith(QUANTIZATION) and ("choose_qparams" in kind or "per_token" in kind):
        return ModelError(
            "computes its scale at run time (dynamic quantization)", where=call.layer, found=call.op, remedy=STATIC
        )
    if call.op.startswith("higher_order."):
        remedy = "export the model without control flow, and without use_reference_representation"
    elif call.op.startswith(QUANTIZATION):
        remedy = "quantize per tensor or per channel"
    elif call.op.startswith(("onednn.", "xnnpack.", "quantized.")):
        remedy = "pass the program that convert_pt2e gives, before it is lowered for a backend"
    elif call.op.startswith("torchao."):
        remedy = "use a PT2E quantizer that writes quantized_decomposed operators"
    else:
        remedy = (
            "replace it by supported operators, or end the program before it (of an ONNX model, --allow-float-tail cuts"
            " a float end off)"
        )
    return ModelError(
        f"operator {call.op} is not supported",
        where=call.layer,
        found=f"{call.op}.{call.overload}".rstrip("."),
        remedy=remedy,
    )
