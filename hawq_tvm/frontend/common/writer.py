"""Writing an ANNOTATED module: parameters, bound results, and the attributes that every frontend leaves on `main`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import tvm
from tvm import relax

from hawq_tvm.core import arith, contract, ops, stages
from hawq_tvm.core.contract import Promise
from hawq_tvm.core.errors import ModelError, first_of, not_quantized

from .inputs import Input
from .node import expression
from .values import Constant, Failed, Result, Tensor, Value, storage_of

# What Relax's type rules and attribute conversions raise on operands that do not fit.
TYPE_RULE_ERRORS = (ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError, tvm.error.InternalError)

Env = dict[str, Value | Failed]


class Writer(ABC):
    """One module being written; `failures` holds every operator that could not be imported, in order."""

    def __init__(self, inputs: Sequence[Input]) -> None:
        self.inputs = list(inputs)
        self.input_names = frozenset(i.name for i in self.inputs)
        self.failures: list[ModelError] = []
        self.unread: list[Tensor] = []
        self.builder = ops.Builder()
        self.emit = ops.Emitter(self.builder, self.input_names)

    @abstractmethod
    def run(self) -> tvm.IRModule:
        """The module, complete when `failures` stays empty."""

    @abstractmethod
    def quantizes(self) -> bool:
        """Whether the model holds any operator of quantization."""

    def failed(self, error: ModelError, op: str, operands: Sequence[Any] = ()) -> Failed:
        """Note what is wrong with an operator, input or output, and go on without its results; operands: what it
        would have read.
        """
        error.op = op
        self.failures.append(error)
        self.unread += [v for v in operands if isinstance(v, Tensor)]
        return Failed()

    def complete(self) -> tvm.IRModule:
        """The module, checked.

        Raises ModelError naming the first operator that cannot be imported, and knowing all others.
        """
        module = self.run()
        if self.failures:
            error = first_of(self.failures if self.quantizes() else [*self.failures, not_quantized()])
            error.imported = module
            raise error
        stages.check_grammar(module, stages.Stage.ANNOTATED)
        return module

    def keep(self, name: str, value: Any, promises: Iterable[Promise], *, output: bool) -> None:
        """Note a failure where a tensor is not what was said about it, an output's type included; anything but a
        tensor is not compared.
        """
        if isinstance(value, Constant | Tensor):
            try:
                contract.check(name, value.kind if output else "", value.shape, promises)
            except ModelError as e:
                self.failed(e, "shape")

    def write(
        self, body: Callable[[Env], Sequence[Value]], outputs: Sequence[str], layers: Sequence[str]
    ) -> tvm.IRModule:
        """The module of one function `main`.

        body: imports everything into an environment that holds the inputs, and gives the outputs' values.
        outputs: their names.  layers: the names of the model's operators.
        """
        kinds = [i.kind if i.kind in arith.HALVES else storage_of(i.kind) for i in self.inputs]
        params = [relax.Var(i.name, relax.TensorType(i.shape, k)) for i, k in zip(self.inputs, kinds, strict=True)]
        with self.builder.function("main", params):
            with self.builder.dataflow():
                env: Env = {i.name: Tensor(self._wide(p), i.kind) for i, p in zip(self.inputs, params, strict=True)}
                values = list(body(env))
                # What only failed operators read stays in the module, so that what else is wrong can be found.
                names = [*outputs, *(f"operand{i}" for i in range(len(self.unread)))]
                values += self.unread
                fields = [self._declared(v, n) for v, n in zip(values, names, strict=True)]
                result = self.builder.emit_output(relax.Tuple(fields))
            self.builder.emit_func_output(result)
        func = relax.analysis.remove_all_unused(self.builder.get()["main"])
        attrs: Mapping[str, list[str]] = {
            "hawq.output_names": names,
            "hawq.input_types": [i.kind for i in self.inputs],
            "hawq.output_types": [v.kind for v in values],
            "hawq.nodes": list(layers),
        }
        for key, value in attrs.items():
            func = func.with_attr(key, value)
        return tvm.IRModule({"main": func})

    def _wide(self, param: relax.Var) -> relax.Var:
        """An input as the module computes with it: 16-bit floats in float32."""
        half = ops.dtype_of(param) in arith.HALVES
        return self.bind(relax.op.astype(param, "float32"), f"{param.name}.wide") if half else param

    def _declared(self, value: Value, name: str) -> relax.Expr:
        """An output in the type that the model declares."""
        expr = expression(value)
        return self.bind(relax.op.astype(expr, value.kind), f"{name}.narrow") if value.kind in arith.HALVES else expr

    def bind_results(self, layer: str, results: Sequence[Result]) -> list[Value]:
        """Results bound to variables: the layer's name, with the number of the output when there are several."""
        values: list[Value] = []
        for i, result in enumerate(results):
            name = layer if len(results) == 1 else f"{layer}.{i}"
            if isinstance(result, Constant):
                values.append(result)
                continue
            tensor = result if isinstance(result, Tensor) else None
            expr = tensor.expr if tensor else result
            var = self.bind(expr, name)
            kind = tensor.kind if tensor else ops.dtype_of(var)
            values.append(replace(tensor, expr=var) if tensor else Tensor(var, kind))
        return values

    def bind(self, expr: relax.Expr, name: str) -> relax.Var:
        """`expr` bound to a variable of that name (a number is added when it is taken); variables stay as they are."""
        if isinstance(expr, relax.Var):
            return expr
        return self.emit(expr, name)
