"""Reading an ExportedProgram, in memory or in a .pt2 file: the only place that knows PyTorch."""

from __future__ import annotations

import io
import logging
import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.contract import Promise
from hawq_tvm.core.errors import ModelError
from hawq_tvm.core.files import check_model
from hawq_tvm.core.trust import REMEDY, trusted
from hawq_tvm.frontend.common.inputs import Declared
from hawq_tvm.frontend.common.text import last_line, stranger
from hawq_tvm.frontend.common.values import Array

from . import archive
from .layers import layer_names
from .program import Call, Program, Ref

LOAD_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    OSError,
    EOFError,
    NotImplementedError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
KEPT = (int, float, bool, str, type(None))


def read_program(source: Any) -> Program:
    """The program of a path, of bytes, or of an ExportedProgram in memory; a Program is returned as it is.

    Raises ModelError when it cannot be read, changes its buffers or inputs, or when PyTorch is not installed.
    """
    if isinstance(source, Program):
        return source
    where = os.fspath(source) if isinstance(source, str | os.PathLike) else "model"
    _need_torch(where)
    exported = load_exported(source) if isinstance(source, str | os.PathLike | bytes) else source
    return _converted(_functional(exported), where)


def _need_torch(where: str) -> None:
    try:
        import torch

        # Registers the operators that quantized programs are written in; without them loading fails without saying so.
        import torch.ao.quantization.fx._decomposed
    except ImportError as e:
        raise ModelError(
            "is a PyTorch program, which only PyTorch can read",
            where=where,
            found=last_line(e),
            remedy="pip install 'hawq-tvm[torch]'",
        ) from None
    del torch


