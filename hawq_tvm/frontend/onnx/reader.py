"""Reading an ONNX model from a path, bytes or a ModelProto, and checking what concerns the file as a whole."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_model, uses_external_data

from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.files import check_model
from hawq_tvm.frontend.common.text import last_line

Source = str | os.PathLike[str] | bytes | onnx.ModelProto

IR_VERSIONS = (3, 14)
# Before 7 operands broadcast as attributes say.
OPSETS = (7, 28)
FOREIGN = {
    ".tflite": "a TensorFlow Lite model",
    ".pt2": "a PyTorch exported program",
    ".pt": "a PyTorch checkpoint",
    ".pth": "a PyTorch checkpoint",
    ".ort": "an ONNX Runtime flatbuffer",
    ".pb": "a TensorFlow graph",
}


def read_model(source: Source) -> onnx.ModelProto:
    """The model, its external data loaded, its functions inlined.

    Raises ModelError when it cannot be read, is not ONNX, or has an IR version or opset that is not supported.
    """
    if isinstance(source, onnx.ModelProto):
        model, where = source, source.graph.name or "model"
    elif isinstance(source, bytes | bytearray | memoryview):
        model, where = _parse(bytes(source), "model"), "model"
    elif isinstance(source, str | os.PathLike):
        where = os.fspath(source)
        model = _parse(_read(Path(where)), where)
        _load_external(model, Path(where))
    else:
        raise ModelError("is not a model", where=type(source).__name__, expected="a path, bytes or an onnx.ModelProto")
    _check_text(model, where)
    _check_versions(model, where)
    for tensor in _tensors(model.graph):
        if uses_external_data(tensor):
            raise ModelError(
                f"keeps initializer {tensor.name!r} in an external file, which bytes cannot name",
                where=where,
                expected="a model with its data",
                remedy="pass the path of the model, or load it with onnx.load",
            )
    return _inline_functions(model, where)


def opset_of(model: onnx.ModelProto, domain: str = "") -> int | None:
    """The imported version of an operator domain, None when it is not imported."""
    versions = [int(o.version) for o in model.opset_import if (o.domain if o.domain != "ai.onnx" else "") == domain]
    return max(versions) if versions else None


def _read(path: Path) -> bytes:
    check_model(path)
    try:
        if not (path.is_file() or path.is_dir()):
            raise ModelError("is not a regular file", where=str(path), expected="an ONNX file")
        return path.read_bytes()
    except IsADirectoryError:
        models = sorted(p.name for p in path.glob("*.onnx"))
        remedy = f"pass a file, such as {path / models[0]}" if models else "pass the .onnx file itself"
        found = "a package, which was compiled already" if (path / "manifest.json").is_file() else ""
        raise ModelError(
            "is a directory", where=str(path), expected="an ONNX file", found=found, remedy=remedy
        ) from None
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot be read: {e}", where=str(path)) from None


def _parse(data: bytes, where: str) -> onnx.ModelProto:
    if not data:
        raise ModelError("is empty", where=where, expected="an ONNX model", found="0 bytes")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        kind, remedy = _foreign(data, where)
        raise ModelError(
            "is not a readable ONNX model",
            where=where,
            expected="an ONNX protobuf",
            found=f"{len(data)} bytes: {kind}",
            remedy=remedy,
        ) from None
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise ModelError(
            "is not an ONNX model",
            where=where,
            expected="a ModelProto with a graph",
            found=f"{len(data)} bytes without one: {_foreign(data, where)[0]}",
            remedy=_foreign(data, where)[1],
        )
    return model


def _foreign(data: bytes, where: str) -> tuple[str, str]:
    """What a file is that is not ONNX, and what can be done about it."""
    suffix = ".tflite" if data[4:8] == b"TFL3" else Path(where).suffix.lower()
    remedy = {
        ".tflite": (
            f"pip install tf2onnx tensorflow; python -m tf2onnx.convert --opset 18 --tflite {shlex.quote(where)}"
            " --output model.onnx"
        ),
        ".pb": (
            "pip install tf2onnx tensorflow; python -m tf2onnx.convert --opset 18 --saved-model FOLDER --output"
            " model.onnx, and hawq-tvm quantize it"
        ),
        ".ort": "give the ONNX model that it was made of",
    }.get(suffix, "export or copy the model again")
    return FOREIGN.get(suffix, "truncated, damaged or another format"), remedy


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    for tensor in _tensors(model.graph):
        if not uses_external_data(tensor):
            continue
        try:
            name = ExternalDataInfo(tensor).location
        except (ValueError, TypeError) as e:
            raise ModelError(
                f"has an external data entry that is not valid: {e}", where=f"{path}: {tensor.name}"
            ) from None
        file = path.parent / name
        if not os.path.isfile(file):  # Path.is_file raises for names that no file can have
            raise ModelError(
                f"needs external data {name!r} for initializer {tensor.name!r}, which is missing",
                where=str(path),
                expected=str(file),
                remedy="keep the data file next to the model",
            )
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, TypeError, MemoryError, onnx.checker.ValidationError) as e:
        raise ModelError(f"has external data that cannot be read: {last_line(e)}", where=str(path)) from None


def _check_text(model: onnx.ModelProto, where: str) -> None:
    """Every string is UTF-8: protobuf hands damaged ones out as bytes."""
    messages: list[Message] = [model]
    while messages:
        message = messages.pop()
        for field, value in message.ListFields():
            values = [value] if isinstance(value, Message | str | bytes) else value
            if field.type == FieldDescriptor.TYPE_MESSAGE:
                messages.extend(values)
            elif field.type == FieldDescriptor.TYPE_STRING and not all(isinstance(v, str) for v in values):
                found = next(v for v in values if not isinstance(v, str))
                raise ModelError(
                    "has text that is not valid UTF-8: the file is damaged",
                    where=where,
                    found=f"{field.name} {found!r}",
                )


def _check_versions(model: onnx.ModelProto, where: str) -> None:
    if not IR_VERSIONS[0] <= model.ir_version <= IR_VERSIONS[1]:
        raise ModelError(
            "has an IR version that is not supported",
            where=where,
            expected=f"{IR_VERSIONS[0]} to {IR_VERSIONS[1]}",
            found=str(model.ir_version),
        )
    opset = opset_of(model)
    if opset is None:
        if any(o.domain for o in model.opset_import) and all(n.domain for n in model.graph.node):
            return
        raise ModelError(
            "does not say which operator set it uses", where=where, expected="an opset_import of the domain ai.onnx"
        )
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ModelError(
            "has an operator set that is not supported",
            where=where,
            expected=f"opset {OPSETS[0]} to {OPSETS[1]}",
            found=f"opset {opset}",
            remedy="export the model again with one of these",
        )


def _inline_functions(model: onnx.ModelProto, where: str) -> onnx.ModelProto:
    if not model.functions:
        return model
    from onnx import inliner

    _check_functions(model, where)
    try:
        return inliner.inline_local_functions(model)
    except (RuntimeError, ValueError, TypeError, DecodeError, onnx.checker.ValidationError) as e:
        raise ModelError(f"has functions that cannot be inlined: {last_line(e)}", where=where) from None


# What a model may become by inlining: nodes, and functions within one another.
MAX_NODES, MAX_NESTED = 1 << 16, 100


def _check_functions(model: onnx.ModelProto, where: str) -> None:
    """Raise ModelError where functions that call functions would make very many nodes, or never end; they are not
    inlined yet.
    """
    bodies = {(f.domain, f.name): [n for n in f.node] for f in model.functions}
    sizes: dict[tuple[str, str], int] = {}

    def size(nodes: Iterable[onnx.NodeProto], path: tuple[tuple[str, str], ...]) -> int:
        total = 0
        for node in nodes:
            key = node.domain, node.op_type
            total += called(key, path, node) if key in bodies else 1
            total += sum(size(g.node, path) for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs))
        return total

    def called(key: tuple[str, str], path: tuple[tuple[str, str], ...], node: onnx.NodeProto) -> int:
        if key in path or len(path) > MAX_NESTED:
            raise ModelError(
                "has functions that call one another without end, or very deeply",
                where=node.name or node.op_type or where,
                expected=f"at most {MAX_NESTED} within one another",
                found=".".join(key),
                remedy="export the model with its functions inlined",
            )
        if key not in sizes:
            sizes[key] = size(bodies[key], (*path, key))
        return sizes[key]

    for node in model.graph.node:
        count = size([node], ())
        if count > MAX_NODES:
            raise ModelError(
                "calls functions that call functions, which would become very many nodes",
                where=node.name or next(iter(node.output), node.op_type),
                expected=f"at most {MAX_NODES} nodes",
                found=str(count),
                remedy="export the model with its functions inlined",
            )


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and every subgraph inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner: Iterable[onnx.GraphProto] = [attribute.g] if attribute.HasField("g") else attribute.graphs
            for g in inner:
                yield from graphs_of(g)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for g in graphs_of(graph):
        yield from g.initializer
        for node in g.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
