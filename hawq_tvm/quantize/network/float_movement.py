"""The ONNX operators of a float graph that move elements, choose among them or compute shapes, as torch functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from onnx import helper, numpy_helper

from hawq_tvm.frontend.onnx.resize import plans_of

from .float_operators import Attributes, Tensor, as_tensor, operator, padded


@operator("Constant")
def _constant(a: Attributes) -> Callable[..., Any]:
    kind, value = next(iter(a.values.items()), ("", cast(Any, None)))
    types = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    if kind not in ("value", *types):
        raise a.fail(f"with {kind or 'no value'} is not known here")
    made = as_tensor(np.asarray(value, types[kind]) if kind in types else numpy_helper.to_array(value))
    return lambda: made


@operator("ConstantOfShape")
def _constant_of_shape(a: Attributes) -> Callable[..., Any]:
    given: Any = a.get("value")
    value = as_tensor(numpy_helper.to_array(given)) if given is not None else torch.zeros(1)
    return lambda shape: value.expand(tuple(shape.tolist())).clone()


@operator("Concat")
def _concat(a: Attributes) -> Callable[..., Any]:
    return lambda *v: torch.cat(v, a.get("axis"))


@operator("Flatten")
def _flatten(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor) -> Tensor:
        axis = a.get("axis", 1)
        axis += x.ndim if axis < 0 else 0
        return x.reshape(int(np.prod(x.shape[:axis])), -1)

    return compute


@operator("Reshape")
def _reshape(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, shape: Tensor) -> Tensor:
        keep = not a.get("allowzero", 0)
        return x.reshape([x.shape[i] if d == 0 and keep else d for i, d in enumerate(shape.tolist())])

    return compute


@operator("Transpose")
def _transpose(a: Attributes) -> Callable[..., Any]:
    return lambda x: x.permute(a.get("perm") or tuple(reversed(range(x.ndim))))


@operator("Squeeze")
def _squeeze(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.tolist()
        return x.squeeze() if given is None else x.squeeze(tuple(given))

    return compute


@operator("Unsqueeze")
def _unsqueeze(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, axes: Tensor | None = None) -> Tensor:
        given = a.get("axes") if axes is None else axes.reshape(-1).tolist()
        for axis in sorted(d % (x.ndim + len(given)) for d in given):
            x = x.unsqueeze(axis)
        return x

    return compute


@operator("Pad")
def _pads(a: Attributes) -> Callable[..., Any]:
    mode = a.get("mode", "constant")
    if mode not in ("constant", "reflect", "edge", "wrap"):
        raise a.fail(f"in mode {mode!r} is not known here", expected="constant, edge, reflect or wrap")

    def compute(
        x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None
    ) -> Tensor:
        given = a.get("pads") if pads is None else pads.tolist()
        chosen = range(x.ndim) if axes is None else [d % x.ndim for d in axes.tolist()]
        before, after = [0] * x.ndim, [0] * x.ndim
        for i, axis in enumerate(chosen):
            before[axis], after[axis] = given[i], given[i + len(given) // 2]
        if mode == "constant":
            fill = a.get("value", 0.0) if value is None else float(value)
            return padded(x, tuple(before), tuple(after), fill)
        for axis, ends in enumerate(zip(before, after, strict=True)):
            places = np.arange(-min(ends[0], 0), x.shape[axis] + min(ends[1], 0))
            if any(ends):
                x = x.index_select(axis, torch.from_numpy(np.pad(places, np.maximum(ends, 0), mode)))
        return x

    return compute


@operator("Size")
def _size(a: Attributes) -> Callable[..., Any]:
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


@operator("Shape")
def _shape(a: Attributes) -> Callable[..., Any]:
    return lambda x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


@operator("Gather")
def _gather(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, indices: Tensor) -> Tensor:
        axis = a.get("axis", 0) % x.ndim
        flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1)
        return x.index_select(axis, flat).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))

    return compute


@operator("Slice")
def _slice(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, *given: Tensor | None) -> Tensor:
        named = [a.get(n) for n in ("starts", "ends", "axes")]  # attributes before opset 10
        lists = [v.tolist() if v is not None else None for v in given] or named
        first, ends, axes, steps = (*lists, None, None)[:4]
        chosen = axes or range(len(first))
        for start, end, axis, step in zip(first, ends, chosen, steps or [1] * len(first), strict=True):
            picked = (
                torch.arange(x.shape[axis])[slice(start, end, step)]
                if step > 0
                else torch.tensor(list(range(x.shape[axis]))[start:end:step])
            )
            x = x.index_select(axis, picked)
        return x

    return compute


@operator("Split")
def _split(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
        axis, parts = a.get("axis", 0), len(a.node.output)
        given = a.get("split") if sizes is None else sizes.tolist()
        return x.split(given if given is not None else -(-x.shape[axis] // parts), axis)

    return compute


@operator("Expand")
def _expand(a: Attributes) -> Callable[..., Any]:
    return lambda x, shape: x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


@operator("Tile")
def _tile(a: Attributes) -> Callable[..., Any]:
    return lambda x, repeats: x.repeat(tuple(repeats.tolist()))


@operator("DepthToSpace", "SpaceToDepth")
def _depth_and_space(a: Attributes) -> Callable[..., Any]:
    block, columns_first = a.get("blocksize"), a.get("mode", "DCR") == "CRD"

    def to_space(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        parts = (n, c // block**2, block, block, h, w) if columns_first else (n, block, block, c // block**2, h, w)
        order = (0, 1, 4, 2, 5, 3) if columns_first else (0, 3, 4, 1, 5, 2)
        return x.reshape(parts).permute(order).reshape(n, c // block**2, h * block, w * block)

    def to_depth(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, c * block**2, h // block, w // block)

    return to_space if a.node.op_type == "DepthToSpace" else to_depth


@operator("Resize", "Upsample")
def _resize(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, *given: Tensor | None) -> Tensor:
        for axis, (places, part, whole) in plans_of(a.node, a.opset, x.shape, given).items():
            low = x.index_select(axis, torch.from_numpy(places))
            if part.any():
                high = x.index_select(axis, torch.from_numpy(np.minimum(places + 1, x.shape[axis] - 1)))
                weights = (
                    torch.from_numpy(part / whole).to(x.dtype).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
                )
                low = low + (high - low) * weights
            x = low
        return x

    return compute


@operator("Equal", "Where")
def _chosen(a: Attributes) -> Callable[..., Any]:
    return torch.eq if a.node.op_type == "Equal" else torch.where


@operator("ArgMax", "ArgMin")
def _argument(a: Attributes) -> Callable[..., Any]:
    function = torch.argmax if a.node.op_type == "ArgMax" else torch.argmin
    return lambda x: function(x, a.get("axis", 0), bool(a.get("keepdims", 1)))


@operator("CastLike")
def _cast_like(a: Attributes) -> Callable[..., Any]:
    return lambda x, like: x.to(like.dtype)


@operator("Cast")
def _cast(a: Attributes) -> Callable[..., Any]:
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(a.get("to"))).name
    wanted = getattr(torch, kind, None)
    if wanted is None:
        raise a.fail(f"to {kind} is not known here")
    return lambda x: x.to(wanted)
