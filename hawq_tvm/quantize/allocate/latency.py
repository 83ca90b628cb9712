"""Times of every layer's kernel in every choice of bits, on this machine, from kernels compiled as `compile` does.

A layer is written as a quantized model of its own (quantize, the layer, quantize), and the kernel that multiplies is
timed: its bias, requantization and clamp are in it, what comes before and after is not. A network's latency is taken
to be the sum of its layers'.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from hawq_tvm.compiler import pipeline
from hawq_tvm.core.errors import HawqError, ModelError
from hawq_tvm.frontend.common.inputs import example
from hawq_tvm.measure import machine
from hawq_tvm.measure.measure import checked_threads
from hawq_tvm.measure.race import time_each
from hawq_tvm.quantize.network.float_graph import FloatGraph, Layer
from hawq_tvm.tuning import tuner

from .sensitivity import Progress, Step
from .table import CHOICES, check_kernels, widths

OPSET = 21
TYPES = {
    (8, False): TensorProto.UINT8,
    (8, True): TensorProto.INT8,
    (4, False): TensorProto.UINT4,
    (4, True): TensorProto.INT4,
}


@dataclass(frozen=True)
class LatencyReport:
    """Microseconds and kernel rules by layer and choice, and where they were measured."""

    latencies: dict[str, dict[str, float]]
    rules: dict[str, dict[str, str]]
    counts: dict[str, tuple[int, int]]
    target: str
    threads: int
    batch: int
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields; `layers` as a table of the allocator has them, but for sensitivities."""
        layers = {
            name: {
                "parameters": self.counts[name][0],
                "macs": self.counts[name][1],
                "latency_us": values,
                "rule": self.rules[name],
            }
            for name, values in self.latencies.items()
        }
        return {
            "target": self.target,
            "threads": self.threads,
            "batch": self.batch,
            "machine": self.machine,
            "choices": list(next(iter(self.latencies.values()))),
            "layers": layers,
        }


def measure_latencies(
    graph: FloatGraph,
    target: str = "host",
    *,
    threads: int | None = None,
    choices: Sequence[str] = CHOICES,
    progress: Progress | None = None,
) -> LatencyReport:
    """Time every layer in every choice; layers of one structure are measured once.

    Raises UsageError for a target that this machine cannot run, ModelError for a layer that cannot be compiled.
    """
    parsed, count = tuner.runnable(target), checked_threads(0, 0, 1, threads)
    shapes, outputs = _shapes(graph)
    groups: dict[Any, list[Layer]] = {}
    for layer in graph.layers:
        weight = graph.parameters[layer.weight]
        key = (
            layer.kind,
            tuple(weight.shape),
            layer.channel_axis,
            shapes[layer.name],
            layer.group,
            layer.strides,
            layer.dilations,
            layer.before,
            layer.after,
            layer.extra,
            bool(layer.bias),
        )
        groups.setdefault(key, []).append(layer)
    tell, start = progress or (lambda step: None), time.monotonic()
    latencies: dict[str, dict[str, float]] = {}
    rules: dict[str, dict[str, str]] = {}
    for done, layers in enumerate(groups.values()):
        tell(
            Step(
                "kernels",
                done,
                len(groups),
                None,
                (time.monotonic() - start) / done * (len(groups) - done) if done else None,
            )
        )
        contenders = []
        for choice in choices:
            model = layer_model(layers[0], graph.parameters[layers[0].weight], shapes[layers[0].name], choice)
            try:
                contenders.append(tuner.main_kernel(pipeline.to_packed(pipeline.import_annotated(model)), parsed))
            except HawqError as e:
                raise ModelError(f"cannot be compiled as {choice}: {e}", where=layers[0].name) from e
        times = time_each([c for c, _ in contenders], parsed, count)
        for layer in layers:
            latencies[layer.name] = {c: round(t, 3) for c, t in zip(choices, times, strict=True)}
            rules[layer.name] = {c: rule for c, (_, rule) in zip(choices, contenders, strict=True)}
    tell(Step("kernels", len(groups), len(groups)))
    ordered = [one.name for one in graph.layers]
    counts = {}
    for layer in graph.layers:
        weight = graph.parameters[layer.weight]
        counts[layer.name] = (weight.numel(), graph.products(layer, outputs[layer.name]))
    return LatencyReport(
        {n: latencies[n] for n in ordered},
        {n: rules[n] for n in ordered},
        counts,
        target,
        count,
        graph.batch or 1,
        machine.describe(),
    )


