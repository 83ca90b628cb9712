"""The one way passes rebuild `main`: binding by binding, old variables mapped to new expressions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import tvm
from tvm import relax

from hawq_tvm import ops, stages

Env = dict[relax.Var, relax.Expr]
Visit = Callable[["Rebuild", relax.VarBinding, relax.Expr], relax.Expr | None]


class Rebuild:
    """A new `main` under construction.

    visit(rebuild, binding, value) sees each binding with its arguments already mapped and returns the
    replacement expression, or None to keep `value`.  Intermediate results are made with `emit`.
    """

    def __init__(self, module: tvm.IRModule) -> None:
        self.module = module
        self.builder = ops.Builder()
        self._emit = ops.Emitter(self.builder, [p.name for p in module["main"].params])
        self.env: Env = {}

    def emit(self, expr: relax.Expr, name: str) -> relax.Var:
        """Bind an expression to a new variable named after a layer; variables are returned as they are."""
        return self._emit(expr, name)

    def map(self, expr: relax.Expr) -> relax.Expr:
        """`expr` with every old variable replaced by its new expression (calls and tuples included)."""
        if isinstance(expr, relax.Var):
            return self.env.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.map(f) for f in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.map(expr.tuple_value), expr.index)
        if isinstance(expr, relax.Call):
            return relax.Call(expr.op, [self.map(a) for a in expr.args], attrs=expr.attrs, ty_args=expr.ty_args)
        return expr


def rewrite_main(
    module: tvm.IRModule, visit: Visit, result: Callable[[Rebuild, relax.Expr], relax.Expr] | None = None,
    drop: Collection[relax.Var] = (),
) -> tvm.IRModule:  # fmt: skip
    """`module` with every binding of `main` passed through `visit`; the other functions are kept.

    result: maps the old result expression; by default its variables are replaced by what `visit` made of them.
    drop: bindings to leave out.
    """
    main = module["main"]
    returned, aliases = stages.outputs(main)
    rebuild = Rebuild(module)
    builder = rebuild.builder
    params = list(main.params)
    with builder.function("main", params, attrs=dict(main.attrs or {}), private=False):
        with builder.dataflow():
            for binding in stages.bindings(main):
                if binding.var in aliases or binding.var in drop:
                    continue
                value = rebuild.map(binding.value)
                new = visit(rebuild, binding, value)
                rebuild.env[binding.var] = rebuild.emit(value if new is None else new, binding.var.name)
            body = result(rebuild, returned) if result else rebuild.map(returned)
            output = builder.emit_output(body)
        builder.emit_func_output(output)
    functions = dict(module.functions_items())
    functions[module.get_global_var("main")] = builder.get()["main"]
    return tvm.IRModule(functions)


def use_counts(func: relax.Function) -> Counter[relax.Var]:
    """How many times each variable is read, the function's result included."""
    expressions = [b.value for b in stages.bindings(func)] + [func.body.body]
    return Counter(v for e in expressions for v in ops.variables(e))
