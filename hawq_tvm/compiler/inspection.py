"""What is in a model, and what would become of it: formats, bit widths, and every operator that cannot be integer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawq_tvm.core.errors import HawqError


@dataclass(frozen=True)
class InspectReport:
    """The findings; `compilable` says whether `compile` would accept the model.

    integer_layers: how many layers become integer.  float_tail: the layers that stay float, where that is allowed.
    """

    model: dict[str, Any]
    unsupported: tuple[dict[str, str], ...]
    float_layers: tuple[dict[str, str], ...]
    integer_layers: int
    error: str = ""
    float_tail: tuple[str, ...] = ()

    @property
    def compilable(self) -> bool:
        """Whether every operator is supported and becomes integer, or stays float where that is allowed."""
        return not (self.unsupported or self.float_layers or self.error)

    @property
    def verdict(self) -> str:
        """One line."""
        if self.compilable and self.float_tail:
            names = ", ".join(self.float_tail)
            return f"compiles to integers ({self.integer_layers} integer layers), with FLOAT outside the integer region: {names}"
        if self.compilable:
            return f"compiles to integers alone ({self.integer_layers} integer layers)"
        if self.error:
            return f"cannot be compiled: {self.error}"
        problems = len(self.unsupported) + len(self.float_layers)
        return f"cannot be compiled to integers as it is: {problems} {'problem' if problems == 1 else 'problems'}, listed with remedies"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "model": self.model, "unsupported": list(self.unsupported), "float_layers": list(self.float_layers),
            "integer_layers": self.integer_layers, "compilable": self.compilable, "verdict": self.verdict, "error": self.error,
            "float_tail": list(self.float_tail),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """The description of the model for people: quantized tensors are counted by kind, `to_dict` lists them all."""
        for key, value in self.model.items():
            if key == "quantized":
                yield f"{key}: {len(value)} places (--json lists them)"
                yield from _counted(value)
            elif isinstance(value, dict):
                yield f"{key}:"
                yield from (f"  {k}: {v}" for k, v in value.items())
            elif isinstance(value, list):
                yield f"{key}: {len(value)}"
                yield from ("  " + ", ".join(f"{k} {v}" for k, v in item.items()) for item in value)
            else:
                yield f"{key}: {value}"


def operators() -> dict[str, list[str]]:
    """The operators that the importer knows, by domain, and those that it knows on constants only."""
    from hawq_tvm.frontend import onnx, torch

    return {**onnx.known_operators(), "PyTorch": torch.known_operators()}


def _counted(entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    symmetry = {True: "symmetric", False: "asymmetric", None: "zero point computed at run time"}
    kinds = Counter(
        (q["op"], q["role"], q["type"], q["granularity"].split(" (")[0], symmetry[q["symmetric"]]) for q in entries
    )
    for (op, role, kind, granularity, sign), count in kinds.most_common():
        yield f"  {count} x {op} {role}: {kind} {granularity}, {sign}"


def inspect(
    model: Any, shapes: Mapping[str, Sequence[int]] | None = None, allow_float_tail: bool = False
) -> InspectReport:
    """Look at a model without compiling it.

    model: whatever `compile` takes.  allow_float_tail: as `compile` takes it.  Raises ModelError when the file itself cannot be
    read, UsageError for shapes that do not fit it.
    """
    from tvm import relax

    from hawq_tvm.core import ranges, stages
    from hawq_tvm.frontend.formats import frontend_of
    from relay_passes.fold_batch_norm import fold_batch_norm
    from relay_passes.fold_constants import fold_constants
    from relay_passes.fold_input_clip import fold_input_clip
    from relay_passes.lower_to_integer import try_to_lower
    from relay_passes.remove_dead_code import remove_dead_code
    from relay_passes.tabulate_unary import tabulate_unary

    from .pipeline import mark_float_tail

    source = Path(model) if isinstance(model, str) else model
    frontend = frontend_of(source)
    source = frontend.load(source)
    description = frontend.describe(source)
    missing = tuple(frontend.unsupported(source, shapes))
    if missing:
        return InspectReport(description, missing, (), 0)
    try:
        module = frontend.run(source, {k: tuple(v) for k, v in (shapes or {}).items()} or None)
        module = mark_float_tail(module) if allow_float_tail else module
        for step in (fold_constants, fold_batch_norm, fold_input_clip, tabulate_unary, remove_dead_code):
            module, _ = step(module)
        lowered, floats = try_to_lower(module)
        lowered, _ = remove_dead_code(lowered)
        if not floats:
            ranges.margins(lowered)
        outside = stages.float_tail(lowered["main"])
        layers = [b for b in stages.bindings(lowered["main"]) if isinstance(b.value, relax.Call) and not stages.is_border(b)]
        count = sum(b.var.name not in outside for b in layers)
    except HawqError as e:
        return InspectReport(description, (), (), 0, str(e))
    nodes = stages.model_nodes(module["main"])
    kept = dict.fromkeys(stages.model_node(b.var.name, nodes) for b in layers if b.var.name in outside)
    return InspectReport(description, (), tuple(floats), count, float_tail=tuple(kept))
