"""Mutated models, bounded and seeded: a clear refusal or a right answer, never a crash, a hang or a wrong answer."""

from __future__ import annotations

import random
from collections.abc import Callable

import onnx
import pytest
from onnx import TensorProto, helper

import hawq_tvm as ht
from hawq_tvm.core.errors import HawqError
from hawq_tvm.frontend.onnx import import_onnx

from ..models import residual_net

Mutation = Callable[[onnx.ModelProto, random.Random], None]


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(list(model.graph.node))


def drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.node.remove(_node(model, rng))


def rename_input(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.input[rng.randrange(len(node.input))] = rng.choice(
        ["", "nowhere", node.output[0], rng.choice(list(model.graph.node)).output[0]]
    )


def change_operator(model: onnx.ModelProto, rng: random.Random) -> None:
    _node(model, rng).op_type = rng.choice(
        ["Conv", "Add", "Relu", "MatMul", "Flatten", "QLinearConv", "LSTM", "Nonsense", "Softmax", "Concat"]
    )


def change_attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    name = rng.choice(["pads", "strides", "group", "axis", "dilations", "kernel_shape", "block_size", "perm"])
    value = rng.choice([0, -1, 3, 10**9, [0], [-1, -1], [1, 1, 1, 1], [10**6] * 4, [0, 0], 1.5, "x"])
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def change_initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(list(model.graph.initializer))
    how = rng.randrange(4)
    if how == 0:
        tensor.data_type = rng.choice(
            [TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT64, TensorProto.STRING, TensorProto.BFLOAT16, 99]
        )
    elif how == 1:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice([[0], [2], [1, 2, 3], [10**9, 10**9], [-1]]))
    elif how == 2 and tensor.float_data:
        tensor.float_data[0] = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e-40, 1e38])
    elif tensor.int32_data:
        tensor.int32_data[0] = rng.choice([-(2**31), 2**31 - 1, 300, -300])


def change_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[rng.randrange(4)].dim_value = rng.choice([0, -3, 1, 5, 40, 2**40])


def change_version(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.5:
        model.opset_import[0].version = rng.choice([1, 7, 10, 13, 99])
    else:
        model.ir_version = rng.choice([1, 3, 14, 99])


MUTATIONS: list[Mutation] = [
    drop_node,
    rename_input,
    change_operator,
    change_attribute,
    change_initializer,
    change_shape,
    change_version,
]


def _survives(source: bytes) -> None:
    try:
        import_onnx(source)
        package = ht.compile(source)
    except HawqError as e:
        text = str(e)
        assert len(text.splitlines()) == 1 and "Traceback" not in text and len(text) < 2000, text
        return
    package.verify(random=1).raise_if_mismatch()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[m.__name__ for m in MUTATIONS])
def test_mutated_models(mutation: Mutation) -> None:
    for seed in range(12):
        model = residual_net(size=5)
        mutation(model, random.Random(seed))
        _survives(model.SerializeToString())


@pytest.mark.slow
def test_several_mutations_at_once() -> None:
    for seed in range(60):
        rng, model = random.Random(1000 + seed), residual_net(size=5)
        for _ in range(rng.randint(2, 4)):
            if model.graph.node:
                rng.choice(MUTATIONS)(model, rng)
        _survives(model.SerializeToString())


@pytest.mark.slow
def test_flipped_and_truncated_bytes() -> None:
    data = residual_net(size=5).SerializeToString()
    for seed in range(80):
        rng, damaged = random.Random(seed), bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        _survives(bytes(damaged[: rng.randrange(len(damaged))] if seed % 3 == 0 else damaged))
