"""Mutated models: each is imported or refused with a ModelError; nothing else is raised, and nothing takes long."""

from __future__ import annotations

import random
import time

import numpy as np
import onnx
import pytest
from onnx import helper

from hawq_tvm import stages
from hawq_tvm.errors import ModelError
from hawq_tvm.frontend.onnx import describe_onnx, import_onnx
from hawq_tvm.frontend.onnx.node import HANDLERS

from .onnx_models import graph_model, normal

F = np.float32
SECONDS = 5.0


def seed_model(opset: int) -> onnx.ModelProto:
    """A small quantized network that touches most handlers."""
    pairs = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"], name="q"), helper.make_node("MaxPool", ["xq"], ["p"], name="pool", kernel_shape=[2, 2], pads=[1, 0, 0, 1]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["xd"], name="dq"), helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], name="dqw", axis=0),
        helper.make_node("Conv", ["xd", "wd", "b"], ["c"], name="conv", pads=[1, 1, 1, 1], strides=[2, 1], group=2),
        helper.make_node("BatchNormalization", ["c", "one", "b", "b", "one"], ["n"], name="bn"), helper.make_node("Clip", ["n", "lo", "hi"], ["r"], name="clip"),
        helper.make_node("Resize", ["r", "", "scales"], ["u"], name="up", mode="linear"), helper.make_node("Slice", ["u", "begin", "end", "axes"], ["cut"], name="cut"),
        helper.make_node("Pad", ["cut", "pads", ""], ["padded"], name="pad", mode="edge"), helper.make_node("Concat", ["padded", "padded"], ["cat"], name="cat", axis=1),
        helper.make_node("AveragePool", ["cat"], ["avg"], name="avg", kernel_shape=[2, 2], ceil_mode=1, strides=[2, 2]),
        helper.make_node("Shape", ["avg"], ["shape"], name="shape"), helper.make_node("Gather", ["shape", "first"], ["batch"], name="batch"),
        helper.make_node("Concat", ["batch", "rest"], ["to"], name="to", axis=0), helper.make_node("Reshape", ["avg", "to"], ["flat"], name="flat"),
        helper.make_node("QuantizeLinear", ["flat", "s", "z"], ["fq"], name="fq"),
        helper.make_node("QGemm", ["fq", "s", "z", "g", "s", "gz", "", "s", "z"], ["y8"], name="gemm", domain="com.microsoft", transB=1),
        helper.make_node("QLinearSigmoid", ["y8", "s", "z", "s", "z"], ["sig"], name="sig", domain="com.microsoft"),
        helper.make_node("DequantizeLinear", ["sig", "s", "z"], ["real"], name="out"), helper.make_node("Split", ["real"], ["y", "y2"], name="split", axis=1),
        helper.make_node("ArgMax", ["y"], ["best"], name="best", axis=1), helper.make_node("ReduceMean", ["y2"], ["mean"], name="mean", keepdims=0),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    constants = {
        "s": F(0.05), "z": np.uint8(7), "w": rng.integers(-99, 99, (4, 2, 3, 3)).astype(np.int8), "ws": np.asarray([0.01, 0.02, 0.03, 0.04], F), "b": normal(4),
        "one": np.ones(4, F), "lo": F(0), "hi": F(6), "scales": np.asarray([1, 1, 2, 1.5], F), "begin": np.asarray([1]), "end": np.asarray([9]), "axes": np.asarray([2]),
        "pads": np.asarray([0, 0, 1, 0, 0, 0, 0, 1]), "first": np.asarray([0]), "rest": np.asarray([-1]), "g": rng.integers(-99, 99, (6, 224)).astype(np.int8), "gz": np.int8(0),
    }  # fmt: skip
    return graph_model(pairs, {"x": normal(1, 4, 8, 8)}, ["y", "best", "mean", "to"], constants, opset=opset)


