"""Float PyTorch programs (torch.export) as torch operations: a node per ATen call, layers called as the module that
holds their weight.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.inputs import Declared, bound_inputs
from hawq_tvm.frontend.torch.reader import load_exported

from .float_graph import FloatGraph, Input, Layer, Node, folded, named_once, sizes_of
from .grouped import convolution

NAMED_CONVS = ("aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default")
TRANSPOSED = ("aten.conv_transpose1d.default", "aten.conv_transpose2d.input", "aten.conv_transpose3d.input")
CONVS = (*NAMED_CONVS, *TRANSPOSED, "aten.convolution.default")
PRODUCTS = ("aten.linear.default", "aten.matmul.default", "aten.mm.default", "aten.addmm.default")


def from_program(source: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> FloatGraph:
    """The graph of an ExportedProgram or of a .pt2 file that torch.export.save wrote.

    shapes: full shapes of inputs by name, which fix what the program leaves open.
    Raises ModelError when it cannot be read, is quantized, or normalizes with batch statistics, UsageError for shapes
    that contradict it.
    """
    program = load_exported(source) if isinstance(source, str | os.PathLike) else source
    name = os.fspath(source) if isinstance(source, str | os.PathLike) else type(program.graph_module).__name__
    quantized = [
        str(n.target)
        for n in program.graph.nodes
        if "quantized_decomposed" in str(n.target) or "torchao" in str(n.target)
    ]
    if quantized:
        raise ModelError(
            f"calls {quantized[0]}: it is quantized already",
            where=name,
            expected="a float program",
            remedy="give the program that was quantized",
        )
    program = program.run_decompositions({})  # in-place operators become functions
    signature, constants = program.graph_signature, {**program.state_dict, **program.constants}
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    names = {placeholder: target for placeholder, target in held.items()}
    parameters = {target: constants[target].detach().clone() for target in names.values()}
    inputs, nodes, arguments = [], [], {}
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name not in names:
            inputs.append(_declared(node))
        elif node.op == "call_function":
            made, compute_arguments = _node(node, names)
            nodes.append(made)
            arguments[node.name] = compute_arguments
    kept = folded(nodes, parameters)
    layers = [_layer(n, arguments[n.outputs[0]], parameters) for n in kept if _weighted(n, parameters)]
    outputs = tuple(o for o in signature.user_outputs if isinstance(o, str))
    bound = [Input(d.name, d.kind, sizes_of(d)) for d in bound_inputs(inputs, shapes or {})]
    return FloatGraph(name, tuple(bound), outputs, kept, named_once(layers, name), parameters)


def _declared(node: torch.fx.Node) -> Declared:
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        raise ModelError(
            "is an input that is no tensor", where=node.name, expected="tensors only", found=type(value).__name__
        )
    dims: list[int | str] = [d if isinstance(d, int) else str(d) for d in value.shape]
    return Declared(node.name, str(value.dtype).removeprefix("torch."), dims)


def _node(node: torch.fx.Node, names: dict[str, str]) -> tuple[Node, tuple[Any, ...]]:
    """The node, and its arguments with tensors as their names."""
    target, operands = node.target, list[str]()
    if "batch_norm" in str(target) and any(a is True for a in node.args[5:6]) and "no_training" not in str(target):
        raise ModelError(
            "normalizes with the statistics of its batch",
            where=node.name,
            remedy="call eval() on the module before torch.export.export",
        )

    def place(used: torch.fx.Node) -> str:
        operands.append(names.get(used.name, used.name))
        return operands[-1]

    arguments = torch.fx.node.map_arg((node.args, node.kwargs), place)
    called = convolution if str(target) in NAMED_CONVS and not node.kwargs else target
    compute: Callable[..., Any] = target if target is operator.getitem else _call(called, node.args, node.kwargs)
    told, names_of = {"call": f"{node.args} {node.kwargs}"}, (tuple(operands), (node.name,))
    if target is operator.getitem:
        index = node.args[1]
        return Node(node.name, "getitem", *names_of, lambda value: value[index], told), arguments[0]
    return Node(node.name, str(target), *names_of, compute, told), arguments[0]


def _call(target: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
    def compute(*operands: Any) -> Any:
        rest = iter(operands)
        given, named = torch.fx.node.map_arg((args, kwargs), lambda _: next(rest))
        result = target(*given, **named)
        return _Several(result) if isinstance(result, tuple | list) else result

    return compute


class _Several(list[Any]):
    """What an operator with several results returns, read by getitem nodes; no tuple, which would be several
    outputs.
    """


def _weighted(node: Node, parameters: dict[str, Any]) -> bool:
    if node.op not in (*CONVS, *PRODUCTS):
        return False
    tensor, weight = _operands(node)
    return tensor not in parameters and weight in parameters and parameters[weight].ndim >= 2


def _operands(node: Node) -> tuple[str, str]:
    first = 1 if node.op == "aten.addmm.default" else 0
    return node.inputs[first], node.inputs[first + 1]


def _layer(node: Node, arguments: tuple[Any, ...], parameters: dict[str, Any]) -> Layer:
    tensor, weight = _operands(node)
    bias = next((n for n in node.inputs if n not in (tensor, weight) and n in parameters), "")
    name = weight.removesuffix(".weight") if weight.endswith(".weight") else node.name
    common: dict[str, Any] = {
        "name": name,
        "node": node.name,
        "input": tensor,
        "output": node.outputs[0],
        "weight": weight,
        "bias": bias,
    }
    if node.op in PRODUCTS:
        return Layer(
            kind="matmul", channel_axis=0 if node.op == "aten.linear.default" else parameters[weight].ndim - 1, **common
        )
    rank = parameters[weight].ndim - 2
    window = [*arguments[3:], *([None] * 6)]
    if node.op == "aten.convolution.default":
        *three, transposed, extra, group = window[:6]
    elif node.op in TRANSPOSED:
        stride, pad, extra, group, dilation = window[:5]
        three, transposed = [stride, pad, dilation], True
    else:
        *three, group = window[:4]
        transposed, extra = False, None
    strides, padding, dilations = (
        _spread(value, rank, default) for value, default in zip(three, (1, 0, 1), strict=True)
    )
    return Layer(
        kind="deconv" if transposed else "conv",
        channel_axis=1 if transposed else 0,
        extra=_spread(extra, rank, 0) if transposed else (),
        group=int(group or 1),
        strides=strides,
        dilations=dilations,
        before=padding,
        after=padding,
        **common,
    )


def _spread(value: Any, rank: int, default: int) -> tuple[int, ...]:
    values = [default] if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(values * rank if len(values) == 1 else values)
