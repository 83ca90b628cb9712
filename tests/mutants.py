"""Mutants of small models, seeded: what a bug of an exporter, a damaged disk or an attacker makes of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hawq_tvm.frontend.onnx.node import HANDLERS

Mutation = Callable[[random.Random, onnx.ModelProto], None]

NUMBERS = [0, 1, -1, 2, 3, 5, 7, 16, 255, -128, 10**6, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63)]
LISTS: list[Any] = [
    [],
    [0],
    [0, 0],
    [-1, -1],
    [1, 1, 1, 1],
    [2, 2],
    [0, 1, 2, 3],
    [10**6] * 4,
    [1, 2, 3, 4, 5, 6, 7, 8],
]
REALS = [
    0.0,
    -0.0,
    -1.0,
    1.0,
    0.5,
    1e-45,
    1e-38,
    1e-6,
    1e6,
    1e20,
    3e38,
    -3e38,
    float("nan"),
    float("inf"),
    -float("inf"),
]
TEXTS = [
    b"",
    b"linear",
    b"nearest",
    b"cubic",
    b"\xff\xfe",
    b"SAME_UPPER",
    b"SAME_LOWER",
    b"VALID",
    b"wrap",
    b"reflect",
    b"edge",
    b"DCR",
    b"CRD",
]
NAMES = [
    "",
    "x",
    "a/b",
    "/",
    "../../up",
    "naïve",
    "\x1b[31mred",
    "new\nline",
    "n" * 300,
    "0",
    "main",
    "hawq.quantize",
    "%s{0}",
    "nul\x00",
]


def _node(rng: random.Random, model: onnx.ModelProto) -> onnx.NodeProto | None:
    return rng.choice(list(model.graph.node)) if model.graph.node else None


def _tensors(model: onnx.ModelProto) -> list[str]:
    """The names of everything that a node may read."""
    graph = model.graph
    return (
        [o for n in graph.node for o in n.output] + [t.name for t in graph.initializer] + [i.name for i in graph.input]
    )


def drop_node(rng: random.Random, model: onnx.ModelProto) -> None:
    if (node := _node(rng, model)) is not None:
        model.graph.node.remove(node)


def repeat_node(rng: random.Random, model: onnx.ModelProto) -> None:
    """A node once more: as it is, or with results of other names that replace the first ones where they are read."""
    if (node := _node(rng, model)) is None:
        return
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    if rng.random() < 0.7:
        for i, name in enumerate(node.output):
            copy.output[i] = f"{name}_again"
            for reader in model.graph.node:
                for k, read in enumerate(reader.input):
                    if read == name and rng.random() < 0.7:
                        reader.input[k] = f"{name}_again"
    model.graph.node.insert(rng.randrange(len(model.graph.node) + 1), copy)


def swap_nodes(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    if len(nodes) > 1:
        i, j = rng.sample(range(len(nodes)), 2)
        nodes[i], nodes[j] = nodes[j], nodes[i]
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def rewire(rng: random.Random, model: onnx.ModelProto) -> None:
    if (node := _node(rng, model)) is None:
        return
    names, action = [*_tensors(model), "", "ghost"], rng.random()
    if action < 0.7 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif action < 0.8:
        node.input.append(rng.choice(names))
    elif action < 0.9 and node.input:
        del node.input[-1]
    elif node.output:
        node.output[0] = rng.choice(names)


def change_operator(rng: random.Random, model: onnx.ModelProto) -> None:
    if (node := _node(rng, model)) is None:
        return
    node.domain, node.op_type = rng.choice(
        [*sorted(HANDLERS), ("", "LSTM"), ("", "Nonsense"), ("ghost", "Conv"), ("", "")]
    )
    if rng.random() < 0.5:
        del node.attribute[:]


def change_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = [n for n in model.graph.node if n.attribute]
    if not nodes:
        return
    node = rng.choice(nodes)
    attribute = rng.choice(list(node.attribute))
    if rng.random() < 0.1:
        attribute.type = rng.randrange(15)
    elif rng.random() < 0.1:
        node.attribute.remove(attribute)
    elif attribute.type == onnx.AttributeProto.INTS and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(NUMBERS)
        if rng.random() < 0.2:
            attribute.ints.append(rng.choice(NUMBERS))
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(REALS)
    elif attribute.type == onnx.AttributeProto.STRING:
        attribute.s = rng.choice(TEXTS)


def set_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    """One of the usual attributes, whether the operator has it or not."""
    if (node := _node(rng, model)) is None:
        return
    name = rng.choice(
        [
            "pads",
            "strides",
            "group",
            "axis",
            "axes",
            "dilations",
            "kernel_shape",
            "block_size",
            "perm",
            "auto_pad",
            "ceil_mode",
            "keepdims",
            "count_include_pad",
            "transB",
            "alpha",
            "beta",
            "mode",
            "to",
            "output_dtype",
            "saturate",
            "blocksize",
            "epsilon",
        ]
    )
    value = rng.choice([*NUMBERS, *LISTS, *REALS, *TEXTS])
    kept = [a for a in node.attribute if a.name != name]
    del node.attribute[:]
    kind = onnx.AttributeProto.INTS if value == [] else None
    node.attribute.extend([*kept, helper.make_attribute(name, value, attr_type=kind)])


def _changed(rng: random.Random, array: np.ndarray) -> np.ndarray:
    """One value of an array, or all, at an extreme of its type."""
    values = (
        REALS
        if array.dtype.kind == "f"
        else [np.iinfo(array.dtype).min, np.iinfo(array.dtype).max, 0, 1, 2, 3]
        if array.dtype.kind in "iu"
        else [0, 1]
    )
    with np.errstate(over="ignore"):
        new = np.asarray(rng.choice(values)).astype(array.dtype)
    array = array.copy()
    array.flat[slice(None) if rng.random() < 0.3 else rng.randrange(array.size)] = new
    return array


def change_value(rng: random.Random, model: onnx.ModelProto) -> None:
    """A constant, such as a scale, a zero point, a weight or a pad."""
    small = [t for t in model.graph.initializer if t.data_type not in (TensorProto.STRING, TensorProto.UNDEFINED)]
    if not small:
        return
    tensor = rng.choice(small)
    array = numpy_helper.to_array(tensor)
    if array.size and array.dtype.kind in "fiu":
        tensor.CopyFrom(numpy_helper.from_array(_changed(rng, array), tensor.name))


def change_tensor(rng: random.Random, model: onnx.ModelProto) -> None:
    """A constant's type, shape, bytes or presence."""
    if not model.graph.initializer:
        return
    tensor, action = rng.choice(list(model.graph.initializer)), rng.random()
    if action < 0.25:
        tensor.data_type = rng.randrange(30)
    elif action < 0.5:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice([[], [0], [1], [2], [1, 2, 3], [10**9, 10**9], [-1], [2**62], [1, 1, 1, 1]]))
    elif action < 0.65:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(
            numpy_helper.from_array(
                array[None] if rng.random() < 0.5 else np.concatenate([array.ravel()] * 2), tensor.name
            )
        )
    elif action < 0.75 and tensor.raw_data:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data))]
    elif action < 0.9:
        model.graph.initializer.remove(tensor)
    else:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        model.graph.initializer.remove(tensor)