def try_model(source: bytes | onnx.ModelProto) -> bool:
    """Whether a model is imported; any error but ModelError, and any long run, fails the test."""
    start, imported = time.monotonic(), False
    try:
        stages.verify(import_onnx(source), stages.Stage.ANNOTATED)
        imported = True
    except ModelError as e:
        assert e.message and "\n" not in str(e)
    try:
        describe_onnx(source)
    except ModelError:
        assert not imported
    assert time.monotonic() - start < SECONDS
    return imported


def test_the_seeds_are_imported() -> None:
    assert try_model(seed_model(13)) and try_model(seed_model(17))


@pytest.mark.parametrize("seed", range(8))
def test_mutated_bytes(seed: int) -> None:
    rng, data = random.Random(seed), seed_model(13).SerializeToString()
    for _ in range(40):
        mutated = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            place = rng.randrange(len(mutated))
            kind = rng.random()
            if kind < 0.6:
                mutated[place] = rng.randrange(256)
            elif kind < 0.8:
                del mutated[place : place + rng.randrange(1, 20)]
            else:
                mutated[place:place] = mutated[rng.randrange(len(mutated)) :][: rng.randrange(1, 40)]
        try_model(bytes(mutated))


NUMBERS = [0, 1, -1, 2, 3, 7, 255, -128, 10**6, 2**31, 2**63 - 1, -(2**63)]


def mutate_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.attribute]
    attribute = rng.choice(rng.choice(nodes).attribute)
    if attribute.type == onnx.AttributeProto.INTS:
        action = rng.random()
        if action < 0.6 and attribute.ints:
            attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
        elif action < 0.8:
            attribute.ints.append(rng.choice(NUMBERS))
        else:
            del attribute.ints[:]
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice([b"", b"linear", b"nearest", b"\xff\xfe", b"SAME_UPPER", b"wrap"])
    if rng.random() < 0.1:
        attribute.type = rng.randrange(15)


def mutate_constant(rng: random.Random, model: onnx.ModelProto) -> None:
    tensor = rng.choice(model.graph.initializer)
    action = rng.random()
    if action < 0.3 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(NUMBERS)
    elif action < 0.5:
        tensor.data_type = rng.randrange(30)
    elif action < 0.7:
        tensor.raw_data = bytes(rng.randrange(256) for _ in range(len(tensor.raw_data)))
    elif action < 0.8:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif action < 0.9:
        model.graph.initializer.remove(tensor)
    else:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)


def mutate_wiring(rng: random.Random, model: onnx.ModelProto) -> None:
    names = (
        [o for n in model.graph.node for o in n.output] + [t.name for t in model.graph.initializer] + ["x", "", "ghost"]
    )
    node = rng.choice(model.graph.node)
    action = rng.random()
    if action < 0.5 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif action < 0.6:
        node.input.append(rng.choice(names))
    elif action < 0.7 and node.input:
        del node.input[-1]
    elif action < 0.8:
        node.output[0] = rng.choice(names)
    else:
        domain, op = rng.choice(sorted(HANDLERS))
        node.op_type, node.domain = op, domain
        if rng.random() < 0.5:
            del node.attribute[:]


def mutate_input(rng: random.Random, model: onnx.ModelProto) -> None:
    tensor = model.graph.input[0].type.tensor_type
    if rng.random() < 0.5:
        tensor.elem_type = rng.randrange(30)
    else:
        tensor.shape.dim[rng.randrange(4)].dim_value = rng.choice(NUMBERS)


@pytest.mark.parametrize("seed", range(12))
def test_mutated_graphs(seed: int) -> None:
    rng = random.Random(1000 + seed)
    mutations = [mutate_attribute, mutate_constant, mutate_wiring, mutate_wiring, mutate_input]
    imported = 0
    for _ in range(40):
        model = seed_model(rng.choice([10, 11, 13, 13, 17, 18]))
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            rng.choice(mutations)(rng, model)
        imported += try_model(model)
    assert imported < 40
