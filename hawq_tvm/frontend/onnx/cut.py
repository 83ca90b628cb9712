"""Cutting off the float end of a model that cannot be compiled: the rest is imported, the end stays an ONNX model.

1. An operator is in the float end when no product of quantized tensors can be reached from it. Tools quantize around
   movement, too: what only that stands behind an operator does not keep it from being cut off.
2. Where one of these cannot be imported, it and all that reads it is cut off; what comes of constants alone is copied.
3. Where fewer tensors separate an end that begins earlier among float operators, it begins there.
4. The tensors at the cut become outputs of the rest, constants excepted, which the end keeps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
import tvm
from onnx import helper, numpy_helper

from hawq_tvm.core import cut, ops, stages
from hawq_tvm.core.errors import ModelError
from hawq_tvm.frontend.common.text import last_line

from .graph import in_order, node_name, reads
from .importer import Importer, quantizing
from .infer import NUMBERS
from .narrow import earlier
from .node import MICROSOFT
from .reader import Source, opset_of, read_model
from .values import Array

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
INTEGER = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger", "QGemm", "QAttention")
RUNTIME = "ai.onnx.ml", MICROSOFT  # what ONNX Runtime knows beside ONNX's own operators


def import_before_cut(source: Source, shapes: Mapping[str, Sequence[int]] | None = None) -> tvm.IRModule:
    """The ANNOTATED module of a model, without those operators of its float end that cannot be imported
    (`hawq_tvm.core.cut`).

    Raises ModelError as `import_onnx` does where another operator cannot be imported, and where ONNX refuses the end.
    """
    model = read_model(source)
    end: End | None = None
    while True:
        importer = Importer(end.head() if end else model, shapes)
        try:
            module = importer.complete()
        except ModelError as error:
            found = end or End(model)
            if not found.grows(error):
                raise
            end = found
            continue
        if end is None:
            return module
        if not end.keeps_constants(module):
            return cut.attached(module, end.cut(), end.model(module))


class End:
    """The float end of a model.

    weighted: for a float model, where a product of quantized tensors is one with weights.
    at: the nodes that cannot be imported, by their position.  before: those that went with them, see `earlier`.
    """

    def __init__(self, model: onnx.ModelProto, weighted: bool = False) -> None:
        self.source, self.graph, self.weighted = model, model.graph, weighted
        self.at: set[int] = set()
        self.before: set[int] = set()
        self.constants: dict[str, Array] = {}
        try:
            self.nodes = list(in_order(model.graph))
        except ModelError:
            self.nodes = []
        self.reads = [reads(n) for n in self.nodes]
        self.constant = self._of_constants()
        self.allowed = self._outside()
        self.floats = self._floats()

    def _outside(self) -> set[int]:
        """The nodes that are no product of quantized tensors, and from which none can be reached."""
        dequantized = {name for n in self.nodes if n.op_type == "DequantizeLinear" for name in n.output}
        if self.weighted:
            dequantized = self.constant
        products: set[str] = set()  # tensors from which a convolution or matrix product can be reached
        inside: set[str] = set()  # those from which one of quantized tensors can
        found = set()
        for i in reversed(range(len(self.nodes))):
            node, made = self.nodes[i], set(filter(None, self.nodes[i].output))
            behind = bool(products & made)
            own = node.op_type in INTEGER or (node.op_type in PRODUCTS and bool(dequantized & self.reads[i]))
            if behind or own or node.op_type in PRODUCTS:
                products |= self.reads[i]
            if own or inside & made or (behind and quantizing(node)):
                inside |= self.reads[i]
            else:
                found.add(i)
        return set() if self.weighted and not inside else found

    def _floats(self) -> set[int]:
        """Of these the ones that are no products, nor behind them to be quantized: they may be in the end as well."""
        found, behind = set[int](), set[str]()
        for i in reversed(range(len(self.nodes))):
            node = self.nodes[i]
            kept = node.op_type in (*PRODUCTS, "DequantizeLinear") or quantizing(node)
            if kept or i not in self.allowed or not behind.isdisjoint(node.output):
                behind |= self.reads[i]
            else:
                found.add(i)
        return found

    def grows(self, error: ModelError) -> bool:
        """Move the cut before the operators that could not be imported; False where one of them is not in the float
        end.
        """
        found = {self._node_of(e) for e in (error, *error.others)}
        if not found <= self.allowed or found <= self.at:
            return False
        self.at |= found
        self.before = set()
        cut_off = set(self._cut_off())
        self.before = earlier(self.nodes, self.reads, self.floats, cut_off, self.constant, len(self.tensors()))
        return all(self._is_known(i) for i in self._cut_off()) and bool(self.tensors())

    def _node_of(self, error: ModelError) -> int:
        """The position of the operator that an error is about, of an output's error the one that computes it; else
        -1.
        """
        if error.op == "output":  # of a type or shape that no library returns
            return next((i for i, n in enumerate(self.nodes) if error.where in n.output), -1)
        names = {node_name(n): i for i, n in enumerate(self.nodes)}
        known = error.op and error.op not in ("graph", "input", "initializer", "shape")
        return names.get(stages.model_node(error.where, names), -1) if known else -1

    def _is_known(self, index: int) -> bool:
        node = self.nodes[index]
        if node.domain in RUNTIME:
            return True
        version = opset_of(self.source)
        return node.domain in ("", "ai.onnx") and version is not None and onnx.defs.has(node.op_type, version, "")

    def _cut_off(self) -> list[int]:
        """The nodes at the cut and all that reads them, in order."""
        made: set[str] = set()
        found = []
        for i, node in enumerate(self.nodes):
            if i in self.at | self.before or made & self.reads[i]:
                found.append(i)
                made.update(filter(None, node.output))
        return found

    def _of_constants(self) -> set[str]:
        """The tensors that come of constants alone."""
        known = {t.name for t in self.graph.initializer}
        for node, names in zip(self.nodes, self.reads, strict=True):
            if names <= known:
                known.update(filter(None, node.output))
        return known

    def _kept(self) -> list[int]:
        """The nodes of the end: those cut off, and before them what they need that comes of constants alone."""
        kept = set(self._cut_off())
        needed = {name for i in kept for name in self.reads[i]}
        for i in reversed(range(len(self.nodes))):
            made = set(filter(None, self.nodes[i].output))
            if i not in kept and made & needed and made <= self.constant:
                kept.add(i)
                needed |= self.reads[i]
        return sorted(kept)

    def _inputs(self) -> list[str]:
        """What the end reads of the rest and of the model's inputs, in order."""
        kept = self._kept()
        own = {name for i in kept for name in self.nodes[i].output} | {t.name for t in self.graph.initializer}
        outside = {i.name for i in self.graph.input} | {name for n in self.nodes for name in n.output}
        read = [name for i in kept for name in sorted(self.reads[i])]
        return [n for n in dict.fromkeys(read) if n in outside and n not in own and n not in self.constants]

    def tensors(self) -> list[str]:
        """What the end reads of the rest, in order."""
        inputs = {i.name for i in self.graph.input}
        return [n for n in self._inputs() if n not in inputs]

    def head(self) -> onnx.ModelProto:
        """The model without its end."""
        made = {name for i in self._cut_off() for name in self.nodes[i].output if name}
        head = onnx.ModelProto()
        head.CopyFrom(self.source)
        del head.graph.node[:], head.graph.output[:]
        head.graph.node.extend(n for n in self.graph.node if not made.intersection(n.output))
        head.graph.output.extend(o for o in self.graph.output if o.name not in made)
        named = {o.name for o in head.graph.output}
        head.graph.output.extend(onnx.ValueInfoProto(name=n) for n in self.tensors() if n not in named)
        return head

    def keeps_constants(self, module: tvm.IRModule) -> bool:
        """Whether tensors at the cut turned out to be constants of the rest: the end keeps them from now on."""
        found = {n: ops.const_value(e) for n, e in _outputs(module).items() if ops.is_const(e) and n in self.tensors()}
        self.constants.update(found)
        return bool(found)

    def parts(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The end's nodes in order, and the initializers that they read."""
        kept = self._kept()
        needed = {name for i in kept for name in self.reads[i]}
        return [self.nodes[i] for i in kept], [t for t in self.graph.initializer if t.name in needed]

    def cut(self) -> cut.Cut:
        """What the rest says of its end."""
        behind = [i for i in self._cut_off() if i not in self.at]
        names = [f"{node_name(self.nodes[i])} ({self.nodes[i].op_type})" for i in (*sorted(self.at), *behind)]
        return cut.Cut(tuple(names), tuple(self.tensors()), tuple(o.name for o in self.graph.output))

    def model(self, module: tvm.IRModule) -> bytes:
        """The end as an ONNX model whose inputs have the types and shapes of what the rest gives.

        Raises ModelError naming the first operator that was cut off when ONNX refuses it.
        """
        nodes, initializers = self.parts()
        made = {name for n in nodes for name in n.output}
        types = _types(module)
        graph = helper.make_graph(
            [_with_defaults(n, opset_of(self.source) or 0) for n in nodes],
            "tail",
            [helper.make_tensor_value_info(n, NUMBERS[types[n][0]], types[n][1]) for n in self._inputs()],
            [_without_shape(o) for o in self.graph.output if o.name in made],
            initializers + [numpy_helper.from_array(a, n) for n, a in self.constants.items()],
        )
        end = helper.make_model(graph, ir_version=self.source.ir_version, opset_imports=self.source.opset_import)
        try:
            end = onnx.shape_inference.infer_shapes(end, strict_mode=True, data_prop=True)
            _check_nodes(end)
        except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError) as e:
            raise ModelError(
                "begins the float end that is cut off, which ONNX refuses",
                where=self.cut().nodes[0],
                found=last_line(e),
                remedy="correct the model, or cut it at these tensors yourself: " + ", ".join(self.tensors()),
            ) from None
        return bytes(end.SerializeToString(deterministic=True))


