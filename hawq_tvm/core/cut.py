"""Where a model's float end was cut off, because it cannot be compiled: what `main` carries of it.

The library gives the tensors at the cut; what comes behind them stays an ONNX model beside the library.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import tvm
from tvm import relax

# The model is stored beside the graph, not in it.
CUT, MODEL = "hawq.cut", "hawq.cut_model"


@dataclass(frozen=True)
class Cut:
    """The float end that was cut off.

    nodes: its operators as "NAME (OPERATOR)", those at the cut first.  tensors: what it reads of the library's
    outputs.  outputs: the model's outputs, in order, wherever they come from.
    """

    nodes: tuple[str, ...]
    tensors: tuple[str, ...]
    outputs: tuple[str, ...]

    def text(self) -> str:
        """Where the cut is and what is behind it, in a few words."""
        more = f" and {len(self.nodes) - 3} more" if len(self.nodes) > 3 else ""
        return f"{', '.join(self.tensors)}: {', '.join(self.nodes[:3])}{more}"

    def fields(self) -> dict[str, list[str]]:
        """JSON-ready fields."""
        return {key: list(value) for key, value in asdict(self).items()}


def attached(module: tvm.IRModule, cut: Cut, model: bytes) -> tvm.IRModule:
    """A module of one function that carries where its end was cut off, and that end as an ONNX model."""
    main = module["main"].with_attr(CUT, json.dumps(cut.fields()))
    return tvm.IRModule({"main": main.with_attr(MODEL, base64.b64encode(model).decode())})


def of_main(main: relax.Function) -> Cut | None:
    """Where the end was cut off, None where it was not."""
    attrs: Mapping[str, Any] = main.attrs or {}
    if CUT not in attrs:
        return None
    return of_fields(json.loads(str(attrs[CUT])))


def of_fields(fields: Mapping[str, Sequence[str]]) -> Cut:
    """What `fields` gave."""
    return Cut(*(tuple(fields[key]) for key in ("nodes", "tensors", "outputs")))


def model_of(main: relax.Function) -> bytes:
    """The ONNX model of the end that was cut off."""
    return base64.b64decode(str(main.attrs[MODEL]))


def without_model(module: tvm.IRModule) -> tvm.IRModule:
    """A module that says where it was cut off, and leaves the rest to a file of its own."""
    functions = {gv: f.without_attr(MODEL) if gv.name_hint == "main" else f for gv, f in module.functions_items()}
    return tvm.IRModule(functions)
