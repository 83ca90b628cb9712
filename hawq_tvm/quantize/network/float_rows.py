"""The ONNX operators of a float graph that read whole rows, as torch functions: softmax, attention, normalizations by a
tensor's own statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from .float_operators import Attributes, Tensor, operator
from .float_reference import by_reference


@operator("Softmax", "LogSoftmax")
def _softmax(a: Attributes) -> Callable[..., Any]:
    function = torch.softmax if a.node.op_type == "Softmax" else torch.log_softmax
    axis = a.get("axis", -1 if a.opset >= 13 else 1)

    def flat(x: Tensor) -> Tensor:  # before opset 13 all axes from `axis` on are one
        return function(x.flatten(axis % x.ndim), -1).reshape(x.shape)

    def along(x: Tensor) -> Tensor:
        return function(x, axis)

    return along if a.opset >= 13 else flat


@operator("LayerNormalization")
def _layer_norm(a: Attributes) -> Callable[..., Any]:
    if len([o for o in a.node.output if o]) > 1:
        raise a.fail("gives its statistics", expected="one output")

    def compute(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
        shape = x.shape[a.get("axis", -1) % x.ndim :]
        y = F.layer_norm(x, shape, None, None, a.get("epsilon", 1e-5)) * scale
        return y if bias is None else y + bias

    return compute


@operator("InstanceNormalization")
def _instance_norm(a: Attributes) -> Callable[..., Any]:
    return lambda x, scale, bias: F.instance_norm(x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        repeats = x.shape[1] // len(scale)  # before opset 21 they are one number per group
        scale, bias = scale.repeat_interleave(repeats), bias.repeat_interleave(repeats)
        return F.group_norm(x, a.get("num_groups"), scale, bias, a.get("epsilon", 1e-5))

    return compute


@operator("RMSNormalization")
def _rms_norm(a: Attributes) -> Callable[..., Any]:
    def compute(x: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[a.get("axis", -1) % x.ndim :], None, a.get("epsilon", 1e-5)) * scale

    return compute


@operator("Attention")
def _attention(a: Attributes) -> Callable[..., Any]:
    windows = any(a.get(f"{side}_window_size", -1) != -1 for side in ("left", "right"))
    if any([*a.node.input[4:], *a.node.output[1:], a.get("softcap", 0.0), windows]):
        return by_reference(a)  # which the importer refuses

    def compute(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        flat = q.ndim == 3
        if flat:
            counts = a.get("q_num_heads"), a.get("kv_num_heads"), a.get("kv_num_heads")
            q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), counts, strict=True))
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * (a.get("scale") or 1 / math.sqrt(q.shape[-1]))
        shown = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        shown = shown.tril() if a.get("is_causal", 0) else shown
        if mask is not None and mask.dtype == torch.bool:
            shown = shown & mask
        elif mask is not None:
            scores = scores + mask
        # Nothing of a row that is masked everywhere, and no gradient of infinities.
        p = scores.masked_fill(~shown, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~shown, 0.0)
        y = p @ v
        return y.transpose(1, 2).flatten(2) if flat else y

    return compute
