"""The one way passes rebuild `main`: binding by binding, old variables mapped to new expressions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

import tvm
from tvm import relax

from . import ops, stages

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
        self.is_changed = False  # whether `bind` has given a variable another value

    def emit(self, expr: relax.Expr, name: str) -> relax.Var:
        """Bind an expression to a new variable named after a layer; variables are returned as they are."""
        return self._emit(expr, name)

    def map(self, expr: relax.Expr) -> relax.Expr:
        """`expr` with every old variable replaced by its new expression (calls and tuples included)."""
        is_old = all(self.env.get(v, v).same_as(v) for v in ops.variables(expr))
        return expr if is_old else ops.renamed(expr, self.env)

    def bind(self, binding: relax.VarBinding, value: relax.Expr, is_old: bool) -> None:
        """Give an old variable its new value; where that is the old one, the binding stays as it is, and nobody looks
        for its type again.
        """
        var = binding.var
        if is_old and isinstance(var, relax.DataflowVar) and self._emit.keep(binding):
            self.env[var] = var
            return
        self.env[var] = self.emit(value, var.name)
        self.is_changed = True


def rewrite_main(
    module: tvm.IRModule,
    visit: Visit,
    result: Callable[[Rebuild, relax.Expr], relax.Expr] | None = None,
    drop: Collection[relax.Var] = (),
) -> tvm.IRModule:
    """`module` with every binding of `main` passed through `visit`; the other functions are kept, and the module itself
    where nothing changes.

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
                old = binding.value
                value = rebuild.map(old)
                new = visit(rebuild, binding, value)
                rebuild.bind(binding, value if new is None else new, new is None and value is old)
            body = result(rebuild, returned) if result else rebuild.map(returned)
            output = builder.emit_output(body)
        builder.emit_func_output(output)
    if not (rebuild.is_changed or result or drop):
        return module
    functions = dict(module.functions_items())
    functions[module.get_global_var("main")] = builder.get()["main"]
    return tvm.IRModule(functions)


def use_counts(func: relax.Function) -> Counter[relax.Var]:
    """How many times each variable is read, the function's result included."""
    expressions = [b.value for b in stages.bindings(func)] + [func.body.body]
    return Counter(v for e in expressions for v in ops.variables(e))
