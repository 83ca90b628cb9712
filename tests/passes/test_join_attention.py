"""Attentions become one layer for CPUs, and only they, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import stages
from hawq_tvm.package.together import Library, verify_together
from hawq_tvm.targets import target
from hawq_tvm.verify.compare import LayerRun, layer_calls
from hawq_tvm.verify.reference import evaluate

from ..models import Graph, float_output

SHAPE = (1, 9, 32)


def attention(also: str = "", quantized: bool = True, zero: int = 3) -> Any:
    """Two heads of 16; also: what the model returns beside the result."""
    g = Graph(5)
    made = {}
    for name, perm in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
        x = g.qdq(g.input(name, list(SHAPE)), 0.05, zero)
        made[name] = g.node("Transpose", [g.node("Reshape", [x, g.constant([1, 9, 2, 16], 7)])], perm=perm)
    scores = g.node("MatMul", [made["q"], made["k"]])
    made["scores"] = g.qdq(scores, 0.2, 100) if quantized else scores
    made["p"] = g.qdq(g.node("Softmax", [made["scores"]], axis=-1), 1 / 256)
    out = g.qdq(g.node("MatMul", [made["p"], made["v"]]), 0.03, 120)
    out = g.node("Reshape", [g.node("Transpose", [out], perm=[0, 2, 1, 3]), g.constant([1, 9, 32], 7)])
    return g.model([float_output(o) for o in (out, *([made[also]] if also else []))])


def names(model: Any, preset: str) -> list[str]:
    graph = pipeline.to_packed(pipeline.import_annotated(model), target=target.parse(preset))
    return [n for n in stages.private_functions(graph) if not n.startswith(("quantize", "dequantize"))]


def test_everything_between_quantize_and_dequantize_is_one_layer():
    assert names(attention(), "x86-vnni") == ["attention"]
    assert names(attention(quantized=False), "x86-avx2") == ["attention"]
    assert len(names(attention(), "cuda-sm80")) > 3


@pytest.mark.parametrize("also", ["scores", "p"])
def test_what_somebody_else_reads_stays_a_layer(also):
    assert "attention" not in names(attention(also), "x86-vnni")


def test_a_factor_that_is_read_elsewhere_is_moved_by_a_layer_of_its_own():
    found = names(attention("v"), "x86-vnni")
    assert "attention" in found and len(found) > 1


@pytest.mark.parametrize("preset", ["x86-vnni", "x86-avx2"])
@pytest.mark.parametrize(("quantized", "zero"), [(True, 3), (False, 130)])
def test_it_is_exact_and_proved(preset, quantized, zero):
    wanted = target.parse(preset)
    if not target.runs_here(target.required_features(wanted)):
        pytest.skip(f"this CPU has not what {preset} needs")
    package = ht.compile(attention(quantized=quantized, zero=zero), preset)
    assert "cpu.attention" in {r["rule"] for r in package.report()}
    package.verify(random=2, seed=0).raise_if_mismatch()
    assert package.prove().ok


def test_it_is_compared_with_a_library_of_more_layers():
    annotated = pipeline.import_annotated(attention())
    graphs = [pipeline.to_packed(annotated, target=target.parse(p)) for p in ("arm-dotprod", "cuda-sm80")]
    rng = np.random.default_rng(0)
    feed = {n: rng.normal(size=SHAPE).astype(np.float32) for n in "qkv"}

    def library(graph: Any, wrong: int = 0) -> Library:
        def ran(inputs: Any) -> LayerRun:
            seen: dict[str, Any] = {}
            outputs = evaluate(graph, inputs, seen.__setitem__)
            layers = [np.array(seen[b.var.name]) for b in layer_calls(graph)]
            layers[3].flat[0] += wrong
            return LayerRun({k: np.array(v) for k, v in outputs.items()}, layers)

        return Library("a", "cpu", graph, ran)

    assert len(layer_calls(graphs[0])) < len(layer_calls(graphs[1]))
    for order in (graphs, graphs[::-1]):
        assert verify_together([library(g) for g in order], [feed]).ok
        assert not verify_together([library(order[0]), library(order[1], 1)], [feed]).ok
