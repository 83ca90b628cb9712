"""A transformer block for GPUs: every kernel's CUDA source executed by the emulator, and built by nvcc."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import hawq_tvm as ht
from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.targets import gpu as cuda
from hawq_tvm.verify.reference import evaluate
from schedules.layer import Layer
from schedules.rule import choose
from schedules.rules import rules_for

from ..schedules.one_layer import zeros_for
from ..transformers import WIDTH, WORDS, block
from . import emulate
from .emulate import needs_gxx

TARGET = cuda.make(cuda.ARCHITECTURES)
X = {"x": np.random.default_rng(4).normal(0, 1, (1, WORDS, WIDTH)).astype(np.float32)}
MOVES = {"relax.reshape", "relax.permute_dims"}


@needs_gxx
@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True])
def test_every_kernel_gives_the_reference_s_integers(wide: bool) -> None:
    packed = pipeline.to_packed(pipeline.import_annotated(block(wide).SerializeToString()), None, TARGET)
    layers = {gv: Layer.of(gv, f) for gv, f in packed.functions_items() if gv.name_hint != "main"}
    work = {gv: layer for gv, layer in layers.items() if {ops.op_name(b.value) for b in layer.bindings} - MOVES}
    named = {ops.op_name(b.value) for layer in work.values() for b in layer.bindings}
    assert named >= {"hawq.layer_norm", *(["hawq.softmax_wide", "hawq.interpolate"] if wide else ["hawq.softmax"])}
    rules = {gv: choose(rules_for(TARGET), layer, TARGET).rule for gv, layer in work.items()}
    assert {"cuda.mma", "cuda.products", "cuda.generic"} <= {r.name for r in rules.values()}
    kernels = {gv: rules[gv].build(layer, TARGET) for gv, layer in work.items()}
    generated = emulate.generate_all({gv.name_hint: k.func for gv, k in kernels.items()}, TARGET)
    values = dict(X)
    evaluate(packed, X, on_layer=lambda name, value: values.update({name: value}))
    seen = set()
    for b in stages.bindings(packed["main"]):
        gv = getattr(b.value, "op", None)
        if gv not in kernels:
            continue
        results = zeros_for(work[gv])
        inputs = [np.asarray(values[a.name]).astype(ops.dtype_of(a)) for a in b.value.args]
        own = [*inputs, *kernels[gv].arguments]
        emulate.execute(generated[gv.name_hint], kernels[gv].func, own, results, emulate.ARCHITECTURES[-1])
        np.testing.assert_array_equal(results[0], values[b.var.name], err_msg=b.var.name)
        seen.add(gv)
    assert seen == set(kernels)


def test_it_is_built(compiler: Path) -> None:
    """The oldest and the newest architecture, or all of them (a minute)."""
    every = os.environ.get("HAWQ_TVM_EVERY_NETWORK") == "1"
    built = list(cuda.ARCHITECTURES) if every else [cuda.ARCHITECTURES[0], cuda.ARCHITECTURES[-1]]
    package = ht.compile(block(True), json.dumps({"kind": "cuda", "architectures": built}))
    certificate = package.certificate()
    assert certificate["ok"], certificate["code_offenders"][:3]
    assert set(certificate["device_instructions"]) == set(built)
    by_rule = {row["rule"]: row["usage"] for row in package.report()}
    assert all(u["spill_stores"] == u["spill_loads"] == 0 for u in by_rule["cuda.products"])
