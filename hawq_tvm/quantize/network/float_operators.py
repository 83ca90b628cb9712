"""The ONNX operators that a float graph may have, as torch functions: one entry per operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx.node import MICROSOFT

from .grouped import convolution

Tensor = torch.Tensor


class Attributes:
    """The attributes of one node, and its errors."""

    def __init__(self, node: onnx.NodeProto, opset: int) -> None:
        self.node, self.opset, self.name = node, opset, node.name or next(iter(node.output), node.op_type)
        self.domain = "" if node.domain == "ai.onnx" else node.domain
        self.values = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def fail(self, message: str, *, expected: str = "", found: str = "", remedy: str = "") -> ModelError:
        return ModelError(
            f"{self.node.op_type} {message}", where=self.name, expected=expected, found=found, remedy=remedy
        )


Maker = Callable[[Attributes], Callable[..., Any]]
# By domain ("" the standard one) and name.
OPERATORS: dict[tuple[str, str], Maker] = {}


def operator(*names: str, domain: str = "") -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        OPERATORS.update({(domain, name): make for name in names})
        return make

    return register


def as_tensor(array: Any) -> Tensor:
    """A constant of a model; a copy, as protobuf's memory is not to be written to."""
    return torch.from_numpy(np.array(array))


def per_axis(attributes: Attributes, name: str, rank: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in attributes.get(name, [1] * rank))
    if len(values) != rank:
        raise attributes.fail(f"has {name} of another rank", expected=f"{rank} numbers", found=str(list(values)))
    return values