def _shapes(graph: FloatGraph) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    """The shape of every layer's input for the model's batch (1 where it leaves that open), and its output elements
    for one image.
    """
    inputs = {}
    for one in graph.inputs:
        shape = tuple(d or (1 if i == 0 else 0) for i, d in enumerate(one.shape))
        if 0 in shape:
            given: list[int | str] = ["?" if d is None else d for d in one.shape]
            raise ModelError(
                "leaves a dimension open besides the batch",
                where=one.name,
                expected="numbers",
                found="x".join(map(str, given)),
                remedy=f"pass --shape {one.name}={example(given)}",
            )
        inputs[one.name] = torch.zeros(shape, dtype=getattr(torch, one.dtype))
    nodes = {one.node: one for one in graph.layers}
    made = {one.output: one for one in graph.layers}
    shapes: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, int] = {}

    def feed(node: str, operand: int, value: Any) -> None:
        if node in nodes and operand == next(n for n in graph.nodes if n.name == node).inputs.index(nodes[node].input):
            shapes[nodes[node].name] = tuple(value.shape)

    def record(name: str, value: Any) -> None:
        if name in made:
            outputs[made[name].name] = value.numel() // len(value)

    with torch.no_grad():
        graph.run(inputs, record=record, feed=feed)
    return shapes, outputs


def layer_model(layer: Layer, weight: torch.Tensor, shape: Sequence[int], choice: str) -> onnx.ModelProto:
    """A quantized ONNX model of one layer: unsigned activations of the choice's bits before and after, signed
    weights per output channel.

    Raises UsageError for bits without kernels.
    """
    weight_bits, activation_bits = widths(choice)
    check_kernels((weight_bits, activation_bits), choice)
    kind = TYPES[4 if weight_bits <= 4 else 8, True]
    rng, top = np.random.default_rng(0), 2 ** (weight_bits - 1) - 1
    dims, axis = list(weight.shape), layer.channel_axis
    if layer.kind == "matmul" and axis == 0:  # stored as (out, in)
        dims, axis = dims[::-1], 1
    values = rng.integers(-top - 1, top, dims, endpoint=True).ravel().tolist()
    channels, unsigned = dims[axis] * layer.repeats, TYPES[activation_bits, False]
    # Of the size that keeps results inside the range: the products of random codes add up like their square root.
    products = max(1, int(np.prod(dims)) // channels)
    scale = 1.0 / (products**0.5 * top)
    tensors = [
        helper.make_tensor("w", kind, dims, values),
        helper.make_tensor("ws", TensorProto.FLOAT, [dims[axis]], [scale] * dims[axis]),
        helper.make_tensor("wz", kind, [dims[axis]], [0] * dims[axis]),
        helper.make_tensor("s", TensorProto.FLOAT, [], [0.03]),
        helper.make_tensor("z", unsigned, [], [0]),
        helper.make_tensor("b", TensorProto.FLOAT, [channels], [0.1] * channels),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
    ]
    nodes.append(helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis))
    if layer.kind == "deconv" and not layer.before:
        remedy = "give the transposed convolution pads instead of auto_pad or output_shape"
        raise ModelError(
            "hangs on the size of its input, so that it has no time of its own", where=layer.name, remedy=remedy
        )
    if layer.kind != "matmul":
        window: dict[str, Any] = {
            "strides": layer.strides,
            "dilations": layer.dilations,
            "pads": [*layer.before, *layer.after],
            "group": layer.group,
        }
        if layer.kind == "deconv":
            window["output_padding"] = layer.extra
        op = "ConvTranspose" if layer.kind == "deconv" else "Conv"
        nodes.append(helper.make_node(op, ["xd", "wd", "b"], ["y"], **window))
    else:
        nodes += [helper.make_node("MatMul", ["xd", "wd"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    nodes += [
        helper.make_node("QuantizeLinear", ["y", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["out"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_empty_tensor_value_info("out")],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
