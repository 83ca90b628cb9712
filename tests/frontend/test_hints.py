"""`inspect` says where a scale spoils a model that compiles: scores beside boxes, scores beside a mask."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import hawq_tvm as ht
from hawq_tvm.cli import main

from ..models import Graph, float_output


def quantized(nodes: list[onnx.NodeProto], step: float, mask: float = 0.0) -> onnx.ModelProto:
    """int8 inputs `a` (step 1/16) and `b` (step 8), a mask, some nodes from their dequantized values `fa` and `fb` to
    `y`, and a quantize of y with the step.
    """
    scales = {"sa": 1 / 16, "sb": 8.0, "sy": step, "mask": mask}
    wrapped = [
        helper.make_node("DequantizeLinear", ["a", "sa"], ["fa"], "A"),
        helper.make_node("DequantizeLinear", ["b", "sb"], ["fb"], "B"),
        *nodes,
        helper.make_node("QuantizeLinear", ["y", "sy", "zero"], ["q"], "Q"),
        helper.make_node("DequantizeLinear", ["q", "sy"], ["out"], "D"),
    ]
    tensors = [numpy_helper.from_array(np.float32(v), name) for name, v in scales.items()]
    tensors += [
        numpy_helper.from_array(np.int8(0), "zero"),
        numpy_helper.from_array(np.array([[[True, False]] * 3]), "allowed"),
    ]
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.INT8, [1, 3, 2]) for name in ("a", "b")]
    output = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, None)
    graph = helper.make_graph(wrapped, "g", inputs, [output], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


JOINED = [helper.make_node("Concat", ["fa", "fb"], ["y"], "Join", axis=2)]
SCORES = [
    helper.make_node("Sigmoid", ["fa"], ["s"], "S"),
    helper.make_node("Concat", ["s", "fb"], ["c"], "Join", axis=2),
    helper.make_node("Reshape", ["c", "shape"], ["y"], "Move"),
]
LEAST = float(np.finfo(np.float32).min)
MASKED = [helper.make_node("Where", ["allowed", "fa", "mask"], ["y"], "Choose")]
ADDED = [helper.make_node("Add", ["fa", "fb"], ["y"], "Sum")]


@pytest.mark.parametrize(
    "nodes, step, wanted",
    [
        (
            JOINED,
            8.0,
            "Q: one scale for tensors of unlike ranges leaves A only 2 steps; remedy: quantize its parts apart",
        ),
        (JOINED, 1.0, ""),  # 16 steps are left
        (ADDED, 8.0, ""),  # 2 steps of a sum's operand are some
        (ADDED, 32.0, "Q: its step of 32 is more than the whole range of A, 15.9, so nothing of that is left"),
        (MASKED, LEAST / -255, "Q: its step of 1.33e+36 is more than the whole range of A, 15.9, so nothing"),
        (MASKED, 1 / 16, ""),
    ],
)
def test_a_scale_that_spoils_is_named(nodes: list[onnx.NodeProto], step: float, wanted: str) -> None:
    report = ht.inspect(quantized(nodes, step, LEAST))
    assert report.compilable, report.error
    assert len(report.hints) == bool(wanted) and all(h.startswith(wanted) for h in report.hints), report.hints
    assert report.to_dict()["hints"] == list(report.hints)
    masked = [h for h in report.hints if "whole range" in h]
    assert all("make that about -100" in h and "`hawq-tvm quantize`" in h for h in masked)


@pytest.mark.parametrize("scale, words", [(0.0, "a constant tensor"), (np.inf, "a mask of -inf"), (np.nan, "again")])
def test_a_scale_that_is_none_says_what_gave_it(scale: float, words: str) -> None:
    report = ht.inspect(quantized(ADDED, scale))
    assert not report.compilable and words in report.error.partition("remedy: calibrate ")[2], report.error


def test_the_verdict_counts_no_problem_that_stands_above_it() -> None:
    report = ht.inspect(
        quantized(
            [*ADDED[:0], helper.make_node("Sinh", ["fa"], ["s"], "S"), helper.make_node("Tan", ["s"], ["y"], "T")], 1.0
        )
    )
    assert len(report.unsupported) == 2 and "and 1 more problem" in report.error
    assert report.verdict == f"cannot be compiled: {report.error.partition('; and 1 more problem')[0]}"


@pytest.mark.parametrize(
    "weight, data, wanted",
    [
        ([0.01, 0.02], [0.05, 0.01, 0.03], ""),
        ([0.01, 1e30], [0.05], "Q: a requantize has a scale ratio that no dyadic number holds"),
        ([0.01, 1e-25], [0.05], "W: a scale of 1e-25 is none that a calibration gives"),
        ([0.01, 1e-8], [0.05], ""),  # every output has its own sum
        ([0.01], [0.05, 1e-9, 0.03], "A: its scales are up to 5e+07 times apart"),
    ],
)
@pytest.mark.parametrize("used", [True, False])
def test_scales_that_no_calibration_gives(weight: list[float], data: list[float], wanted: str, used: bool) -> None:
    """A weight of zeros may have any scale."""
    constants = {
        "sa": np.float32(data),
        "za": np.zeros(len(data), np.int8),
        "sw": np.float32(weight),
        "w": np.full((len(weight), 3, 1, 1), 100, np.int8),
        "sy": np.float32(0.1),
        "zero": np.int8(0),
    }
    constants["w"][1:] *= used
    nodes = [
        helper.make_node("DequantizeLinear", ["a", "sa", "za"] if len(data) > 1 else ["a", "sa"], ["fa"], "A"),
        helper.make_node("DequantizeLinear", ["w", "sw"], ["fw"], "W", axis=0),
        helper.make_node("Conv", ["fa", "fw"], ["y"], "C"),
        helper.make_node("QuantizeLinear", ["y", "sy", "zero"], ["q"], "Q"),
    ]
    constants = {k: v.reshape(()) if k[0] == "s" and v.size == 1 else v for k, v in constants.items()}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("a", onnx.TensorProto.INT8, [1, 3, 2, 2])],
        [helper.make_tensor_value_info("q", onnx.TensorProto.INT8, None)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    report = ht.inspect(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    expected = wanted if used or wanted.startswith("A") else ""
    if wanted.startswith("Q"):
        assert report.error.startswith(wanted)
        return
    assert report.compilable, report.error
    assert len(report.hints) == bool(expected) and all(h.startswith(expected) for h in report.hints), report.hints


def test_scores_chosen_from_a_mask_of_the_least_float() -> None:
    g = Graph()
    scores = g.node("Mul", [g.qdq(g.input("x", [1, 4]), 0.02, 128), g.constant(np.float32(0.5), 1, ())])
    chosen = g.constant([True, False, True, True], onnx.TensorProto.BOOL)
    scores = g.node("Where", [chosen, scores, g.constant(np.finfo(np.float32).min, 1, ())])
    model = g.model([float_output(g.qdq(g.node("Softmax", [g.qdq(scores, 1.33e36, 255)]), 1 / 256))])
    (hint,) = ht.inspect(model).hints
    assert hint.endswith(
        "a scale of 1.33e+36 is none that a calibration gives; remedy: calibrate again, with masks of about -100 where"
        " they are the least float"
    )


def test_scores_of_a_sigmoid_beside_boxes(tmp_path, capsys) -> None:  # type: ignore[no-untyped-def]
    """The function's own range counts where nothing quantizes it; a movement changes nothing; the command prints it."""
    model = quantized(SCORES, 5.0)
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 12]), "shape"))
    onnx.save(model, tmp_path / "m.onnx")
    main(["inspect", str(tmp_path / "m.onnx")])
    said = " ".join(capsys.readouterr().out.split())
    assert "hint: Q: one scale for tensors of unlike ranges leaves S only 0.2 steps; remedy:" in said
