"""How much a network computes: the multiplications of its convolutions and matrix products."""

from __future__ import annotations

from math import prod

import tvm
from tvm import relax

from . import ops, stages


def products(graph: tvm.IRModule) -> int:
    """The multiplications of one inference in the conv2d and matmul of an integer graph (PACKED stage).

    What the network's definition asks for: padding of channels to vectors, and zeros between groups, do not count.
    """
    calls = [b.value for b in stages.bindings(graph["main"])]
    return sum(
        layer_products(graph[c.op]) for c in calls if isinstance(c, relax.Call) and isinstance(c.op, tvm.ir.GlobalVar)
    )


def layer_products(function: relax.Function) -> int:
    """The multiplications of one layer function."""
    return sum(_of(b.value) for b in stages.bindings(function))


def _of(call: relax.Expr) -> int:
    name = ops.op_name(call)
    if name == "relax.matmul":
        return prod(ops.shape_of(call)) * ops.shape_of(call.args[0])[-1]
    if name == "relax.nn.conv2d":
        # OIHW or HWIO: a weight's dimensions but O are the multiplications of one output element.
        weight, output = ops.shape_of(call.args[1]), str(call.attrs.kernel_layout).index("O")
        return prod(ops.shape_of(call)) * prod(weight) // weight[output]
    return 0
