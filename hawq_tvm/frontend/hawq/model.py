"""A checkpoint taken apart: which network it is, and every layer's integers and scales, checked one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import ModelError, UsageError
from hawq_tvm.frontend.common.values import Array

from .bits import configuration
from .networks import CONV, NAMES, Act, Network, Weighted, network
from .reader import KINDS, WRITE, read_tensors
from .source import Checkpoint

# HAWQ clamps biases in float32, whose number nearest to 2^31 - 1 is 2^31: channels that training left dead have it, and
# scales of 1e-10.
BIAS_LIMIT = 2**31


@dataclass(frozen=True)
class Layer:
    """A layer's integers and scales: weight (int16), bias of one value per output (int64), scale of one or one per
    output (float32).
    """

    weight: Array
    bias: Array | None
    scale: Array


@dataclass(frozen=True)
class Model:
    """A checked checkpoint.

    bits, origin: every layer's bits, and where they come from.  layers: by name.  scales: of the activations, in
    float32, by layer.
    """

    where: str
    net: Network
    bits: dict[str, int]
    origin: str
    layers: dict[str, Layer]
    scales: dict[str, np.float32]


def read_model(source: Any) -> Model:
    """The model of a Checkpoint, a path or bytes; a Model is returned as it is.

    Raises ModelError naming the tensor that is missing or wrong, UsageError for an unknown network or a wrong
    configuration of bits.
    """
    if isinstance(source, Model):
        return source
    given = (
        source if isinstance(source, Checkpoint) else Checkpoint(source if isinstance(source, bytes) else Path(source))
    )
    tensors, arch = read_tensors(given.path, given.where)
    net = _network(given, tensors, arch)
    strangers = {n.rpartition(".")[0] for n in tensors} - {w.layer for w in net.weighted} - {a.layer for a in net.acts}
    if strangers:
        raise ModelError(
            f"holds a layer that {net.name} does not have",
            where=given.where,
            expected=f"the layers of HAWQ's {net.name}",
            found=sorted(strangers)[0],
            remedy="say which network it is (--network), if it is another",
        )
    layers = {w.layer: _layer(w, tensors) for w in net.weighted}
    scales = {a.layer: _scale(tensors, f"{a.layer}.act_scaling_factor", (1,))[0] for a in net.acts}
    bits, origin = configuration(net, given.bits, {name: layer.weight for name, layer in layers.items()})
    return Model(given.where, net, bits, origin, layers, scales)


# -- which network -----------------------------------------------------------------------------------------


def _network(given: Checkpoint, tensors: Mapping[str, Array], arch: str) -> Network:
    if given.network is not None:
        if given.network not in NAMES:
            raise UsageError(
                "is no network of HAWQ",
                where=f"--network {given.network}",
                expected=", ".join(NAMES),
                found=given.network,
            )
        return network(given.network)
    if arch in NAMES:
        return network(arch)
    shapes = {n.rpartition(".")[0]: t.shape for n, t in tensors.items() if n.endswith(".weight_integer")}
    fits = [name for name in NAMES if _fits(network(name), shapes)]
    if len(fits) == 1:
        return network(fits[0])
    if fits:
        raise ModelError(
            f"fits {' and '.join(fits)}, whose tensors have the same names and shapes",
            where=given.where,
            expected="one network",
            found=str(len(fits)),
            remedy=f"say which it is: --network {fits[0]}, or hawq_checkpoint(path, network={fits[0]!r})",
        )
    nearest = max(NAMES, key=lambda name: len(shapes.keys() & {w.layer for w in network(name).weighted}))
    if not shapes.keys() & {w.layer for w in network(nearest).weighted}:
        raise ModelError(
            "is of a network that is not known here",
            where=given.where,
            expected=", ".join(NAMES),
            found=f"layers such as {next(iter(shapes))}",
            remedy="export the network as ONNX with QuantizeLinear and DequantizeLinear, or as a PT2E program",
        )
    return network(nearest)  # what is missing or wrong is then named tensor by tensor


def _fits(net: Network, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return shapes.keys() == {w.layer for w in net.weighted} and all(
        _same(shapes[w.layer], w.shape) for w in net.weighted
    )


def _same(found: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    return len(found) == len(expected) and all(e in (None, f) for f, e in zip(found, expected, strict=True))


# -- its tensors -------------------------------------------------------------------------------------------


def _tensor(tensors: Mapping[str, Array], name: str) -> Array:
    if name in tensors:
        return tensors[name]
    layer, _, kind = name.rpartition(".")
    there = [k for k in KINDS if f"{layer}.{k}" in tensors]
    remedy = (
        "save it under this name in any section of the file, or give checkpoint.pth.tar, whose state_dict has it: HAWQ"
        f" leaves {CONV} out"
        if kind == CONV
        else WRITE
    )
    raise ModelError(
        "is missing from the checkpoint",
        where=name,
        expected=f"a tensor of {kind}",
        found=f"of this layer: {', '.join(there) or 'nothing'}",
        remedy=remedy,
    )


def _integers(tensors: Mapping[str, Array], name: str, shape: tuple[int | None, ...], limit: int) -> Array:
    array = _tensor(tensors, name)
    if not _same(array.shape, shape):
        expected = "x".join("classes" if d is None else str(d) for d in shape)
        raise ModelError(
            "has the wrong shape",
            where=name,
            expected=expected,
            found="x".join(map(str, array.shape)) or "a scalar",
            remedy="check the network (--network) and where the file comes from",
        )
    wrong = ~np.isfinite(array) | (array != np.rint(array))
    if np.any(wrong):
        raise ModelError(
            "holds numbers that are not integers",
            where=name,
            expected="whole numbers",
            found=f"{np.count_nonzero(wrong)} of {array.size}, first {array[wrong][0]:g}",
            remedy=WRITE,
        )
    if array.size == 0 or np.max(np.abs(array)) > limit:
        raise ModelError(
            "is out of range",
            where=name,
            expected=f"magnitudes of at most {limit}",
            found=f"{np.max(np.abs(array), initial=0):g}",
            remedy=WRITE,
        )
    return array.astype(np.int16 if limit < 2**15 else np.int64)


def _scale(tensors: Mapping[str, Array], name: str, sizes: tuple[int, ...]) -> Array:
    array = _tensor(tensors, name).reshape(-1)
    if array.size not in sizes:
        raise ModelError(
            "has the wrong shape",
            where=name,
            expected=" or ".join(str(s) for s in sorted(set(sizes))) + " values",
            found=str(array.size),
            remedy=WRITE,
        )
    narrow = array.astype(np.float32)
    wrong = ~(np.isfinite(narrow) & (narrow > 0) & (narrow == array))
    if np.any(wrong):
        raise ModelError(
            "is no scale",
            where=name,
            expected="positive numbers in float32",
            found=f"{array[wrong][0]:g}",
            remedy=f"calibrate first: {WRITE}",
        )
    return narrow


def _layer(step: Weighted, tensors: Mapping[str, Array]) -> Layer:
    weight = _integers(tensors, f"{step.layer}.weight_integer", step.shape, 2**7)
    outputs = weight.shape[0]
    bias = (
        np.clip(
            _integers(tensors, f"{step.layer}.bias_integer", (outputs,), BIAS_LIMIT), 1 - BIAS_LIMIT, BIAS_LIMIT - 1
        )
        if step.bias
        else None
    )
    return Layer(weight, bias, _scale(tensors, f"{step.layer}.{step.scale}", (1, outputs)))


__all__ = ["Act", "Layer", "Model", "read_model"]
