"""What is in a model, and what would become of it: formats, bit widths, and every operator that cannot be integer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import HawqError


@dataclass(frozen=True)
class InspectReport:
    """The findings; `compilable` says whether `compile` would accept the model, `integer_layers` how many layers become integer."""

    model: dict[str, Any]
    unsupported: tuple[dict[str, str], ...]
    float_layers: tuple[dict[str, str], ...]
    integer_layers: int
    error: str = ""

    @property
    def compilable(self) -> bool:
        """Whether every operator is supported and becomes integer."""
        return not (self.unsupported or self.float_layers or self.error)

    @property
    def verdict(self) -> str:
        """One line."""
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
        }  # fmt: skip


def operators() -> dict[str, list[str]]:
    """The operators that the importer knows, by domain, and those that it knows on constants only."""
    from .frontend.onnx import known_operators

    return known_operators()


def inspect(model: Any, shapes: Mapping[str, Sequence[int]] | None = None) -> InspectReport:
    """Look at a model without compiling it.

    model: a path, bytes or ModelProto.  Raises ModelError when the file itself cannot be read, UsageError for shapes that do not fit it.
    """
    from relay_passes.fold_batch_norm import fold_batch_norm
    from relay_passes.fold_constants import fold_constants
    from relay_passes.lower_to_integer import try_to_lower
    from relay_passes.remove_dead_code import remove_dead_code
    from relay_passes.tabulate_unary import tabulate_unary

    from . import stages
    from .frontend.onnx import describe_onnx, import_onnx, unsupported

    source = Path(model) if isinstance(model, str) else model
    description = describe_onnx(source)
    missing = tuple(unsupported(source, shapes))
    if missing:
        return InspectReport(description, missing, (), 0)
    try:
        module = import_onnx(source, {k: tuple(v) for k, v in (shapes or {}).items()} or None)
        for step in (fold_constants, fold_batch_norm, tabulate_unary, remove_dead_code):
            module, _ = step(module)
        lowered, floats = try_to_lower(module)
        lowered, _ = remove_dead_code(lowered)
        count = sum(not stages.is_border(b) for b in stages.bindings(lowered["main"]))
    except HawqError as e:
        return InspectReport(description, (), (), 0, str(e))
    return InspectReport(description, (), tuple(floats), count)
