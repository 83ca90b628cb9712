"""The integer-only certificate: a walk over every lowered kernel, and over the machine code made from it.

The border (hawq.quantize, hawq.dequantize, hawq.dynamic_quantize) and an allowed float head or tail are excluded by
what they are in the PACKED module, never by name; everything between must be integer in TIR and free of floating
point instructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm import relax, tirx

from hawq_tvm.core import ops, ranges, stages
from hawq_tvm.core.errors import StageError

from .disassemble import inspect_library
from .distances import both
from .sass import inspect_device_code

# Integers, vectors of them, truth values, pointers, and the type of a statement that has no value.
_INTEGER_TYPES = ("int", "uint", "bool", "handle", "void")


@dataclass(frozen=True)
class Certificate:
    """What was proved about one compiled model; `ok` says that it is integer-only.

    distances: how far, in steps beyond the 1/2 of rounding, a layer can be from the real formula of its inputs, where
    that is bounded and not enumerated.
    outputs: how far a float output, which nothing rounds, can be from the real formula of its layers' inputs, a real
    number, where it is no integer's own.
    nonlinear: the arithmetic of every softmax, normalization and function.
    functions: of the layers with a function of sums (A31), the thresholds of the real function, and how many of them
    the layer passes at another sum.
    code_functions, instructions: of the CPU.  device_functions, device_instructions: of the GPU, by architecture.
    """

    kernels: int
    border: tuple[str, ...]
    float_tail: tuple[str, ...]
    buffers: int
    expressions: int
    tir_offenders: tuple[str, ...]
    code_functions: int
    instructions: int
    code_offenders: tuple[str, ...]
    thresholds: int
    differing: int
    not_enumerated: tuple[str, ...]
    differing_layers: dict[str, int]
    roundings: dict[str, int]
    margins: tuple[dict[str, Any], ...] = field(default_factory=tuple)
    device_functions: int = 0
    device_instructions: dict[str, int] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, float] = field(default_factory=dict)
    nonlinear: dict[str, str] = field(default_factory=dict)
    functions: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No float operation in TIR nor in machine code between the input's quantize and the output's dequantize."""
        return not self.tir_offenders and not self.code_offenders

    @property
    def least_margin(self) -> dict[str, Any] | None:
        """The accumulator with the fewest spare bits."""
        return min(self.margins, key=lambda m: m["spare_bits"], default=None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {"ok": self.ok, **asdict(self), "least_margin": self.least_margin}


def certify(
    packed: tvm.IRModule, tir: tvm.IRModule, library: Path | bytes, architectures: Sequence[str] = ()
) -> Certificate:
    """Certify a compiled model from its PACKED module, its TIR module and its built library.

    architectures: of GPUs, for which the library must hold code.
    Raises what `prove_graph` and `with_code` raise.
    """
    return with_code(prove_graph(packed, tir), packed, tir, library, architectures)


def prove_graph(packed: tvm.IRModule, tir: tvm.IRModule) -> Certificate:
    """The certificate of a compiled model so far as its modules tell, without the library's machine code.

    Raises StageError when a layer has no kernel, OverflowBoundError when an accumulator can overflow.
    """
    border = {name for name, f in stages.private_functions(packed).items() if _is_border(f)}
    # What the compiler adds for a float tail has no counterpart in the PACKED module.
    kernels = sorted(set(stages.private_functions(packed)) - border)
    functions = {gv.name_hint: f for gv, f in tir.functions_items() if isinstance(f, tirx.PrimFunc)}
    walk = _TirWalk()
    for name in kernels:
        layer = str(packed[name].attrs["hawq.layer"])
        if name not in functions:
            raise StageError("has no kernel", where=layer, expected=f"a PrimFunc {name}")
        walk.function(layer, functions[name])
    requantizes, (bounded, ends) = _requantizes(packed), both(packed)
    # Thresholds against integers that are near the real value themselves say nothing: their distance does.
    proofs = [
        (layer, int(c.attrs["thresholds"]), int(c.attrs["differing"]))
        for layer, c in requantizes
        if layer not in bounded and layer not in ends
    ]
    roundings = Counter(str(c.attrs["rounding"]) for _, c in requantizes)
    differing: Counter[str] = Counter()
    for layer, _, d in proofs:
        differing[layer] += max(d, 0)
    return Certificate(
        kernels=len(kernels),
        border=tuple(sorted(border)),
        float_tail=tuple(sorted(stages.float_tail(packed["main"]))),
        buffers=walk.buffers,
        expressions=walk.expressions,
        tir_offenders=tuple(walk.offenders),
        code_functions=0,
        instructions=0,
        code_offenders=(),
        thresholds=sum(t for _, t, _ in proofs if t >= 0),
        differing=differing.total(),
        not_enumerated=tuple(layer for layer, t, _ in proofs if t < 0),
        differing_layers={layer: d for layer, d in differing.items() if d},
        roundings=dict(roundings),
        distances=bounded,
        outputs={layer: distance for layer, distance in ends.items() if distance},
        nonlinear=_nonlinear(packed),
        functions=_functions(packed),
        margins=tuple(m.to_dict() for m in ranges.margins(packed)),
    )


def with_code(
    proved: Certificate,
    packed: tvm.IRModule,
    tir: tvm.IRModule,
    library: Path | bytes,
    architectures: Sequence[str] = (),
) -> Certificate:
    """A certificate of `prove_graph` with what the library's machine code tells.

    Raises PackageError when the library cannot be disassembled or lacks a kernel.
    """
    kernels = sorted(set(stages.private_functions(packed)) - set(proved.border))
    called = set(stages.called_kernels(tir))
    code = inspect_library(library, [k for k in kernels if k in called])
    device = inspect_device_code(library, kernels, architectures)
    return replace(
        proved,
        code_functions=code.functions,
        instructions=code.instructions,
        code_offenders=tuple(
            f"{o.function}+{o.address:#x}: {o.instruction}" for o in (*code.offenders, *device.offenders)
        ),
        device_functions=device.functions,
        device_instructions=device.instructions,
    )


def _is_border(func: relax.Function) -> bool:
    return all(stages.is_border(b) for b in stages.bindings(func) if isinstance(b.value, relax.Call))


def _functions(packed: tvm.IRModule) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for layer, call in (*_calls(packed, "hawq.lookup"), *_calls(packed, "hawq.interpolate")):
        if int(call.attrs.get("thresholds", -1)) >= 0:
            row = found.setdefault(layer, {"thresholds": 0, "differing": 0})
            for name in row:
                row[name] += int(call.attrs[name])
    return found


_NONLINEAR = {
    "hawq.softmax": "softmax (A17)",
    "hawq.softmax_wide": "softmax (A24)",
    "hawq.layer_norm": "normalization (A25)",
    "hawq.lookup": "table (A16)",
    "hawq.divide": "quotient (A32)",
    "hawq.interpolate": "polynomials in cells (A31)",
    "hawq.i_erf": "I-BERT's i-erf (A28)",
    "hawq.i_gelu": "I-BERT's i-GELU (A28)",
    "hawq.i_softmax": "I-BERT's i-softmax (A29)",
    "hawq.i_layer_norm": "I-BERT's i-LayerNorm (A30)",
}


def _nonlinear(packed: tvm.IRModule) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for operator, arithmetic in _NONLINEAR.items():
        for layer, call in _calls(packed, operator):
            of_sums = "slope" in call.attrs if operator == "hawq.lookup" else False
            found.setdefault(layer, []).append("table of sums (A27)" if of_sums else arithmetic)
    return {layer: ", ".join(dict.fromkeys(kinds)) for layer, kinds in found.items()}


def _requantizes(packed: tvm.IRModule) -> list[tuple[str, relax.Call]]:
    return _calls(packed, "hawq.requantize")


def _calls(packed: tvm.IRModule, name: str) -> list[tuple[str, relax.Call]]:
    found = []
    for func in stages.private_functions(packed).values():
        layer = str(func.attrs["hawq.layer"])
        found += [(layer, b.value) for b in stages.bindings(func) if ops.op_name(b.value) == name]
    return found


class _TirWalk:
    """Visits every node of a PrimFunc, whatever its kind, by reflection, and notes the types that are not integer."""

    def __init__(self) -> None:
        self.buffers = self.expressions = 0
        self.offenders: list[str] = []

    def function(self, layer: str, func: tirx.PrimFunc) -> None:
        """Walk a function's parameters and body."""
        seen: dict[int, Any] = {}  # holds the nodes, so that no address is used twice
        pending: list[Any] = [*func.params, func.body]
        while pending:
            node = pending.pop()
            if isinstance(node, tvm_ffi.Array):
                pending += list(node)
            elif isinstance(node, tvm_ffi.Map):
                pending += [x for item in node.items() for x in item]
            elif isinstance(node, tvm_ffi.Object) and not isinstance(node, str):
                handle = node.__chandle__()
                if handle not in seen:
                    seen[handle] = node
                    self._node(layer, node)
                    pending += [getattr(node, name) for name in _field_names(node)]

    def _node(self, layer: str, node: Any) -> None:
        for dtype in (getattr(node, "dtype", None), getattr(getattr(node, "ty", None), "dtype", None)):
            if dtype is not None:
                is_buffer = isinstance(node, tirx.Buffer)
                self.buffers += is_buffer
                self.expressions += not is_buffer
                if str(dtype) and not str(dtype).startswith(_INTEGER_TYPES):  # void is written as nothing
                    self.offenders.append(f"{layer}: {type(node).__name__} is {dtype}")
                return


def _field_names(node: Any) -> list[str]:
    names: list[str] = []
    info = getattr(type(node), "__tvm_ffi_type_info__", None)
    while info is not None:
        names += [f.name for f in info.fields if f.name != "span"]
        info = info.parent_type_info
    return names