def change_type(rng: random.Random, model: onnx.ModelProto) -> None:
    """The declared type or shape of an input or an output."""
    infos = [*model.graph.input, *model.graph.output]
    if not infos:
        return
    tensor = rng.choice(infos).type.tensor_type
    if rng.random() < 0.4 or not tensor.shape.dim:
        tensor.elem_type = rng.randrange(30)
    elif rng.random() < 0.2:
        del tensor.shape.dim[-1]
    elif rng.random() < 0.2:
        tensor.shape.dim.add().dim_value = rng.choice(NUMBERS)
    elif rng.random() < 0.3:
        tensor.shape.dim[rng.randrange(len(tensor.shape.dim))].dim_param = rng.choice(["N", "", "\x1b[31m"])
    else:
        tensor.shape.dim[rng.randrange(len(tensor.shape.dim))].dim_value = rng.choice(NUMBERS)


def rename(rng: random.Random, model: onnx.ModelProto) -> None:
    """A tensor or a node by another name, everywhere; the name may be taken."""
    names = _tensors(model)
    if not names:
        return
    old, new = rng.choice(names), rng.choice([*NAMES, rng.choice(names)])
    for node in model.graph.node:
        for side in (node.input, node.output):
            for i, name in enumerate(side):
                if name == old:
                    side[i] = new
        if node.name == old or rng.random() < 0.1:
            node.name = new
    for value in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        if value.name == old:
            value.name = new


def change_outputs(rng: random.Random, model: onnx.ModelProto) -> None:
    """An output more, twice, or none."""
    action, names = rng.random(), _tensors(model)
    if action < 0.2:
        del model.graph.output[:]
    elif action < 0.3:
        del model.graph.input[:]
    elif names:
        model.graph.output.append(helper.make_empty_tensor_value_info(rng.choice(names)))


def change_version(rng: random.Random, model: onnx.ModelProto) -> None:
    if rng.random() < 0.6 and model.opset_import:
        model.opset_import[0].version = rng.choice([1, 7, 9, 10, 11, 13, 17, 18, 21, 23, 99, -1])
    elif rng.random() < 0.3:
        del model.opset_import[:]
    else:
        model.ir_version = rng.choice([0, 1, 3, 4, 14, 99])


MUTATIONS: Sequence[Mutation] = (
    drop_node,
    repeat_node,
    swap_nodes,
    rewire,
    rewire,
    change_operator,
    change_attribute,
    change_attribute,
    set_attribute,
    change_value,
    change_value,
    change_value,
    change_tensor,
    change_type,
    rename,
    change_outputs,
    change_version,
)


def mutated_graph(rng: random.Random, model: onnx.ModelProto) -> tuple[bytes, str]:
    """A copy of a model with one to three mutations, and their names."""
    copy, names = onnx.ModelProto(), []
    copy.CopyFrom(model)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        mutation = rng.choice(MUTATIONS)
        names.append(mutation.__name__)
        try:
            mutation(rng, copy)
        except (ValueError, TypeError, OverflowError, AttributeError, IndexError, KeyError):
            continue  # an earlier mutation left what onnx.helper cannot handle
    return copy.SerializeToString(), ", ".join(names)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """A model file with a few bytes flipped, cut out, doubled, or its end missing."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        if not damaged:
            break
        place, kind = rng.randrange(len(damaged)), rng.random()
        if kind < 0.6:
            damaged[place] ^= 1 << rng.randrange(8)
        elif kind < 0.8:
            del damaged[place : place + rng.randrange(1, 20)]
        elif kind < 0.95:
            damaged[place:place] = damaged[rng.randrange(len(damaged)) :][: rng.randrange(1, 40)]
        else:
            del damaged[place:]
    return bytes(damaged)


def mutant(number: int, models: Sequence[tuple[str, onnx.ModelProto]]) -> tuple[bytes, str]:
    """The mutant of this number, always the same, and what it is: its model and its mutations."""
    rng = random.Random(number)
    name, model = models[number % len(models)]
    if rng.random() < 0.15:
        return mutated_bytes(rng, model.SerializeToString()), f"{name}: bytes"
    data, changes = mutated_graph(rng, model)
    return data, f"{name}: {changes}"
