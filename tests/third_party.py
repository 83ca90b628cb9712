"""Every model that a test imports beside a third party's run of it: shapes and types exactly, values as exactly as
float32 can tell.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
import tvm
from tvm import relax

from hawq_tvm.compiler import pipeline
from hawq_tvm.core import ops, stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.onnx.graph import node_name
from hawq_tvm.frontend.onnx.qonnx import DOMAINS
from hawq_tvm.verify.reference import ReferenceOverflow, evaluate

from .oracle import FLOAT16, FLOAT32, IntegerOracle, Oracle, integer_module

Arrays = dict[str, np.ndarray]
MAX_NODES, MAX_ELEMENTS = 60, 1 << 18
WIDTHS = {"int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15)}
compared: Counter[str] = Counter()


class NotRun(Exception):
    """No third party takes this model."""


def random_feed(module: tvm.IRModule, seed: int = 0) -> Arrays:
    """Values of every input of an ANNOTATED module, over the whole range of its type; floats of a few units."""
    rng, feed = np.random.default_rng(seed), {}
    for param, kind in zip(module["main"].params, module["main"].attrs["hawq.input_types"], strict=True):
        dtype, shape = np.dtype(ops.dtype_of(param)), ops.shape_of(param)
        if dtype.kind == "f":
            feed[param.name] = (rng.standard_normal(shape) * 3).astype(dtype)
        elif dtype.kind == "b":
            feed[param.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            low, high = WIDTHS.get(str(kind), (np.iinfo(dtype).min, np.iinfo(dtype).max))
            if dtype.itemsize >= 4:  # sums that a third party keeps in float32
                low, high = max(low, -(2**20)), min(high, 2**20)
            feed[param.name] = rng.integers(low, high, shape, endpoint=True).astype(dtype)
    return feed


def too_large(nodes: int, module: tvm.IRModule) -> bool:
    """Whether a model of so many nodes is left to the tests of whole networks, which compare every layer."""
    sizes = [
        math.prod(ops.shape_of(b.var))
        for b in stages.bindings(module["main"])
        if isinstance(b.var.ty, relax.TensorType)
    ]
    large = nodes > MAX_NODES or max(sizes, default=0) > MAX_ELEMENTS
    compared["too large"] += large
    return large


def check_onnx(model: onnx.ModelProto, module: tvm.IRModule) -> None:
    """Compare the ANNOTATED module of an ONNX model, and its integer and packed form where it has one, with a run by
    somebody else.

    That is ONNX Runtime; where it does not know the model or says otherwise, ONNX's own reference, for QONNX its
    executor. Where nobody runs it, ONNX's shape inference is left.
    """
    numbers = [i for n in model.graph.node for a in n.attribute for i in (a.i, *a.ints)]
    if too_large(len(model.graph.node), module) or max(map(abs, numbers), default=0) > MAX_ELEMENTS:
        return
    feed, differences = random_feed(module), []
    # Sums of bfloat16 numbers have 8 bits: too few to compare integers with.
    parties = {} if onnx.TensorProto.BFLOAT16 in _kinds(model) else PARTIES
    for by, run in parties.items():
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                theirs = run(model, feed)
            except NotRun:
                continue
            quantizers = [n for n in _quantizers(model) if n.output[0] in theirs]
            try:
                compare(
                    module,
                    feed,
                    {node_name(n): theirs[n.output[0]] for n in quantizers},
                    [theirs[o.name] for o in model.graph.output],
                    by,
                    FLOAT16 if onnx.TensorProto.FLOAT16 in _kinds(model) else FLOAT32,
                )
            except AssertionError as e:
                differences.append(e)
                continue
            except ReferenceOverflow:  # ONNX's integers wrap around; compile refuses the model
                compared["that overflow"] += 1
                return
        compared[by] += 1
        return
    if differences:
        raise differences[0]
    compared["nobody"] += 1
    _check_interface(module, _inferred(model), "ONNX shape inference")


def compare(
    module: tvm.IRModule,
    feed: Arrays,
    layers: Arrays,
    outputs: Sequence[np.ndarray],
    by: str,
    unit: float = FLOAT32,
) -> None:
    """An ANNOTATED module, its INTEGER and its PACKED form beside somebody else's integers by layer and outputs in
    order.  unit: what their arithmetic loses.
    """
    names = [str(n) for n in module["main"].attrs["hawq.output_names"]]
    wanted = dict(zip(names, outputs, strict=True))
    interface = {k: (v.dtype.name, v.shape) for k, v in wanted.items()}
    _check_interface(module, interface, by)
    real = Oracle(module, {k: v for k, v in layers.items() if v.dtype.kind in "iu"}, unit)
    real.run(feed)
    _check_integers(real, by)
    returned, _ = stages.outputs(module["main"])
    for name, field in zip(names, returned.fields, strict=True):
        _check_values(name, np.asarray(real.value(field)), wanted[name], by, unit / FLOAT32)
    try:
        packed = pipeline.to_packed(module)
    except ModelError:
        return  # a float model, or one that is refused: other tests say with which words
    compared["as integers, too"] += 1
    _check_interface(packed, interface, by)
    whole = IntegerOracle(integer_module(module), real)
    whole.run(feed)
    _check_integers(whole, by)
    for name, ours in evaluate(packed, feed).items():
        assert ours.shape == wanted[name].shape, f"output {name} has shape {ours.shape}, by {by} {wanted[name].shape}"


def _check_integers(oracle: Oracle, by: str) -> None:
    wrong = {layer: row for layer, row in oracle.rows.items() if row[2]}
    assert not wrong, (
        f"layers whose integers {by} does not give (elements, different, not at a rounding boundary): {wrong}"
    )


def _check_interface(module: tvm.IRModule, wanted: Mapping[str, tuple[str, tuple[int, ...]]], by: str) -> None:
    """Names, types and shapes of the outputs; some hold sub-byte types in 8 bits, as we do."""
    main = module["main"]
    returned, _ = stages.outputs(main)
    for name, kind, field in zip(
        main.attrs["hawq.output_names"], main.attrs["hawq.output_types"], returned.fields, strict=True
    ):
        if str(name) in wanted:
            dtype, shape = wanted[str(name)]
            same = dtype in (str(kind), ops.dtype_of(field)) and ops.shape_of(field) == tuple(shape)
            assert same, f"output {name}: {by} has {dtype}{list(shape)}, ours is {kind}{list(ops.shape_of(field))}"


def _kinds(model: onnx.ModelProto) -> set[int]:
    """The element types of a model's constants and inputs."""
    return {t.data_type for t in model.graph.initializer} | {i.type.tensor_type.elem_type for i in model.graph.input}


