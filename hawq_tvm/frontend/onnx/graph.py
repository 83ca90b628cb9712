"""Checks of the graph's names, and an order in which its nodes can be computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx

from hawq_tvm.core.errors import ModelError


def node_name(node: onnx.NodeProto) -> str:
    """How a node is called in messages and layer names: its name, else its first output's, else its operator."""
    return node.name or next((o for o in node.output if o), "") or node.op_type


def check_names(graph: onnx.GraphProto, outer: Iterable[str] = ()) -> list[ModelError]:
    """What is wrong with a graph's names: a tensor that is defined twice, or that is read and not defined, or no
    output.

    outer: names visible from an enclosing graph.
    """
    found: list[ModelError] = []
    defined: dict[str, str] = {}

    def wrong(message: str, where: str, **facts: str) -> None:
        found.append(ModelError(message, where=where, **facts))

    def define(name: str, by: str) -> None:
        if name in defined:
            wrong(
                f"defines tensor {name!r} a second time",
                by,
                found=f"already defined by {defined[name]}",
                remedy="give every tensor of the model its own name",
            )
        defined[name] = by

    title = graph.name or "graph"
    for value in graph.input:
        if not value.name:
            wrong("has an input without a name", title)
        define(value.name, f"graph input {value.name!r}")
    inputs = set(defined)
    initialized: set[str] = set()
    for tensor in graph.initializer:
        if not tensor.name:
            wrong("has an initializer without a name", title)
        if tensor.name in initialized:
            wrong("is initialized twice", f"initializer {tensor.name!r}", remedy="keep one initializer of each name")
        initialized.add(tensor.name)
        if tensor.name not in inputs:
            defined[tensor.name] = f"initializer {tensor.name!r}"
    for sparse in graph.sparse_initializer:
        wrong("is a sparse initializer", f"initializer {sparse.values.name!r}", remedy="store the tensor densely")
        defined[sparse.values.name] = "a sparse initializer"
    for node in graph.node:
        for name in node.output:
            if name:
                define(name, f"{node.op_type} {node_name(node)!r}")
    known = set(defined) | set(outer)
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                wrong(
                    f"reads a tensor that does not exist: {name!r}",
                    node_name(node),
                    expected="an input, an initializer or the output of a node",
                )
    names = [o.name for o in graph.output]
    if not names:
        wrong("has no output", title, expected="at least one output", remedy="export the model again, with its outputs")
    for name in dict.fromkeys(names):
        if name not in known:
            wrong("is an output that nothing computes", name or "graph output", found="an unknown tensor")
        if names.count(name) > 1:
            wrong("is an output twice", name, remedy="give each output its own name (Identity)")
    return found


def in_order(graph: onnx.GraphProto) -> Sequence[onnx.NodeProto]:
    """The nodes so that each comes after those it reads, otherwise as in the file.

    Raises ModelError naming the nodes of a cycle.
    """
    producers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    before = [sorted({producers[n] for n in reads(node) if n in producers}) for node in graph.node]
    if all(max(r, default=-1) < i for i, r in enumerate(before)):
        return list(graph.node)
    order: list[int] = []
    state = [0] * len(before)  # 0 untouched, 1 on the stack, 2 done
    for root in range(len(before)):
        stack = [(root, 0)] if state[root] == 0 else []
        while stack:
            node, position = stack.pop()
            state[node] = 1
            if position < len(before[node]):
                stack.append((node, position + 1))
                child = before[node][position]
                if state[child] == 1:
                    raise _cycle(graph, [n for n, _ in stack], child)
                if state[child] == 0:
                    stack.append((child, 0))
            else:
                state[node] = 2
                order.append(node)
    return [graph.node[i] for i in order]


def _cycle(graph: onnx.GraphProto, path: list[int], again: int) -> ModelError:
    loop = path[path.index(again) :]
    names = [node_name(graph.node[i]) for i in loop]
    shown = " <- ".join(names[:6] + (["..."] if len(names) > 6 else []) + names[:1])
    return ModelError("depends on its own output", where=names[0], expected="a graph without cycles", found=shown)


def reads(node: onnx.NodeProto) -> set[str]:
    """Every name a node reads, those its subgraphs read included."""
    names = {n for n in node.input if n}
    for attribute in node.attribute:
        for g in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in g.node:
                names |= reads(inner)
            names |= {o.name for o in g.output}
    return names