def padding_of(attributes: Attributes, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    auto = attributes.get("auto_pad", "NOTSET")
    pads = [0] * (2 * rank) if auto == "VALID" else list(attributes.get("pads", [0] * (2 * rank)))
    if len(pads) != 2 * rank or auto not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise attributes.fail(
            "has a padding that is not understood", expected=f"{2 * rank} numbers", found=f"{pads}, auto_pad {auto}"
        )
    if auto.startswith("SAME") and any(s != 1 for s in attributes.get("strides", [1])):
        raise attributes.fail(
            f"has auto_pad {auto} and strides", remedy="run onnx shape inference and write the padding as numbers"
        )
    if auto.startswith("SAME"):
        kernel, dilations = attributes.get("kernel_shape"), per_axis(attributes, "dilations", rank)
        if kernel is None:
            raise attributes.fail("has auto_pad but no kernel_shape")
        total = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    return tuple(int(p) for p in pads[:rank]), tuple(int(p) for p in pads[rank:])


def padded(x: Tensor, before: tuple[int, ...], after: tuple[int, ...], value: float = 0.0) -> Tensor:
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


# -- operators
# ------------------------------------------------------------------------------------------------------------


@operator("Conv")
def _conv(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        before, after = padding_of(a, rank)
        symmetric = before == after
        padding = before if symmetric else (0,) * rank
        y = x if symmetric else padded(x, before, after)
        return convolution(
            y, w, b, per_axis(a, "strides", rank), padding, per_axis(a, "dilations", rank), int(a.get("group", 1))
        )

    return compute


@operator("ConvTranspose")
def _conv_transpose(a: Attributes) -> Callable[..., Any]:
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
    auto, group = a.get("auto_pad", "NOTSET"), int(a.get("group", 1))

    def compute(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        strides, dilations = per_axis(a, "strides", rank), per_axis(a, "dilations", rank)
        extra = tuple(int(v) for v in a.get("output_padding", [0] * rank))
        y = function[rank](x, w, b, strides, 0, extra, group, dilations)
        wanted = a.get("output_shape")
        if wanted is None and auto.startswith("SAME"):
            wanted = [size * step for size, step in zip(x.shape[2:], strides, strict=True)]
        if wanted is None:
            before, after = ((0,) * rank,) * 2 if auto == "VALID" else padding_of(a, rank)
        else:  # what is cut off in all; the odd one at the end, but for SAME_LOWER and plain output shapes
            cut = [size - want for size, want in zip(y.shape[2:], wanted[-rank:], strict=True)]
            less, more = tuple(c // 2 for c in cut), tuple(c - c // 2 for c in cut)
            before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
        return padded(y, tuple(-p for p in before), tuple(-p for p in after))

    return compute


@operator("Gemm")
def _gemm(a: Attributes) -> Callable[..., Any]:
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)

    def compute(x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
        y = (x.T if a.get("transA", 0) else x) @ (w.T if a.get("transB", 0) else w)
        y = y if alpha == 1 else alpha * y
        return y if c is None else y + (c if beta == 1 else beta * c)

    return compute


@operator("BatchNormalization")
def _batch_norm(a: Attributes) -> Callable[..., Any]:
    if a.get("training_mode", 0):
        raise a.fail("is in training mode", remedy="export the model in evaluation mode")
    return lambda x, gamma, beta, mean, var: F.batch_norm(x, mean, var, gamma, beta, False, 0.0, a.get("epsilon", 1e-5))


@operator("MaxPool")
def _max_pool(a: Attributes) -> Callable[..., Any]:
    if len(a.node.output) > 1:
        raise a.fail("with indices is not known here")
    rank = len(a.get("kernel_shape"))
    before, after = padding_of(a, rank)
    function = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[rank - 1]
    own = before == after and all(2 * p <= k for p, k in zip(before, a.get("kernel_shape"), strict=True))
    if not own and a.get("ceil_mode", 0):
        raise a.fail("has ceil_mode with uneven padding", remedy="pad explicitly before it")

    def compute(x: Tensor) -> Tensor:
        y = x if own else padded(x, before, after, float("-inf"))
        padding = before if own else (0,) * rank
        return function(
            y,
            a.get("kernel_shape"),
            per_axis(a, "strides", rank),
            padding,
            per_axis(a, "dilations", rank),
            bool(a.get("ceil_mode", 0)),
        )

    return compute


@operator("AveragePool")
def _average_pool(a: Attributes) -> Callable[..., Any]:
    kernel = a.get("kernel_shape")
    rank, ceil = len(kernel), bool(a.get("ceil_mode", 0))
    before, after = padding_of(a, rank)
    function = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
    strides, counts_padding = per_axis(a, "strides", rank), bool(a.get("count_include_pad", 0))
    own = before == after and all(2 * p <= k for p, k in zip(before, kernel, strict=True))
    if any(d != 1 for d in per_axis(a, "dilations", rank)) or (ceil and not own):
        raise a.fail("has dilations, or ceil_mode with uneven padding", remedy="pad explicitly before it")
    if own:
        return lambda x: function(x, kernel, strides, before, ceil, counts_padding)

    def compute(x: Tensor) -> Tensor:
        mean = function(padded(x, before, after), kernel, strides)
        return mean if counts_padding else mean / function(padded(torch.ones_like(x), before, after), kernel, strides)

    return compute


@operator("GlobalAveragePool")
def _global_average(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def _global_max(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def _reduce(a: Attributes) -> Callable[..., Any]:
    functions: dict[str, Callable[..., Any]] = {
        "ReduceMean": torch.mean,
        "ReduceSum": torch.sum,
        "ReduceMax": torch.amax,
        "ReduceMin": torch.amin,
    }
    function = functions[a.node.op_type]

    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.tolist()
        if not given and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(given or range(x.ndim)), keepdim=bool(a.get("keepdims", 1)))

    return compute


@operator(
    "Relu",
    "Sigmoid",
    "Tanh",
    "Exp",
    "Log",
    "Sqrt",
    "Neg",
    "Abs",
    "Erf",
    "Reciprocal",
    "Softplus",
    "Floor",
    "Ceil",
    "Round",
    "Sin",
    "Cos",
    "Sign",
    "Softsign",
    "Identity",
    "Dropout",
)
def _unary(a: Attributes) -> Callable[..., Any]:
    named = {"Softplus": F.softplus, "Softsign": F.softsign, "Relu": torch.relu}
    if a.node.op_type in ("Identity", "Dropout"):
        return lambda x, *_: x
    return named.get(a.node.op_type) or getattr(torch, a.node.op_type.lower())


@operator("Gelu", "QuickGelu", domain=MICROSOFT)
@operator("LeakyRelu", "Elu", "Celu", "HardSigmoid", "HardSwish", "Gelu", "Mish", "Selu", "Swish")
def _activation(a: Attributes) -> Callable[..., Any]:
    kind = a.node.op_type
    if kind == "LeakyRelu":
        return lambda x: F.leaky_relu(x, a.get("alpha", 0.01))
    if kind == "Elu":
        return lambda x: F.elu(x, a.get("alpha", 1.0))
    if kind == "Celu":
        return lambda x: F.celu(x, a.get("alpha", 1.0))
    if kind in ("Swish", "QuickGelu"):
        factor = a.get("alpha", 1.702 if kind == "QuickGelu" else 1.0)
        return lambda x: x * torch.sigmoid(factor * x)
    if kind == "HardSigmoid":
        return lambda x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1)
    if kind == "HardSwish":
        return lambda x: x * (x / 6 + 0.5).clamp(0, 1)
    if kind == "Gelu":
        return lambda x: F.gelu(x, approximate=a.get("approximate", "none"))
    if kind == "Selu" and a.values:
        raise a.fail("with its own alpha or gamma is not known here")
    return F.mish if kind == "Mish" else F.selu


@operator("PRelu")
def _prelu(a: Attributes) -> Callable[..., Any]:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@operator("Clip")
def _clip(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        low, high = (a.get("min") if low is None else low), (a.get("max") if high is None else high)
        return (
            x
            if low is None and high is None
            else torch.clamp(x, None if low is None else float(low), None if high is None else float(high))
        )

    return compute


@operator("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Min", "Max", "Sum", "Mean")
def _binary(a: Attributes) -> Callable[..., Any]:
    kind = a.node.op_type
    if kind == "Div":
        return lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")
    if kind in ("Min", "Max"):
        return lambda *v: reduce(torch.minimum if kind == "Min" else torch.maximum, v)
    if kind == "Mean":
        return lambda *v: reduce(torch.add, v) / len(v)
    if kind == "Sum":
        return lambda *v: reduce(torch.add, v)
    named: dict[str, Callable[..., Any]] = {
        "Add": torch.add,
        "Sub": torch.sub,
        "Mul": torch.mul,
        "Pow": torch.pow,
        "MatMul": torch.matmul,
    }
    return named[kind]


@operator("Einsum")
def _einsum(a: Attributes) -> Callable[..., Any]:
    return lambda *v: torch.einsum(a.get("equation"), *v)
