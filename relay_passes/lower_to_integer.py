"""Lower the float operators between dequantize and quantize to integer operators (ANNOTATED -> INTEGER).

1. dequantize           -> the integers themselves, with a scale remembered (`integer/values.py`)
2. conv, matmul, pools  -> int32 accumulators; zero points and biases folded into one constant (A10, A11)
3. add, multiply, clip, movement -> symbolic scales, products, or the same movement of the integers
4. quantize             -> one hawq.requantize with dyadic numbers and their proof (A3, A9, A22)
5. quantize of an input, dequantize of an output -> stay: the border
6. what is left float   -> an error that names every such layer, or the float head or tail when the
                           attribute `hawq.allow_float_tail` of `main` asks for it
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax

from hawq_tvm.core import arith, contract, ops, stages
from hawq_tvm.core.errors import first_of, not_quantized
from hawq_tvm.core.ibert import NAME
from hawq_tvm.core.intervals import Interval
from hawq_tvm.core.operators import Kind, is_border, kind_of
from relay_passes.integer import ibert
from relay_passes.integer.fixed import fixed, single
from relay_passes.integer.functions import Function, Functions
from relay_passes.integer.realize import realize
from relay_passes.integer.rescale import Output
from relay_passes.integer.scores import saturated, scores
from relay_passes.integer.values import (
    INSERT,
    TENSORS,
    WAITING,
    Constant,
    Context,
    Curve,
    Joined,
    Moved,
    NotLowered,
    Quotient,
    Real,
    Softmax,
    Term,
    from_dequantize,
    is_uniform,
)

from .integer import handlers, inputs, movement
from .integer.floats import FAILED, Floats, is_cast, is_float

# Each part of what is joined before its quantize gets a requantize of its own.
MOST_JOINED, DEEPEST_JOINED = 1 << 9, 64
TAIL = "keep it outside the integer region with --allow-float-tail"


def lower_to_integer(module: tvm.IRModule) -> tuple[tvm.IRModule, int]:
    """The module with integer arithmetic alone between its quantizes and dequantizes.

    Raises ModelError naming the first layer that cannot be integer, and knowing all others; for a float model, that
    it is one.
    """
    lowering = _Lowering(module)
    lowered = lowering.run()
    if not lowering.failures:
        return lowered, lowering.rewrites
    bindings = list(stages.bindings(module["main"]))
    if any(stages.is_float(b.var) for b in bindings) and not any(map(stages.is_border, bindings)):
        raise not_quantized()
    raise first_of([f.about(stages.model_node(f.where, lowering.nodes)) for f in lowering.failures])


class _Lowering:
    def __init__(self, module: tvm.IRModule) -> None:
        self.module, self.main = module, module["main"]
        self.builder = ops.Builder()
        self.ctx = Context(self.builder, [p.name for p in self.main.params])
        self.env: dict[relax.Var, Any] = {}
        self.failures: list[NotLowered] = []
        self.rewrites = 0
        self.allow_float = bool((self.main.attrs or {}).get("hawq.allow_float_tail", 0))
        self.floats = Floats(self.ctx, self.allow_float)
        self.feeds_quantize = self._feeding_quantize()
        # What nothing quantizes behind the last quantize is float or, where a float tail is not asked for, fixed-point.
        self.fixed_ends = not self.allow_float and any(map(stages.is_border, stages.bindings(self.main)))
        self.ctx.ibert = str((self.main.attrs or {}).get("hawq.nonlinear", "")) == NAME
        self.functions = Functions(self.main, ibert.Owned(self.main)) if self.ctx.ibert else Functions(self.main)
        self.reaches = inputs.reaches(self.main)
        self.params = set(self.main.params)
        self.grids: dict[relax.Var, Real] = {}  # float inputs as integers, for operators that read them as they are
        self.nodes = stages.model_nodes(self.main)

    def _feeding_quantize(self) -> set[relax.Var]:
        """The variables from which some quantize can be reached: a float operator there is never in the tail."""
        feeding: set[relax.Var] = set()
        for b in reversed(list(stages.bindings(self.main))):
            inside = b.var in feeding or ops.op_name(b.value) == "hawq.quantize"
            if inside:
                feeding.update(ops.variables(b.value))
        return feeding

    def run(self) -> tvm.IRModule:
        params = list(self.main.params)
        declared = stages.declared_ranges(self.main)
        for p, (low, high) in zip(params, stages.input_ranges(self.main), strict=True):
            if stages.is_float(p):
                self.env[p] = Moved(p, ends=declared.get(p.name))
                continue
            self.ctx.intervals[p] = Interval.of_range(low, high)
            self.env[p] = p
        returned, aliases = stages.outputs(self.main)
        with self.builder.function("main", params):
            with self.builder.dataflow():
                for binding in stages.bindings(self.main):
                    if binding.var in aliases:
                        continue
                    self.ctx.layer = binding.var.name
                    self.ctx.ending = self.fixed_ends and binding.var not in self.feeds_quantize
                    self.ctx.feeding = self.ctx.ending or binding.var in self.feeds_quantize
                    value = self._guard(partial(self._lower, binding))
                    self.env[binding.var] = self._stand_in(binding.var) if value is FAILED else value
                result = self.builder.emit_output(self._outputs(returned))
            self.builder.emit_func_output(result)
        func = self.builder.get()["main"]
        attrs = {
            k: v
            for k, v in (self.main.attrs or {}).items()
            if k not in ("global_symbol", "hawq.nodes", "hawq.allow_float_tail")
        }
        if self.floats.outside:
            attrs["hawq.float_tail"] = self.floats.outside
        for key, value in attrs.items():
            func = func.with_attr(key, value)
        return tvm.IRModule({"main": func})

    def _stand_in(self, var: relax.Var) -> Any:
        """What the readers of a failed layer see, so that they fail for reasons of their own alone: any 8-bit
        tensor.
        """
        if not isinstance(var.ty, relax.TensorType):
            return FAILED
        shape, dtype = ops.shape_of(var), "int8" if stages.is_float(var) else ops.dtype_of(var)
        data = self.ctx.emit(relax.op.broadcast_to(ops.const(np.zeros([1] * len(shape)), dtype), shape), "failed")
        self.ctx.intervals[data] = Interval.of_range(*arith.RANGES.get(dtype, (0, 1)))
        return Real(shape, (Term(data, np.zeros((), np.int64), np.array(2.0**-20)),)) if stages.is_float(var) else data

    def _guard(self, lower: Callable[[], Any]) -> Any:
        try:
            return lower()
        except NotLowered as failure:
            self.failures.append(failure)
            return FAILED

    def _outputs(self, returned: relax.Expr) -> relax.Expr:
        value = self.env.get(returned, returned)
        fields = value.fields if isinstance(value, relax.Tuple) else [value]
        names = [str(n) for n in (self.main.attrs or {}).get("hawq.output_names", [])]
        results = []
        self.ctx.feeding = self.ctx.ending = self.fixed_ends
        for i, f in enumerate(fields):
            self.ctx.layer = names[i] if i < len(names) else f"output{i}"
            out = self._guard(partial(self._output, f))
            results.append(relax.const(0.0) if out is FAILED else out)
        return relax.Tuple(results)

    def _output(self, expr: relax.Expr) -> relax.Expr:
        try:
            return self.floats.expression(self._value(expr), "output")
        except NotLowered as failure:
            remedy = "quantize it (a quantize/dequantize pair before this output)"
            remedy = remedy if self.allow_float else f"{TAIL}, or {remedy}"
            raise NotLowered(
                failure.where, "output", failure.message.replace("its input", "this output"), remedy
            ) from None

    def _value(self, expr: relax.Expr) -> Any:
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if ops.is_const(expr) and stages.is_float(expr):
            return Constant(ops.const_value(expr).astype(np.float64))
        return expr

    def _lower(self, binding: relax.VarBinding) -> Any:
        expr = binding.value
        if isinstance(expr, relax.Var):
            return self.env[expr]
        if isinstance(expr, relax.Tuple):
            return relax.Tuple(list(expr.fields))
        if isinstance(expr, relax.TupleGetItem):
            return self._tuple_item(expr)
        if not isinstance(expr, relax.Call):
            return self._value(expr)
        values = [self._value(a) for a in expr.args]
        flat = [v for a in values for v in ([self._value(f) for f in a.fields] if isinstance(a, relax.Tuple) else [a])]
        if any(v is FAILED for v in flat):
            return FAILED
        name = ops.op_name(expr)
        if name == "relax.split":
            return binding.value, values[0]
        if _is_integer_call(flat, binding):
            if kind_of(name) in (None, Kind.BORDER):
                raise self.ctx.fail(
                    name,
                    "no integer arithmetic is defined for it",
                    "replace it by operators that have integer arithmetic",
                )
            return self.ctx.emit(self._integer_call(expr, values))
        try:
            lowered = self._lower_call(binding, expr, values, flat)
        except NotLowered as failure:
            outside = self._is_outside(binding, flat)
            if outside and self.allow_float:
                return self.floats.keep(expr, values, self._value)
            lowered = self._of_inputs(binding, expr, failure)
            if lowered is None:
                remedy = f"{TAIL}, or {failure.remedy}" if outside else failure.remedy
                raise NotLowered(failure.where, failure.op, failure.message, remedy) from None
        self.rewrites += 1
        self._check_shape(binding.var, lowered)
        if isinstance(lowered, Joined):
            self.floats.made[lowered] = binding.var.name
        return lowered

    def _of_inputs(self, binding: relax.VarBinding, call: relax.Call, failure: NotLowered) -> Any:
        """An operator that reads float inputs of the model, as integers that a declared range or their other readers
        bound (A26a); None where it reads none, and where nothing bounds them and the failure has a remedy of its own.
        """
        floats = [v for v in dict.fromkeys(ops.variables(call)) if _is_input(self.env.get(v))]
        if not floats or not self.ctx.feeding or is_border(ops.op_name(call)):
            return None
        for var in floats:
            if var not in self.grids:
                moved = self.env[var]
                moved = moved if isinstance(moved, Moved) else Moved(moved)
                rounded = any(is_cast(m) and str(m.attrs.dtype) in arith.HALVES for m in moved.moves)
                reach = None if rounded else self.reaches.get(var, self.reaches.get(moved.base))
                unknown = rounded or (reach is None and moved.ends is None)
                outside = self._is_outside(binding, [*map(self._value, ops.variables(call))])
                if unknown and (failure.remedy != INSERT or (outside and moved.base not in self.params)):
                    return None
                if unknown:
                    raise self._without_range(call, moved, rounded, outside)
                layer, self.ctx.layer = self.ctx.layer, var.name
                value: Any = inputs.as_integers(self.ctx, moved, reach or 0.0)
                for m in moved.moves:
                    value = value if is_cast(m) else movement.move(self.ctx, m, value)
                self.grids[var], self.ctx.layer = value, layer
        kept, self.env = self.env, {**self.env, **{v: self.grids[v] for v in floats}}
        try:
            values = [self._value(a) for a in call.args]
            flat = [v for a in values for v in (map(self._value, a.fields) if isinstance(a, relax.Tuple) else [a])]
            return self._lower_call(binding, call, values, flat)
        finally:
            self.env = kept

    def _without_range(self, call: relax.Call, read: Moved, rounded: bool, outside: bool) -> NotLowered:
        """The error for an operator that reads a float input as it is, of which nothing tells the range."""
        name, remedy = read.base.name, "quantize it (a quantize/dequantize pair before all that reads it)"
        if rounded:
            reason = f"it reads the float input {name} rounded to 16 bits, and nothing quantizes it before"
        elif read.base in self.params:
            reason = f"it reads the float input {name}, and nothing tells its range"
            remedy = f"declare it with --range {name}=LOW:HIGH, or {remedy}"
        else:
            reason = f"it reads {name}, which a float head computes, and nothing tells its range"
        return self.ctx.fail(ops.op_name(call), reason, f"{TAIL}, {remedy}" if outside else remedy)

    def _check_shape(self, var: relax.Var, lowered: Any) -> None:
        """Compare what a layer became with the tensor it was, which no lowering may change; the several results of
        one layer are its own.
        """
        if isinstance(var.ty, relax.TensorType) and isinstance(lowered, (*TENSORS, Constant, relax.Var)):
            shape = ops.shape_of(lowered) if isinstance(lowered, relax.Var) else lowered.shape
            contract.check(
                stages.model_node(var.name, self.nodes),
                "",
                shape,
                [contract.Promise("the model, before it becomes integer", "", ops.shape_of(var))],
            )

    def _lower_call(self, binding: relax.VarBinding, call: relax.Call, values: list[Any], flat: list[Any]) -> Any:
        name = ops.op_name(call)
        # A float head ends in a quantize, which takes it like a graph input.
        if not is_border(name) and any(is_float(v) for v in flat):
            raise self.ctx.fail(name, "it computes in float on a tensor that is not quantized", INSERT)
        curve = self._curve(binding.var)
        if curve is not None:
            return curve
        if name in HANDLERS:
            lowered = HANDLERS[name](self, call, values)
        elif name in handlers.HANDLERS:
            lowered = handlers.HANDLERS[name](self.ctx, call, values)
        else:
            raise self.ctx.fail(name, *handlers.why_not(self.ctx, name, flat))
        if isinstance(lowered, Joined) and (lowered.size > MOST_JOINED or lowered.depth > DEEPEST_JOINED):
            found = f"{lowered.size} parts, {lowered.depth} within one another"
            raise self.ctx.fail(name, f"it joins very many tensors of which none is quantized ({found})", INSERT)
        if self.allow_float and binding.var not in self.feeds_quantize and isinstance(lowered, WAITING):
            raise self.ctx.fail(name, "nothing quantizes its result, so its parts have no common scale", INSERT)
        return lowered

    def _curve(self, var: relax.Var) -> Any:
        """A tensor as a non-linear function of another that a quantize still follows; None where it is none."""
        owned = self.functions.owned.get(var)
        if owned is not None:
            return ibert.polynomial(self.ctx, owned, self._value)
        region = self.functions.of(var) if self.ctx.feeding else None
        if region is None:
            return None
        leaf = self.env[region.leaf]
        leaf = self.grids.get(region.leaf, leaf) if _is_input(leaf) else leaf
        return self._function_of(leaf, Function((region,)))

    def _function_of(self, leaf: Any, function: Function) -> Any:
        if isinstance(leaf, Curve):
            return Curve(leaf.shape, leaf.leaf, leaf.function.then(*function.stages))
        if isinstance(leaf, Constant):
            return Constant(function(leaf.doubles))
        if isinstance(leaf, Joined) and leaf.picks:
            return replace(leaf, parts=tuple(self._function_of(p, function) for p in leaf.parts))
        if isinstance(leaf, Joined | Softmax | Quotient):
            leaf = Real(leaf.shape, (fixed(self.ctx, leaf),))
        return Curve(leaf.shape, leaf, function) if isinstance(leaf, Real) and leaf.terms else None

    def _tuple_item(self, expr: relax.TupleGetItem) -> Any:
        whole = self.env[expr.tuple_value]
        if whole is FAILED:
            return FAILED
        if isinstance(whole, tuple):
            call, x = whole
            return movement.split(self.ctx, call, int(expr.index), x)
        return self.ctx.emit(relax.TupleGetItem(whole, expr.index))

    def _integer_call(self, call: relax.Call, values: list[Any]) -> relax.Expr:
        args = [relax.Tuple([self._value(f) for f in v.fields]) if isinstance(v, relax.Tuple) else v for v in values]
        return relax.Call(call.op, args, attrs=call.attrs, ty_args=call.ty_args)

    # -- the float head and tail ------------------------------------------------------------------

    def _is_outside(self, binding: relax.VarBinding, values: list[Any]) -> bool:
        """Whether an operator lies in the model's float head or tail, which hold nothing that quantizes."""
        if is_border(ops.op_name(binding.value)):
            return False
        head = all(isinstance(v, Moved | Constant) or is_float(v) for v in values if not _is_plain(v))
        return head or binding.var not in self.feeds_quantize

    # -- quantize and dequantize --------------------------------------------------------------------

    def dequantize(self, call: relax.Call, values: list[Any]) -> Any:
        data = values[0]
        scale, zero = ops.const_value(call.args[1]), ops.const_value(call.args[2])
        if ops.is_const(data):
            q = ops.const_value(data)
            if q.itemsize == 1 and not np.any(zero):
                return Constant(q, scale)
            # 32 bits hold bytes less their zero point, with room for what follows.
            wide = q.astype(np.int32 if q.itemsize == 1 and np.all(np.abs(zero) < 1 << 8) else np.int64)
            return Constant(wide - zero.astype(wide.dtype), scale)
        return from_dequantize(data, scale, zero, ops.shape_of(data))

    def quantize(self, call: relax.Call, values: list[Any]) -> Any:
        value = values[0]
        if isinstance(value, Moved) or is_float(value):
            return self._quantize_input(call, value)
        out = Output.of(self.ctx, call)
        return realize(self.ctx, saturated(self.ctx, value, out), out)

    def _quantize_input(self, call: relax.Call, value: Any) -> relax.Expr:
        moved = value if isinstance(value, Moved) else Moved(value)
        source, every = moved.base, moved.moves
        casts, moves = ([m for m in every if is_cast(m) is kind] for kind in (True, False))
        if moves and not all(is_uniform(ops.const_value(a)) for a in call.args[1:3]):
            raise self.ctx.fail("hawq.quantize", "scales per channel after a movement of the input", "use one scale")
        through = {str(m.attrs.dtype) for m in casts} & set(arith.HALVES) - {ops.dtype_of(source)}
        if len(through) > 1:
            raise self.ctx.fail("hawq.quantize", "its input is rounded to two 16-bit float types", "use one of them")
        attrs = call.attrs
        if through:
            attrs = tvm.ir.make_node("ir.DictAttrs", **{**dict(attrs.items()), "through": through.pop()})
        args = [source, *call.args[1:]]
        if moves:
            args = [source] + [ops.const(ops.const_value(a).reshape(-1)[0], ops.dtype_of(a)) for a in call.args[1:]]
        quantize: relax.Call | None = relax.Call(call.op, args, attrs=attrs)
        if moved.ends is not None:
            quantize = inputs.narrowed(quantize, source, *moved.ends)
        if quantize is None:
            raise self.ctx.fail(
                "hawq.quantize",
                f"its scales differ between channels and a range of the input {source.name} is declared",
                f"leave out --range {source.name}",
            )
        expr = self.ctx.emit(quantize, "q" if moves else "")
        for i, m in enumerate(moves):
            expr = self.ctx.emit(
                relax.Call(m.op, [expr, *m.args[1:]], attrs=m.attrs), "" if i == len(moves) - 1 else f"move{i}"
            )
        return expr

    def dynamic_quantize(self, call: relax.Call, values: list[Any]) -> relax.Expr:
        value = values[0]
        if is_float(value) or (isinstance(value, Moved) and not value.moves and value.ends is None):
            return self.ctx.emit(
                relax.Call(call.op, [value.base if isinstance(value, Moved) else value], attrs=call.attrs)
            )
        raise self.ctx.fail(
            "DynamicQuantizeLinear",
            "its scale is computed at run time",
            "quantize the model statically, with calibration data",
        )

    def softmax(self, call: relax.Call, values: list[Any]) -> Any:
        if isinstance(values[0], TENSORS):
            rank = len(values[0].shape)
            return scores(self.ctx, values[0], int(call.attrs.axis) % rank)
        return single(self.ctx, values[0], "softmax")

    def astype(self, call: relax.Call, values: list[Any]) -> Any:
        x, dtype = values[0], str(call.attrs.dtype)
        if is_float(x):
            raise self.ctx.fail("cast", "it rounds a tensor that is not quantized", INSERT)
        if isinstance(x, relax.Expr) and dtype.startswith("float"):
            data = self.ctx.emit(relax.op.astype(x, "int8"), "bit") if ops.dtype_of(x) == "bool" else x
            return Real(ops.shape_of(x), (Term(data, np.zeros((), np.int64), np.ones(()), signed=True),))
        if isinstance(x, Moved) and "float" in dtype:
            return replace(x, moves=(*x.moves, call))
        if isinstance(x, Real) and "float" in dtype:
            return replace(x, through=dtype if dtype in arith.HALVES else x.through, kind=dtype)
        if "float" in dtype:
            return x
        raise self.ctx.fail("cast", f"it casts a real tensor to {dtype} without a scale", "quantize it")


def _is_plain(value: Any) -> bool:
    """Whether an argument is no tensor variable: a shape, a constant, an index tuple."""
    return not isinstance(value, (*TENSORS, Moved, relax.Var))


def _is_input(value: Any) -> bool:
    """Whether a value is a float input of the model, moved perhaps, or what a float head makes of one."""
    return isinstance(value, Moved) or is_float(value)


def _is_integer_call(values: list[Any], binding: relax.VarBinding) -> bool:
    if stages.is_float(binding.var):
        return False
    tensors = [v for v in values if isinstance(v, (*TENSORS, relax.Var, Moved, Constant))]
    return bool(tensors) and all(isinstance(v, relax.Var) and not stages.is_float(v) for v in tensors)


Handler = Callable[[_Lowering, relax.Call, list[Any]], Any]
HANDLERS: dict[str, Handler] = {
    "hawq.dequantize": _Lowering.dequantize,
    "hawq.quantize": _Lowering.quantize,
    "hawq.dynamic_quantize": _Lowering.dynamic_quantize,
    "relax.nn.softmax": _Lowering.softmax,
    "relax.astype": _Lowering.astype,
    "relax.concat": lambda low, call, v: movement.concat(low.ctx, call, [low._value(f) for f in v[0].fields]),
}