def _outputs(module: tvm.IRModule) -> dict[str, tvm.relax.Expr]:
    main = module["main"]
    returned, _ = stages.outputs(main)
    return dict(zip(map(str, main.attrs["hawq.output_names"]), returned.fields, strict=True))


def _types(module: tvm.IRModule) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Element type and shape of the inputs and outputs of a module by name."""
    main = module["main"]
    sides = ({p.name: p for p in main.params}, "hawq.input_types"), (_outputs(module), "hawq.output_types")
    return {
        n: (str(k), ops.shape_of(v))
        for values, kinds in sides
        for (n, v), k in zip(values.items(), main.attrs[kinds], strict=True)
    }


def _with_defaults(node: onnx.NodeProto, version: int) -> onnx.NodeProto:
    """A node that names its attributes' defaults: inference fails on operators that ONNX defines by others else."""
    if node.domain not in ("", "ai.onnx") or not onnx.defs.has(node.op_type, version, ""):
        return node
    given, full = {a.name for a in node.attribute}, onnx.NodeProto()
    full.CopyFrom(node)
    known = onnx.defs.get_schema(node.op_type, version, "").attributes.items()
    full.attribute.extend(a.default_value for n, a in known if n not in given and a.default_value.name)
    return full


def _check_nodes(model: onnx.ModelProto) -> None:
    """Operands and attributes against ONNX's definitions; sizes that nobody knows are no fault."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = model.ir_version
    context.opset_imports = {o.domain: o.version for o in model.opset_import}
    for node in model.graph.node:
        if not any(a.HasField("g") for a in node.attribute):  # whose names outside of it nobody would know here
            onnx.checker.check_node(node, context)


def _without_shape(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """An output's declaration without sizes, which exporters often do not know."""
    plain = onnx.ValueInfoProto(name=value.name)
    if value.type.HasField("tensor_type") and value.type.tensor_type.elem_type:
        plain.type.tensor_type.elem_type = value.type.tensor_type.elem_type
    return plain
