"""The ONNX operators that a float graph may have, as torch functions: one entry per operator."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper

from ..errors import ModelError
from .grouped import convolution

Tensor = torch.Tensor


class Attributes:
    """The attributes of one node, and its errors."""

    def __init__(self, node: onnx.NodeProto, opset: int) -> None:
        self.node, self.opset, self.name = node, opset, node.name or next(iter(node.output), node.op_type)
        self.values = {a.name: helper.get_attribute_value(a) for a in node.attribute}

    def get(self, name: str, default: Any = None) -> Any:
        value = self.values.get(name, default)
        return value.decode() if isinstance(value, bytes) else value

    def fail(self, message: str, *, expected: str = "", found: str = "", remedy: str = "") -> ModelError:
        return ModelError(f"{self.node.op_type} {message}", where=self.name, expected=expected, found=found, remedy=remedy)


Maker = Callable[[Attributes], Callable[..., Any]]
OPERATORS: dict[str, Maker] = {}


def _operator(*names: str) -> Callable[[Maker], Maker]:
    def register(make: Maker) -> Maker:
        OPERATORS.update(dict.fromkeys(names, make))
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
        raise attributes.fail("has a padding that is not understood", expected=f"{2 * rank} numbers", found=f"{pads}, auto_pad {auto}")
    if auto.startswith("SAME") and any(s != 1 for s in attributes.get("strides", [1])):
        raise attributes.fail(f"has auto_pad {auto} and strides", remedy="run onnx shape inference and write the padding as numbers")
    if auto.startswith("SAME"):
        kernel, dilations = attributes.get("kernel_shape"), per_axis(attributes, "dilations", rank)
        if kernel is None:
            raise attributes.fail("has auto_pad but no kernel_shape")
        total = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
        less, more = tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
        return (less, more) if auto == "SAME_UPPER" else (more, less)
    return tuple(int(p) for p in pads[:rank]), tuple(int(p) for p in pads[rank:])


def _pad(x: Tensor, before: tuple[int, ...], after: tuple[int, ...], value: float = 0.0) -> Tensor:
    flat = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


# -- operators ------------------------------------------------------------------------------------------------------------


@_operator("Conv")
def _conv(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        before, after = padding_of(a, rank)
        symmetric = before == after
        padding = before if symmetric else (0,) * rank
        y = x if symmetric else _pad(x, before, after)
        return convolution(y, w, b, per_axis(a, "strides", rank), padding, per_axis(a, "dilations", rank), int(a.get("group", 1)))

    return compute


@_operator("Gemm")
def _gemm(a: Attributes) -> Callable[..., Any]:
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)

    def compute(x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
        y = (x.T if a.get("transA", 0) else x) @ (w.T if a.get("transB", 0) else w)
        y = y if alpha == 1 else alpha * y
        return y if c is None else y + (c if beta == 1 else beta * c)

    return compute


@_operator("BatchNormalization")
def _batch_norm(a: Attributes) -> Callable[..., Any]:
    if a.get("training_mode", 0):
        raise a.fail("is in training mode", remedy="export the model in evaluation mode")
    return lambda x, gamma, beta, mean, var: F.batch_norm(x, mean, var, gamma, beta, False, 0.0, a.get("epsilon", 1e-5))


@_operator("MaxPool")
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
        y = x if own else _pad(x, before, after, float("-inf"))
        padding = before if own else (0,) * rank
        return function(y, a.get("kernel_shape"), per_axis(a, "strides", rank), padding, per_axis(a, "dilations", rank), bool(a.get("ceil_mode", 0)))

    return compute


@_operator("AveragePool")
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
        mean = function(_pad(x, before, after), kernel, strides)
        return mean if counts_padding else mean / function(_pad(torch.ones_like(x), before, after), kernel, strides)

    return compute


@_operator("GlobalAveragePool")
def _global_average(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


@_operator("GlobalMaxPool")
def _global_max(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)


@_operator("ReduceMean", "ReduceSum")
def _reduce(a: Attributes) -> Callable[..., Any]:
    function = torch.mean if a.node.op_type == "ReduceMean" else torch.sum

    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.tolist()
        if not given and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(given or range(x.ndim)), keepdim=bool(a.get("keepdims", 1)))

    return compute


@_operator("Relu", "Sigmoid", "Tanh", "Exp", "Log", "Sqrt", "Neg", "Abs", "Erf", "Reciprocal", "Softplus", "Floor", "Ceil", "Identity", "Dropout")
def _unary(a: Attributes) -> Callable[..., Any]:
    named = {"Softplus": F.softplus, "Relu": torch.relu}
    if a.node.op_type in ("Identity", "Dropout"):
        return lambda x, *_: x
    return named.get(a.node.op_type) or getattr(torch, a.node.op_type.lower())


@_operator("LeakyRelu", "Elu", "HardSigmoid", "HardSwish", "Gelu", "Mish", "Selu")
def _activation(a: Attributes) -> Callable[..., Any]:
    kind = a.node.op_type
    if kind == "LeakyRelu":
        return lambda x: F.leaky_relu(x, a.get("alpha", 0.01))
    if kind == "Elu":
        return lambda x: F.elu(x, a.get("alpha", 1.0))
    if kind == "HardSigmoid":
        return lambda x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1)
    if kind == "HardSwish":
        return lambda x: x * (x / 6 + 0.5).clamp(0, 1)
    if kind == "Gelu":
        return lambda x: F.gelu(x, approximate=a.get("approximate", "none"))
    if kind == "Selu" and a.values:
        raise a.fail("with its own alpha or gamma is not known here")
    return F.mish if kind == "Mish" else F.selu


@_operator("PRelu")
def _prelu(a: Attributes) -> Callable[..., Any]:
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@_operator("Clip")
def _clip(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        low, high = (a.get("min") if low is None else low), (a.get("max") if high is None else high)
        return x if low is None and high is None else torch.clamp(x, None if low is None else float(low), None if high is None else float(high))

    return compute


@_operator("Add", "Sub", "Mul", "Div", "Pow", "MatMul", "Min", "Max", "Sum", "Equal", "Where")
def _binary(a: Attributes) -> Callable[..., Any]:
    kind = a.node.op_type
    if kind == "Div":
        return lambda x, y: x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")
    if kind in ("Min", "Max"):
        return lambda *v: reduce(torch.minimum if kind == "Min" else torch.maximum, v)
    if kind == "Sum":
        return lambda *v: reduce(torch.add, v)
    named: dict[str, Callable[..., Any]] = {
        "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Pow": torch.pow, "MatMul": torch.matmul, "Equal": torch.eq, "Where": torch.where,
    }  # fmt: skip
    return named[kind]


@_operator("Softmax", "LogSoftmax")
def _softmax(a: Attributes) -> Callable[..., Any]:
    function = torch.softmax if a.node.op_type == "Softmax" else torch.log_softmax
    axis = a.get("axis", -1 if a.opset >= 13 else 1)

    def flat(x: Tensor) -> Tensor:  # before opset 13 all axes from `axis` on are one
        return function(x.flatten(axis % x.ndim), -1).reshape(x.shape)

    def along(x: Tensor) -> Tensor:
        return function(x, axis)

    return along if a.opset >= 13 else flat


# -- shapes and movement --------------------------------------------------------------------------------------------------


@_operator("Constant")
def _constant(a: Attributes) -> Callable[..., Any]:
    kind, value = next(iter(a.values.items()), ("", cast(Any, None)))
    types = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if kind not in ("value", *types):
        raise a.fail(f"with {kind or 'no value'} is not known here")
    made = as_tensor(np.asarray(value, types[kind]) if kind in types else numpy_helper.to_array(value))
    return lambda: made


@_operator("ConstantOfShape")
def _constant_of_shape(a: Attributes) -> Callable[..., Any]:
    given: Any = a.get("value")
    value = as_tensor(numpy_helper.to_array(given)) if given is not None else torch.zeros(1)
    return lambda shape: value.expand(tuple(shape.tolist())).clone()


@_operator("Concat")
def _concat(a: Attributes) -> Callable[..., Any]:
    return lambda *v: torch.cat(v, a.get("axis"))


@_operator("Flatten")
def _flatten(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor) -> Tensor:
        axis = a.get("axis", 1)
        axis += x.ndim if axis < 0 else 0
        return x.reshape(int(np.prod(x.shape[:axis])), -1)

    return compute


@_operator("Reshape")
def _reshape(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, shape: Tensor) -> Tensor:
        keep = not a.get("allowzero", 0)
        return x.reshape([x.shape[i] if d == 0 and keep else d for i, d in enumerate(shape.tolist())])

    return compute


@_operator("Transpose")
def _transpose(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.permute(a.get("perm") or tuple(reversed(range(x.ndim))))


@_operator("Squeeze")
def _squeeze(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.tolist()
        return x.squeeze() if given is None else x.squeeze(tuple(given))

    return compute


@_operator("Unsqueeze")
def _unsqueeze(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.reshape(-1).tolist()
        for axis in sorted(d % (x.ndim + len(given)) for d in given):
            x = x.unsqueeze(axis)
        return x

    return compute


@_operator("Pad")
def _pads(a: Attributes) -> Callable[..., Any]:
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate"}
    mode = a.get("mode", "constant")
    if mode not in modes:
        raise a.fail(f"in mode {mode!r} is not known here", expected=", ".join(modes))

    def compute(x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        given = a.get("pads") if pads is None else pads.tolist()
        chosen = range(x.ndim) if axes is None else [d % x.ndim for d in axes.tolist()]
        before, after = [0] * x.ndim, [0] * x.ndim
        for i, axis in enumerate(chosen):
            before[axis], after[axis] = given[i], given[i + len(given) // 2]
        fill = a.get("value", 0.0) if value is None else float(value)
        if mode == "constant":
            return _pad(x, tuple(before), tuple(after), fill)
        flat = [p for pair in zip(reversed(before[2:]), reversed(after[2:]), strict=True) for p in pair]
        return F.pad(x, flat, mode=modes[mode])

    return compute


@_operator("Shape")
def _shape(a: Attributes) -> Callable[..., Any]:
    return lambda x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


@_operator("Gather")
def _gather(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, indices: Tensor) -> Tensor:
        axis = a.get("axis", 0) % x.ndim
        flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1)
        return x.index_select(axis, flat).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))

    return compute


@_operator("Slice")
def _slice(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        first = starts.tolist()
        chosen = list(range(len(first))) if axes is None else axes.tolist()
        strides = [1] * len(first) if steps is None else steps.tolist()
        for start, end, axis, step in zip(first, ends.tolist(), chosen, strides, strict=True):
            picked = torch.arange(x.shape[axis])[slice(start, end, step)] if step > 0 else torch.tensor(list(range(x.shape[axis]))[start:end:step])
            x = x.index_select(axis, picked)
        return x

    return compute


@_operator("Split")
def _split(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        axis, parts = a.get("axis", 0), len(a.node.output)
        given = a.get("split") if sizes is None else sizes.tolist()
        return x.split(given if given is not None else -(-x.shape[axis] // parts), axis)

    return compute


@_operator("Expand")
def _expand(a: Attributes) -> Callable[..., Any]:
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


@_operator("Cast")
def _cast(a: Attributes) -> Callable[..., Any]:
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(a.get("to"))).name
    wanted = getattr(torch, kind, None)
    if wanted is None:
        raise a.fail(f"to {kind} is not known here")
    return lambda x: x.to(wanted)