def _check_values(name: str, ours: np.ndarray, theirs: np.ndarray, by: str, wider: float = 1) -> None:
    if theirs.dtype.kind == "f":
        ours, theirs = ours.astype(np.float64), theirs.astype(np.float64)
        finite = np.isfinite(theirs)
        size = np.max(np.abs(theirs[finite]), initial=0)
        np.testing.assert_allclose(
            ours[finite],
            theirs[finite],
            rtol=2e-4 * wider**0.5,
            atol=2e-5 * wider**0.5 * size + 1e-6,
            err_msg=f"output {name} beside {by}",
        )
    else:
        off = np.abs(ours.astype(np.int64) - theirs.astype(np.int64))
        assert off.max(initial=0) <= 1 and np.mean(off) <= 0.03, (
            f"output {name}: {by} differs by up to {off.max()}, {np.mean(off):.1%}"
        )


def _quantizes(node: onnx.NodeProto) -> bool:
    return node.op_type == "QuantizeLinear" or (node.op_type.startswith("QLinear") and node.op_type != "QLinearConcat")


def _quantizers(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes whose results are a quantize's: a Clip behind one narrows its range, and gives it its name (QCDQ)."""
    quantized = {n.output[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    return [n for n in model.graph.node if _quantizes(n) or (n.op_type == "Clip" and n.input[0] in quantized)]


def _exposed(model: onnx.ModelProto, feed: Arrays) -> onnx.ModelProto:
    """The model with its inputs' shapes fixed and the result of every quantize among its outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in copy.graph.input:
        if info.name in feed:
            kind = info.type.tensor_type.elem_type
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, kind, feed[info.name].shape))
    have = {o.name for o in copy.graph.output}
    for node in _quantizers(copy):
        if node.output[0] not in have:
            copy.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
            have.add(node.output[0])
    return copy


def _onnxruntime(model: onnx.ModelProto, feed: Arrays) -> Arrays:
    import onnxruntime as ort
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    refusals = tuple(
        getattr(errors, n)
        for n in ("Fail", "InvalidGraph", "InvalidArgument", "NotImplemented", "RuntimeException", "InvalidProtobuf")
    )
    try:
        session = ort.InferenceSession(
            _exposed(model, feed).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        read = {i.name for i in session.get_inputs()}
        results = session.run(None, {k: v for k, v in feed.items() if k in read})
    except (*refusals, RuntimeError) as e:
        raise NotRun(str(e)) from None
    return dict(zip([o.name for o in session.get_outputs()], results, strict=True))


def _reference(model: onnx.ModelProto, feed: Arrays) -> Arrays:
    from onnx.reference import ReferenceEvaluator

    if any(n.domain not in ("", "ai.onnx") for n in model.graph.node):
        raise NotRun("it knows no other domains")
    try:
        evaluator = ReferenceEvaluator(_exposed(model, feed))
        results = evaluator.run(None, {k: v for k, v in feed.items() if k in evaluator.input_names})
    except Exception as e:  # a reference without a contract: it raises whatever NumPy does
        raise NotRun(str(e)) from e
    return {k: np.asarray(v) for k, v in zip(evaluator.output_names, results, strict=True)}


def _qonnx(model: onnx.ModelProto, feed: Arrays) -> Arrays:
    if not any(n.domain in DOMAINS for n in model.graph.node):
        raise NotRun("no model of QONNX")
    try:
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.core.onnx_exec import execute_onnx
        from qonnx.transformation.infer_shapes import InferShapes

        return execute_onnx(
            ModelWrapper(_exposed(model, feed)).transform(InferShapes()), feed, return_full_exec_context=True
        )
    except Exception as e:  # neither has it a contract
        raise NotRun(str(e)) from e


PARTIES: dict[str, Callable[[onnx.ModelProto, Arrays], Arrays]] = {
    "ONNX Runtime": _onnxruntime,
    "ONNX's reference": _reference,
    "QONNX's executor": _qonnx,
}


def _inferred(model: onnx.ModelProto) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What ONNX shape inference says of the outputs, where it knows every dimension."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError:
        return found
    for info in inferred.graph.output:
        tensor = info.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim) and tensor.elem_type:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            found[info.name] = (str(dtype), tuple(d.dim_value for d in tensor.shape.dim))
    return found