def load_exported(source: str | os.PathLike[str] | bytes) -> Any:
    """The ExportedProgram of a .pt2 file, read without running anything that it holds, unless files are trusted.

    Raises ModelError when it cannot be read so, is no such file, or when PyTorch is not installed.
    """
    where = "model" if isinstance(source, bytes) else os.fspath(source)
    if not isinstance(source, bytes):
        check_model(source)
        if not os.path.isfile(source):
            raise ModelError("is no file", where=where, expected="a .pt2 file")
    _need_torch(where)
    import torch

    whole: Any = io.BytesIO(source) if isinstance(source, bytes) else Path(source)
    file = whole if trusted() else archive.checked(source, where)
    try:
        with _quiet(), nullcontext() if trusted() else archive.restricted():
            return torch.export.load(file)
    except LOAD_ERRORS as e:
        if not trusted() and ("weights_only" in str(e).lower() or isinstance(e, pickle.UnpicklingError)):
            raise ModelError(
                "holds pickled objects, which can be code",
                where=where,
                expected="tensors, numbers and operators alone",
                found=stranger(e),
                remedy=REMEDY,
            ) from None
        raise ModelError(
            f"cannot be loaded by torch.export.load: {last_line(e)}",
            where=where,
            found=f"torch {torch.__version__}",
            remedy="export it again with this version of PyTorch; operators of other packages must be replaced first",
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warnings, and without the tracebacks that it logs beside the errors it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


def _functional(exported: Any) -> Any:
    """The program without operators that change their operands (relu_ and the like); others stay as they are."""
    calls = [n for n in exported.graph.nodes if n.op == "call_function"]
    if not any(getattr(getattr(n.target, "_schema", None), "is_mutable", False) for n in calls):
        return exported
    with _quiet():
        return exported.run_decompositions({})


def _converted(exported: Any, where: str) -> Program:
    import torch

    signature = exported.graph_signature
    arrays = {**exported.state_dict, **exported.constants}
    constants: dict[str, Array] = {}
    titles: dict[str, str] = {}
    inputs: list[Declared] = []
    literals: dict[str, Any] = {}
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    for spec in signature.input_specs:
        name, kind = spec.arg.name, spec.kind.name
        if kind == "USER_INPUT" and isinstance(placeholders[name].meta.get("val"), torch.Tensor):
            inputs.append(_declared(placeholders[name]))
        elif kind == "USER_INPUT":
            literals[name] = getattr(spec.arg, "value", None)
        elif kind in ("PARAMETER", "BUFFER", "CONSTANT_TENSOR"):
            titles[name] = str(spec.target)
            constants[name] = _array(arrays[spec.target], str(spec.target))
        else:
            raise ModelError(
                "takes an input that is no tensor", where=name, expected="tensors", found=kind.lower().replace("_", " ")
            )
    for out in signature.output_specs:
        if out.kind.name not in ("USER_OUTPUT", "LOSS_OUTPUT"):
            raise ModelError(
                "changes a tensor of its own while it runs",
                where=str(out.target),
                expected="outputs only",
                found=out.kind.name.lower().replace("_", " "),
                remedy="export the model in evaluation mode",
            )
    nodes = _alive(exported.graph)
    (output,) = (n for n in exported.graph.nodes if n.op == "output")
    raw = [_call(n) for n in nodes]
    layers = layer_names(raw, [_path(n) for n in nodes], [i.name for i in inputs], set(titles))
    return Program(
        tuple(inputs),
        constants,
        titles,
        literals,
        _limits(exported.range_constraints),
        tuple(Call(c.name, layer, c.op, c.overload, c.arguments) for c, layer in zip(raw, layers, strict=True)),
        tuple(_outputs(exported, [_plain(v) for v in output.args[0]])),
        torch.__version__,
        dict(_promises(nodes)),
    )


def _alive(graph: Any) -> list[Any]:
    """The nodes that an output depends on: exported programs take every result apart, read or not."""
    needed: set[Any] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in needed:
            needed.update(node.all_input_nodes)
    return [n for n in graph.nodes if n in needed and n.op != "placeholder"]


def _promises(nodes: Iterable[Any]) -> Iterator[tuple[str, Promise]]:
    """What PyTorch computed of every result while it exported; a symbolic size is none."""
    import torch

    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            yield (
                node.name,
                Promise(
                    "PyTorch's export",
                    _dtype(value.dtype),
                    tuple(d if isinstance(d, int) else None for d in value.shape),
                ),
            )


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _declared(node: Any) -> Declared:
    value = node.meta["val"]
    dims: list[int | str] = [d if isinstance(d, int) else str(d) for d in value.shape]
    return Declared(node.name, _dtype(value.dtype), dims)


def _array(tensor: Any, title: str) -> Array:
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ModelError(
            "is a constant that is no tensor", where=title, expected="tensors", found=type(tensor).__name__
        )
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise ModelError(
            "is not stored as a plain tensor",
            where=title,
            expected="a dense torch.Tensor",
            found=type(tensor).__name__,
            remedy="quantize with PT2E (prepare_pt2e and convert_pt2e), which keeps weights as int8 tensors",
        )
    if tensor.is_meta:
        raise ModelError(
            "holds no values: it is on the device meta",
            where=title,
            expected="a tensor in memory",
            remedy="load the weights before the model is exported",
        )
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return np.asarray(tensor.detach().cpu().float().numpy().astype(ml_dtypes.bfloat16))
    try:
        return np.ascontiguousarray(tensor.detach().cpu().numpy()).reshape(tuple(tensor.shape))
    except (TypeError, RuntimeError) as e:
        raise ModelError(f"cannot be read: {last_line(e)}", where=title, found=_dtype(tensor.dtype)) from None


def _path(node: Any) -> str:
    """The path of the innermost module that a node was traced in, empty for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    path = path.removeprefix("L['self']").removeprefix("L__self__").strip(".")
    return "" if path.startswith("_empty_nn_module_stack") else path


def _call(node: Any) -> Call:
    if node.op != "call_function":
        return Call(node.name, "", f"higher_order.{node.op}", "", {})
    target = node.target
    schema = getattr(target, "_schema", None)
    if schema is None:
        module = str(getattr(target, "__module__", "")).lstrip("_")
        namespace = "higher_order" if hasattr(target, "namespace") else module
        name = f"{namespace}.{getattr(target, '__name__', target)}"
        return Call(node.name, "", name, "", {f"arg{i}": _plain(a) for i, a in enumerate(node.args)})
    arguments = {}
    for i, formal in enumerate(schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(formal.name, formal.default_value)
        arguments[str(formal.name)] = _plain(given)
    return Call(node.name, "", str(schema.name).replace("::", "."), str(schema.overload_name) or "default", arguments)


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, torch.dtype):
        return _dtype(value)
    return value if isinstance(value, KEPT) else str(value)


def _limits(constraints: Mapping[Any, Any]) -> dict[str, tuple[int, int]]:
    huge = 2**31 - 1

    def bound(value: Any) -> int:
        return huge if "oo" in str(value) else min(int(value), huge)

    return {str(k): (bound(v.lower), bound(v.upper)) for k, v in constraints.items()}


def _outputs(exported: Any, values: list[Any]) -> Iterator[tuple[str, Any]]:
    """Names of the outputs: their keys where the model returns a dictionary, else the names of the nodes."""
    from torch.utils import _pytree as pytree

    places = list(range(len(values)))
    spec = exported.call_spec.out_spec
    keys = {}
    if spec is not None and spec.num_leaves == len(values):
        paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(places, spec))
        keys = {i: str(p[0].key) for p, i in paths if len(p) == 1 and isinstance(p[0], pytree.MappingKey)}
    taken: set[str] = set()
    for i, value in enumerate(values):
        wanted = keys.get(i, value.name if isinstance(value, Ref) else f"output{i}")
        name, count = wanted, 1
        while name in taken:
            name, count = f"{wanted}_{count}", count + 1
        taken.add(name)
        yield name, value
