"""The walk over an ONNX graph that writes an ANNOTATED module, one handler call per node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import tvm
from tvm import relax

from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.text import last_line
from hawq_tvm.frontend.common.writer import TYPE_RULE_ERRORS, Env, Writer

from . import fold
from .graph import check_names, in_order, node_name
from .infer import declared, inferred
from .inputs import SUPPORTED, graph_inputs
from .node import HANDLERS, MICROSOFT, Entry, Node
from .qonnx import DOMAINS as QONNX_DOMAINS
from .reader import graphs_of, opset_of
from .schema import check_schema
from .values import ELEMENT_TYPES, FLOAT_KINDS, Array, Constant, Failed, Result, Tensor, Value

# Beside these, what begins with QLinear.
QUANTIZING = frozenset(
    {
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "ConvInteger",
        "MatMulInteger",
        "QGemm",
        "Quant",
        "IntQuant",
        "BipolarQuant",
        "Trunc",
        "FloatQuant",
        "MatMulNBits",
    }
)


def quantizing(node: onnx.NodeProto) -> bool:
    """Whether a node, or one inside it, makes integers of real numbers."""
    names = [node.op_type, *(n.op_type for a in node.attribute if a.HasField("g") for n in a.g.node)]
    return any(n.startswith(("QLinear", "QAttention")) or (n in QUANTIZING and n != "DequantizeLinear") for n in names)


class Importer(Writer):
    """Imports one model; `failures` holds every node that could not be imported, in order."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]] | None) -> None:
        self.model = model
        self.opsets = {
            d: opset_of(model, d) for d in {"" if o.domain == "ai.onnx" else o.domain for o in model.opset_import}
        }
        inputs, failures = graph_inputs(model.graph, shapes or {})
        super().__init__(inputs)
        for error in failures:
            self.failed(error, "input")
        self.budget = fold.Budget(sum(math.prod(map(int, t.dims)) for t in model.graph.initializer))
        self.order = self.checked(model.graph)

    def checked(self, graph: onnx.GraphProto, outer: Iterable[str] = ()) -> Sequence[onnx.NodeProto]:
        """The nodes of a graph in order of computation; what is wrong with its names or its order has failed.

        outer: names visible from an enclosing graph.
        """
        for error in check_names(graph, outer):
            self.failed(error, "graph")
        try:
            return in_order(graph)
        except ModelError as e:
            self.failed(e, "graph")
            return list(graph.node)

    def quantizes(self) -> bool:
        """Whether any node quantizes, dequantizes or computes with integers and scales."""
        nodes = (n for g in graphs_of(self.model.graph) for n in g.node)
        return any(n.op_type in QUANTIZING or n.op_type.startswith(("QLinear", "QAttention")) for n in nodes)

    def run(self) -> tvm.IRModule:
        """The module, complete when `failures` stays empty."""

        def body(env: Env) -> list[Value]:
            self.initializers(self.model.graph, env)
            self.walk(self.order, env)
            values = [self.output(o, env) for o in self.model.graph.output]
            if not self.failures:  # what was imported has bounded constants, on which inference is quick
                self.promised(env)
            return values

        return self.write(body, [o.name for o in self.model.graph.output], [node_name(n) for n in self.order])

    def promised(self, env: Env) -> None:
        """Compare every tensor with ONNX's inference, outputs with the model's declaration, too; the outputs first."""
        by_onnx, by_model = inferred(self.model, self.inputs), declared(self.model.graph.output)
        for name in dict.fromkeys([*by_model, *by_onnx]):
            self.keep(name, env.get(name), [p[name] for p in (by_onnx, by_model) if name in p], output=name in by_model)

    def initializers(self, graph: onnx.GraphProto, env: Env) -> None:
        """The initializers of a graph as constants; one that cannot be read fails."""
        for tensor in graph.initializer:
            try:
                env[tensor.name] = Constant(fold.read_tensor(tensor, f"initializer {tensor.name!r}"))
            except ModelError as e:
                env[tensor.name] = self.failed(e, "initializer")

    def walk(self, nodes: Iterable[onnx.NodeProto], env: Env) -> None:
        """Import nodes, which come in order of computation, into `env`."""
        for proto in nodes:
            results: Sequence[Value | Failed]
            try:
                results = self.import_node(proto, env)
                missing = [name for name in proto.output[len(results) :] if name]
                if missing:
                    found = ", ".join(missing)
                    raise ModelError(f"{proto.op_type} has too many outputs", where=node_name(proto), found=found)
            except ModelError as e:
                results = [self.failed(e, proto.op_type, [env.get(n) for n in proto.input])] * len(proto.output)
            for name, value in zip(proto.output, results, strict=False):
                if name:
                    env[name] = value

    def import_node(self, proto: onnx.NodeProto, env: Env) -> Sequence[Value | Failed]:
        """The values of one node's outputs, bound to variables named after it."""
        domain = "" if proto.domain == "ai.onnx" else proto.domain
        values = [env.get(name, Failed()) if name else None for name in proto.input]
        node = Node(
            name=node_name(proto),
            op=proto.op_type,
            domain=domain,
            opset=self.opsets.get(domain) or 1,
            inputs=[v for v in values if not isinstance(v, Failed)],
            sources=list(proto.input),
            outputs=list(proto.output),
            attributes={a.name: a for a in proto.attribute},
            graph_inputs=self.input_names,
            bind=self.bind,
        )
        entry = self.entry(node)
        if any(isinstance(v, Failed) for v in values):
            return [Failed()] * len(proto.output)
        if node.op == "If" and not domain:
            return self.branch(node, env)
        check_schema(node, entry)
        if node.op == "Constant" and not domain:
            return [fold.constant_node(node)]
        if fold.can_fold(node):
            return fold.fold(node, self.budget)
        if entry is None:
            known = fold.known(node, self.budget)
            if known is None:
                raise node.fail(
                    "is supported on constants only", remedy="fold it into a constant (onnxsim, or export again)"
                )
            return [Constant(array) for array in known()]
        try:
            made = entry.handler(node)
            results = made if isinstance(made, list) else [made]
            bound = _of_kind(node, results, self.bind_results(node.name, results))
            return fold.noted(bound, fold.known(node, self.budget))
        except TYPE_RULE_ERRORS as e:
            shapes = ", ".join(f"{v.kind}{list(v.shape)}" for v in node.inputs if v is not None)
            raise node.fail(f"does not fit its operands: {last_line(e)}", found=shapes) from None

    def entry(self, node: Node) -> Entry | None:
        """The handler of a node, None for an operator that is only folded.

        Raises ModelError for an operator that is not supported.
        """
        if not supported(node.domain, node.op):
            raise unsupported_operator(node.name, node.domain, node.op, node.opset)
        return HANDLERS.get((node.domain, node.op))

    def branch(self, node: Node, env: Env) -> Sequence[Value | Failed]:
        """An If whose condition is constant: the chosen branch, imported in place."""
        condition = node.constant(0, "condition")
        key = "then_branch" if bool(condition.ravel()[:1].any()) else "else_branch"
        if key not in node.attributes or not node.attributes[key].HasField("g"):
            raise node.fail(f"lacks its {key}")
        graph = node.attributes[key].g
        inner = dict(env)
        order = self.checked(graph, outer=env)
        self.initializers(graph, inner)
        self.walk(order, inner)
        return [inner.get(o.name, Failed()) for o in graph.output]

    def output(self, info: onnx.ValueInfoProto, env: Env) -> Value:
        """The value of a graph output, of the type the model declares."""
        value = env.get(info.name, Failed())
        try:
            if not isinstance(value, Failed):
                _check_output(info, value)
                return value
        except ModelError as e:
            self.failed(e, "output")
        return Constant(_NOTHING)


