"""Nodes whose operands are all constant, computed while importing by ONNX's own reference implementation."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.text import last_line

from .node import MICROSOFT, Node
from .values import ELEMENT_TYPES, Array, Constant, Tensor, Value

# Shape arithmetic and the elementary operators exporters use to make constants.  No operator of a quantized
# region is here: QuantizeLinear of a constant stays in the module, so that a pass folds it with our arithmetic.
FOLDABLE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "ArgMax",
        "ArgMin",
        "Cast",
        "CastLike",
        "Ceil",
        "Clip",
        "Concat",
        "ConstantOfShape",
        "CumSum",
        "Div",
        "Equal",
        "Erf",
        "Exp",
        "Expand",
        "Flatten",
        "Floor",
        "Gather",
        "GatherElements",
        "Greater",
        "GreaterOrEqual",
        "Identity",
        "IsInf",
        "IsNaN",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Min",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pad",
        "Pow",
        "Range",
        "Reciprocal",
        "ReduceL1",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
        "ReduceProd",
        "ReduceSum",
        "ReduceSumSquare",
        "Relu",
        "Reshape",
        "Round",
        "Sigmoid",
        "Sign",
        "Slice",
        "Split",
        "Sqrt",
        "Squeeze",
        "Sub",
        "Sum",
        "Tanh",
        "Tile",
        "Transpose",
        "Trilu",
        "Unsqueeze",
        "Where",
        "Xor",
    ]
)
# Not folded: a quantized weight is a dequantize of a constant. What other operands need of one is computed as ONNX's
# reference does, which knows these since the opsets here.
QUANTIZERS = {"QuantizeLinear": 10, "DequantizeLinear": 19}
# The elements of one constant that folding makes, and of all of them together; a larger file may hold larger ones.
LIMIT, LIMIT_OF_ALL = 1 << 24, 1 << 26
REFERENCE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
)


def read_tensor(tensor: onnx.TensorProto, where: str) -> Array:
    """The array of a TensorProto in its own element type.

    Raises ModelError when the type is not supported or the data does not fill the shape.
    """
    kind = ELEMENT_TYPES.get(tensor.data_type)
    if kind is None:
        raise ModelError(
            "has an element type that is not supported",
            where=where,
            expected="an integer, boolean or float type",
            found=type_name(tensor.data_type),
        )
    dims = [int(d) for d in tensor.dims]
    if any(d < 0 for d in dims):
        raise ModelError("has a negative dimension", where=where, found=str(dims))
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as e:
        raise ModelError(
            f"has data that does not fit its shape: {last_line(e)}", where=where, found=f"{kind}{dims}"
        ) from None
    if list(array.shape) != dims:
        raise ModelError(
            "has data that does not fit its shape", where=where, expected=str(dims), found=str(list(array.shape))
        )
    return np.asarray(array)


def type_name(element_type: int) -> str:
    """The name of an ONNX element type number, for messages."""
    names: dict[int, str] = {v: k for k, v in onnx.TensorProto.DataType.items()}
    return names.get(element_type, f"type {element_type}").lower()


def constant_node(node: Node) -> Constant:
    """The value of a Constant node."""
    keys = list(node.attributes)
    if len(keys) != 1:
        raise node.fail("needs exactly one value", found=", ".join(keys) or "none")
    attribute = node.attributes[keys[0]]
    if keys[0] == "value" and attribute.HasField("t"):
        return Constant(read_tensor(attribute.t, node.name))
    if keys[0] in ("value_int", "value_ints"):
        value = helper.get_attribute_value(attribute)
        return Constant(np.asarray(value, np.int64))
    if keys[0] in ("value_float", "value_floats"):
        return Constant(np.asarray(helper.get_attribute_value(attribute), np.float32))
    raise node.fail(f"has a {keys[0]}", expected="a dense numeric tensor")


def can_fold(node: Node) -> bool:
    """Whether a node is elementary and reads constants only."""
    return (
        node.domain == "" and node.op in FOLDABLE and all(isinstance(v, Constant) for v in node.inputs if v is not None)
    )


class Budget:
    """What folding may make of a model: constants are kept while it is imported, so their sizes add up."""

    def __init__(self, held: int) -> None:
        """held: the elements that the file itself holds."""
        self.largest, self.left = max(LIMIT, held), max(LIMIT_OF_ALL, 8 * held)

    def check(self, node: Node, size: int) -> None:
        """Raise ModelError when a result of that size is too large, before it is computed."""
        limit = min(self.largest, self.left)
        if size > limit:
            raise node.fail(
                "would make a very large constant",
                expected=f"at most {limit} elements",
                found=str(size),
                remedy="compute it at run time, or store it in the file",
            )


def fold(node: Node, budget: Budget) -> list[Constant]:
    """The outputs of a foldable node; what they take is taken from the budget.

    Raises ModelError when they would be very large or the operands do not fit together.
    """
    arrays = {f"i{k}": v.array for k, v in enumerate(node.inputs) if isinstance(v, Constant)}
    try:
        size = _result_size(node, list(arrays.values()))
    except (ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError) as e:
        raise node.fail(f"cannot be computed: {last_line(e)}", found=_operands(arrays)) from None
    budget.check(node, size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = _evaluate(node, arrays)
    except REFERENCE_ERRORS as e:
        raise node.fail(f"cannot be computed: {last_line(e)}", found=_operands(arrays)) from None
    if len(results) != len(node.outputs) or not all(isinstance(r, np.ndarray | np.generic) for r in results):
        raise node.fail("did not give one array per output", expected=str(len(node.outputs)), found=str(len(results)))
    budget.left -= sum(np.size(r) for r in results)
    return [Constant(np.asarray(r)) for r in results]


def known(node: Node, budget: Budget) -> Callable[[], list[Array]] | None:
    """How to compute the outputs of a node whose operands depend on constants alone; None for another.

    What is computed raises ModelError as `fold` does.
    """
    standard = node.domain == "" and (node.op in FOLDABLE or node.op in QUANTIZERS)
    if not (standard or (node.domain == MICROSOFT and node.op in QUANTIZERS)):
        return None
    if not all(v is None or isinstance(v, Constant) or v.known is not None for v in node.inputs):
        return None

    @functools.cache
    def values() -> list[Array]:
        inputs: list[Value | None] = [
            Constant(v.known()) if isinstance(v, Tensor) and v.known else v for v in node.inputs
        ]
        opset = max(node.opset, QUANTIZERS.get(node.op, 0))
        return [c.array for c in fold(replace(node, inputs=inputs, opset=opset), budget)]

    return values


def noted(results: Sequence[Value], values: Callable[[], list[Array]] | None) -> list[Value]:
    """The results of a node that know what they hold, where `values` computes that."""
    if values is None:
        return list(results)

    def at(index: int) -> Callable[[], Array]:
        return lambda: values()[index]

    return [replace(v, known=at(i)) if isinstance(v, Tensor) else v for i, v in enumerate(results)]


def _operands(arrays: dict[str, Array]) -> str:
    return ", ".join(f"{a.dtype.name}{list(a.shape)}" for a in arrays.values())


def _evaluate(node: Node, arrays: dict[str, Array]) -> list[Array]:
    from onnx.reference import ReferenceEvaluator

    names = [f"i{k}" if v is not None else "" for k, v in enumerate(node.inputs)]
    outputs = [f"o{k}" for k in range(len(node.outputs))]
    proto = helper.make_node(node.op, names, outputs)
    proto.attribute.extend(node.attributes.values())
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in arrays.items()
    ]
    graph = helper.make_graph([proto], "fold", inputs, [onnx.ValueInfoProto(name=o) for o in outputs])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.opset)])
    return list(ReferenceEvaluator(model).run(outputs, arrays))


def _result_size(node: Node, arrays: list[Array]) -> int:
    """An upper bound of the elements of the result, in plain integers."""
    first = arrays[0] if arrays else np.zeros(0)
    if node.op == "ConstantOfShape":
        return math.prod(int(v) for v in first.ravel())
    if node.op == "Range":
        start, limit, delta = (float(a.ravel()[0]) for a in arrays[:3])
        return max(0, math.ceil((limit - start) / delta))
    if node.op == "Tile":
        return first.size * math.prod(max(0, int(v)) for v in arrays[1].ravel())
    if node.op == "Pad":
        pads = arrays[1].ravel() if len(arrays) > 1 else node.attr("pads", [])
        return math.prod(max(0, d + 2 * max((int(p) for p in pads), default=0)) for d in first.shape)
    if node.op == "Expand":
        return math.prod(np.broadcast_shapes(first.shape, tuple(int(v) for v in arrays[1].ravel())))
    if node.op == "Gather":
        return arrays[1].size * (first.size // max(1, first.shape[node.axis(node.attr("axis", 0), first.ndim)]))
    if node.op == "GatherElements":
        return arrays[1].size
    if node.op in ("Concat", "Cast", "CastLike") or len(arrays) == 1 or node.op.startswith("Reduce"):
        return sum(a.size for a in arrays)
    sizes = [max((a.shape[-1 - i] if i < a.ndim else 1) for a in arrays) for i in range(max(a.ndim for a in arrays))]
    elementwise = {"Slice", "Squeeze", "Unsqueeze", "Reshape", "Split", "CumSum", "Trilu"}
    return first.size if node.op in elementwise else math.prod(sizes)
