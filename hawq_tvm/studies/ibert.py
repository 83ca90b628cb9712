"""How far the two arithmetics of GELU, softmax and LayerNorm are from the real ones; and what each makes of a model.

    python -m hawq_tvm.studies.ibert
    python -m hawq_tvm.studies.ibert --model QUANTIZED.onnx --float FLOAT.onnx --data INPUTS.npz

Every row of the table is a model of one layer, compiled in both arithmetics and run: GELU on every integer, softmax and
LayerNorm on random rows. Errors are those of the packages' outputs, rounding among them, in steps of their quantizer.
With a model, a sentence encoder: the mean cosine to the float one of its outputs, averaged over the tokens that
attention_mask shows. Needs the extra `bench` for a model.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from hawq_tvm.compiler.pipeline import NONLINEAR
from hawq_tvm.core import signals
from hawq_tvm.core.errors import HawqError, UsageError
from hawq_tvm.package.package import Package
from hawq_tvm.package.package import compile as compile_package

Array = NDArray[Any]
TOKENS, WIDTH, ROWS, SEED = 128, 384, 4096, 16


@dataclass(frozen=True)
class Case:
    """A layer between quantizers: its ONNX operator, the real function, its integers and scales.

    given: the constants that the operator reads after its input.
    """

    name: str
    operator: str
    real: Callable[[Array], Array]
    inputs: Array
    scale: float
    step: float
    kind: str
    attributes: dict[str, Any]
    given: tuple[Array, ...] = ()


def cases() -> list[Case]:
    """The rows of the table: inputs of 8 and 16 bits; the results have 8."""
    rng = np.random.default_rng(SEED)
    gamma, beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    made = []
    for bits, kind in ((8, "int8"), (16, "int16")):
        half = 1 << bits - 1
        every = np.arange(-half, half, dtype=kind).reshape(-1, 256)
        made.append(Case(f"GELU, {bits} bits", "Gelu", _gelu, every, 8 / half, 8 / 127, "int8", {}))
        for deviation in (1.0, 4.0):
            real = rng.normal(0, deviation, (ROWS, TOKENS))
            scale = float(np.float32(np.abs(real).max() / (half - 1)))
            rows = np.clip(np.rint(real / scale), -half, half - 1).astype(kind)
            name = f"softmax of {TOKENS}, {bits} bits, deviation {deviation:g}"
            made.append(Case(name, "Softmax", _softmax, rows, scale, 1 / 256, "uint8", {"axis": -1}))
        real = rng.normal(0, 1, (ROWS, WIDTH)) * rng.choice([1, 1, 1, 8], WIDTH)
        scale = float(np.float32(np.abs(real).max() / (half - 1)))
        rows = np.clip(np.rint(real / scale), -half, half - 1).astype(kind)
        name = f"LayerNorm of {WIDTH}, {bits} bits"
        attributes = {"axis": -1, "epsilon": 1e-12}
        made.append(
            Case(name, "LayerNormalization", _normalize, rows, scale, 1 / 16, "int8", attributes, (gamma, beta))
        )
    return made


def _gelu(x: Array) -> Array:
    return x / 2 * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def _normalize(x: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-12))


def errors(case: Case, nonlinear: str) -> tuple[float, float, float | None]:
    """The most and the mean that a package's integers are off by, in steps; and what its proof says of the most."""
    package = compile_package(_model(case), nonlinear=nonlinear)
    given = case.inputs.reshape(1, *case.inputs.shape)
    found = np.rint(package.run({"q": given})["y"][0].astype(np.float64) / case.step)
    real = case.real(case.inputs.astype(np.float64) * float(np.float32(case.scale))) / float(np.float32(case.step))
    low, high = (np.iinfo(case.kind).min, np.iinfo(case.kind).max)
    off = np.abs(found - np.clip(real, low, high))
    proved = package.certificate()["distances"]
    return float(off.max()), float(off.mean()), 0.5 + max(proved.values()) if proved else None


def _model(case: Case) -> onnx.ModelProto:
    zero = {"sx": np.float32(case.scale), "zx": np.zeros((), case.inputs.dtype)}
    constants = {**zero, "sy": np.float32(case.step), "zy": np.zeros((), case.kind)}
    constants |= {f"given{i}": array for i, array in enumerate(case.given)}
    names = [n for n in constants if n.startswith("given")]
    nodes = [
        helper.make_node("DequantizeLinear", ["q", "sx", "zx"], ["x"]),
        helper.make_node(case.operator, ["x", *names], ["r"], **case.attributes),
        helper.make_node("QuantizeLinear", ["r", "sy", "zy"], ["t"]),
        helper.make_node("DequantizeLinear", ["t", "sy", "zy"], ["y"]),
    ]
    shape = (1, *case.inputs.shape)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("q", helper.np_dtype_to_tensor_dtype(case.inputs.dtype), shape)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def table() -> str:
    """The table in Markdown: the most and the mean error in steps of both arithmetics, and the proven most."""
    lines = ["| layer | real formula: most, mean | proven | I-BERT: most, mean | proven |", "|---|---|---|---|---|"]
    for case in cases():
        cells = []
        for nonlinear in NONLINEAR:
            most, mean, proven = errors(case, nonlinear)
            cells += [f"{most:.5f}, {mean:.3f}", "exact" if proven is None else f"{proven:.5f}"]
        lines.append(f"| {case.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cosines(model: Path, float_model: Path, data: Path) -> dict[str, float]:
    """The mean cosine to the float model of the quantized one in each arithmetic.

    Raises UsageError for data without attention_mask, HawqError where the model is refused.
    """
    import onnxruntime as ort

    with np.load(data) as file:
        inputs = {k: file[k] for k in file.files}
    if "attention_mask" not in inputs:
        raise UsageError("has no attention_mask", where=str(data), found=", ".join(inputs) or "nothing")
    session = ort.InferenceSession(str(float_model), providers=["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    fed = {k: v for k, v in inputs.items() if k in names}
    expected = _encoded(lambda one: session.run(None, one)[0], fed)
    found = {}
    for nonlinear in NONLINEAR:
        package = compile_package(str(model), nonlinear=nonlinear)
        vectors = _encoded(partial(_first, package), fed)
        found[nonlinear] = float((vectors * expected).sum(axis=1).mean())
    return found


def _first(package: Package, one: dict[str, Array]) -> Array:
    return next(iter(package.run(one).values()))


def _encoded(run: Callable[[dict[str, Array]], Array], inputs: dict[str, Array]) -> Array:
    """One vector of length 1 for each sentence."""
    vectors = []
    for i in range(len(inputs["attention_mask"])):
        one = {k: v[i : i + 1] for k, v in inputs.items()}
        mask = one["attention_mask"][0, :, None]
        vector = (run(one)[0] * mask).sum(axis=0)
        vectors.append(vector / np.linalg.norm(vector))
    return np.array(vectors)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and the cosines of a model; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hawq_tvm.studies.ibert", description=__doc__.split("\n\n")[0])
    for name, text in (("model", "a quantized ONNX model"), ("float", "its float one"), ("data", "its inputs, .npz")):
        parser.add_argument(f"--{name}", type=Path, help=text)
    args = parser.parse_args(argv)
    given = [args.model, args.float, args.data]
    try:
        if any(given) and not all(given):
            raise UsageError("takes a model, its float one and data together", expected="--model, --float and --data")
        print(table() if not any(given) else "\n".join(f"{k}: {v:.5f}" for k, v in cosines(*given).items()))
    except HawqError as e:
        print(f"hawq_tvm.studies.ibert: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(signals.cleanly(main))
