"""A node against ONNX's own operator schemas, before its handler sees it."""

from __future__ import annotations

from typing import Any

from onnx import defs

from .node import Entry, Node
from .reader import OPSETS
from .values import FLOAT_KINDS, Tensor, onnx_type


def check_schema(node: Node, entry: Entry | None) -> None:
    """Check a node's number of inputs, attributes and element types; outside the standard domain only the first."""
    if node.domain:
        low, high = entry.inputs if entry and entry.inputs else (0, 1 << 30)
        node.need(
            low <= len(node.inputs) <= high,
            "has the wrong number of inputs",
            expected=f"{low} to {high}",
            found=len(node.inputs),
        )
        return
    try:
        schema = defs.get_schema(node.op, node.opset, "")
    except defs.SchemaError:
        raise node.fail("does not exist in this opset", found=f"opset {node.opset}") from None
    count = len(node.inputs)
    node.need(
        schema.min_input <= count <= schema.max_input,
        "has the wrong number of inputs",
        expected=f"{schema.min_input} to {schema.max_input}",
        found=count,
    )
    node.need(
        len(node.outputs) <= schema.max_output,
        "has too many outputs",
        expected=f"at most {schema.max_output}",
        found=len(node.outputs),
    )
    for name, attribute in schema.attributes.items():
        if attribute.required and name not in node.attributes:
            raise node.fail(f"lacks its attribute {name}")
        wanted: Any = attribute.type
        if name in node.attributes and node.attributes[name].type != int(wanted):
            raise node.fail(f"has an attribute {name} of the wrong type", expected=str(wanted.name).lower())
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        later = [
            v for v in range(node.opset + 1, OPSETS[1] + 1) if unknown[0] in defs.get_schema(node.op, v, "").attributes
        ]
        remedy = f"declare opset {later[0]}, which has it, or convert the model" if later else ""
        raise node.fail(
            f"has attributes that opset {node.opset} does not know", found=", ".join(unknown), remedy=remedy
        )
    if not (entry and entry.checks_types):
        _check_types(node, schema)


def _check_types(node: Node, schema: defs.OpSchema) -> None:
    seen: dict[str, tuple[str, str]] = {}
    for i, value in enumerate(node.inputs):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)]
        if value is None:
            node.need(formal.option != defs.OpSchema.FormalParameterOption.Single, f"lacks its input {formal.name}")
            continue
        found = onnx_type(value.kind)
        if found not in formal.types:
            allowed = ", ".join(sorted(t[7:-1] for t in formal.types if t.startswith("tensor("))[:16])
            raise node.fail(
                f"does not take this element type as its input {formal.name}", expected=allowed, found=found[7:-1]
            )
        group = "float" if value.kind in FLOAT_KINDS else value.kind
        same, first = seen.setdefault(formal.type_str, (group, node.source(i)))
        uniform = formal.is_homogeneous or formal.option != defs.OpSchema.FormalParameterOption.Variadic
        if uniform and same != group:
            raise node.fail(
                "needs one element type for its inputs",
                expected=f"{same} as {first!r}",
                found=f"{group} in {node.source(i)!r}",
            )
    if any(isinstance(v, Tensor) and v.kind == "float64" for v in node.inputs):
        raise node.fail("computes in float64", remedy="convert the model to float32")