_NOTHING: Array = np.zeros((), np.float32)


def _of_kind(node: Node, results: Sequence[Result], bound: Sequence[Value]) -> list[Value]:
    """Float results in the element type of the node's first float operand, as ONNX has it: handlers compute in
    float32.
    """
    kind = next((v.kind for v in node.inputs if v is not None and v.kind in FLOAT_KINDS), "float32")
    plain = [
        isinstance(r, relax.Expr) and isinstance(v, Tensor) and v.kind == "float32"
        for r, v in zip(results, bound, strict=True)
    ]
    return [replace(v, kind=kind) if isinstance(v, Tensor) and p else v for p, v in zip(plain, bound, strict=True)]


def _check_output(info: onnx.ValueInfoProto, value: Value) -> None:
    number = info.type.tensor_type.elem_type if info.type.HasField("tensor_type") else 0
    declared = ELEMENT_TYPES.get(number, fold.type_name(number)) if number else value.kind
    wide = "float64" in (declared, value.kind)
    if wide or declared == "bfloat16":
        raise ModelError(
            "is an output of a float type that is not supported",
            where=info.name,
            expected="float32 or float16",
            found="float64" if wide else declared,
            remedy="convert the model's float tensors to float32" if wide else "put a Cast to float32 in front of it",
        )
    if declared != value.kind:
        raise ModelError(
            "is an output of another type than declared", where=info.name, expected=declared, found=value.kind
        )
    if value.kind not in SUPPORTED or 0 in value.shape:
        found = f"{value.kind}{list(value.shape)}"
        raise ModelError(
            "is an output that cannot be returned", where=info.name, expected="a tensor of numbers", found=found
        )


def supported(domain: str, op: str) -> bool:
    """Whether an operator is imported or folded at all."""
    return (domain, op) in HANDLERS or (not domain and (op in fold.FOLDABLE or op in ("Constant", "If")))


def known_operators() -> dict[str, list[str]]:
    """Every operator that is imported, by domain, and those that are only folded when all their inputs are constant."""
    known: dict[str, list[str]] = {}
    for domain, op in sorted(HANDLERS):
        known.setdefault(domain or "ai.onnx", []).append(op)
    folded = (fold.FOLDABLE | {"Constant", "If"}) - set(known["ai.onnx"])
    return {**known, "ai.onnx, on constants only": sorted(folded)}


CUT_OFF = (
    "replace it by supported operators; where no product of quantized tensors is behind it, --allow-float-tail"
    " cuts it off"
)


def unsupported_operator(name: str, domain: str, op: str, opset: int, standard: str = CUT_OFF) -> ModelError:
    """The error for an operator that has no handler, with the remedy that fits it; standard: of a standard one."""
    full = f"{domain}.{op}" if domain else op
    if op in ("Loop", "Scan", "SequenceMap"):
        remedy = "export the model without control flow"
    elif domain in QONNX_DOMAINS:
        remedy = "export with integer quantizers (Quant, BipolarQuant, Trunc), before any conversion for FPGAs"
    elif domain not in ("", MICROSOFT):
        remedy = "export with standard operators (ai.onnx or com.microsoft)"
    elif op.startswith(("Dynamic", "QAttention")):
        remedy = "quantize the model statically, with calibration data"
    else:
        remedy = standard
    return ModelError(f"operator {full} is not supported", where=name, found=f"{full} (opset {opset})", remedy=remedy)
