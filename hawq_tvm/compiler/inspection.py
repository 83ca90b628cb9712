"""What is in a model, and what would become of it: formats, bit widths, and every operator that cannot be integer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hawq_tvm.core.collection import uncollected
from hawq_tvm.core.cut import Cut, of_main
from hawq_tvm.core.errors import HawqError, ModelError, UsageError
from hawq_tvm.core.trust import trusting

if TYPE_CHECKING:
    from hawq_tvm.frontend.formats import Frontend


@dataclass(frozen=True)
class InspectReport:
    """The findings; `compilable` says whether `compile` would accept the model.

    unsupported, float_layers: everything that keeps it from being imported, and then from being integer.
    integer_layers: how many kernels it would have.  error: the sentence with which `compile` refuses it; sentence: the
    same without the count of other problems, which are all here.
    float_tail: the layers that stay float, where that is allowed.  cut: where the float end is cut off, where it is.
    hints: sentences on scales that spoil the model.
    """

    model: dict[str, Any]
    unsupported: tuple[dict[str, str], ...]
    float_layers: tuple[dict[str, str], ...]
    integer_layers: int
    error: str = ""
    float_tail: tuple[str, ...] = ()
    cut: Cut | None = None
    hints: tuple[str, ...] = ()
    sentence: str = ""

    @property
    def compilable(self) -> bool:
        """Whether every operator is supported and becomes integer, or stays float where that is allowed."""
        return not self.error

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.compilable:
            return f"cannot be compiled: {self.sentence}"
        if not self.float_tail and not self.cut:
            return f"compiles to integers alone ({self._layers})"
        cut = ", up to where the float end is cut off" if self.cut else ""
        kept = f", with FLOAT outside the integer region: {', '.join(self.float_tail)}" if self.float_tail else ""
        return f"compiles to integers ({self._layers}){cut}{kept}"

    @property
    def _layers(self) -> str:
        return f"{self.integer_layers} integer layer{'s' if self.integer_layers != 1 else ''}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return {
            "model": self.model,
            "unsupported": list(self.unsupported),
            "float_layers": list(self.float_layers),
            "integer_layers": self.integer_layers,
            "compilable": self.compilable,
            "verdict": self.verdict,
            "error": self.error,
            "float_tail": list(self.float_tail),
            "cut": self.cut.fields() if self.cut else None,
            "hints": list(self.hints),
        }

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
    model: Any,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_float_tail: bool = False,
    target: str = "host",
    trust: bool = False,
    nonlinear: str | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> InspectReport:
    """Look at a model: it goes through the compiler as far as `compile` could refuse it, to the kernels' rules.

    model, shapes, allow_float_tail, target, trust, nonlinear, ranges: as `compile` takes them.  Raises ModelError when
    the file itself cannot be read, UsageError for shapes and ranges that do not fit it.
    """
    from hawq_tvm.frontend.formats import frontend_of
    from hawq_tvm.targets import target as targets

    parsed = targets.parse(target)
    frontend = frontend_of(model)
    with trusting(trust), uncollected():
        source = frontend.load(model)
        return _inspected(frontend, source, shapes, allow_float_tail, parsed, nonlinear, ranges)


def _inspected(
    frontend: Frontend,
    source: Any,
    shapes: Mapping[str, Sequence[int]] | None,
    allow_float_tail: bool,
    parsed: Any,
    nonlinear: str | None,
    ranges: Mapping[str, tuple[float, float]] | None,
) -> InspectReport:
    import schedules
    from hawq_tvm.core import stages

    from . import pipeline
    from .hints import hints

    fixed = {k: tuple(int(d) for d in v) for k, v in (shapes or {}).items()}
    missing: tuple[dict[str, str], ...] = ()
    floats: tuple[dict[str, str], ...] = ()
    said: tuple[str, ...] = ()
    try:
        try:
            annotated = pipeline.import_by(frontend, source, fixed, allow_float_tail, nonlinear, ranges)
        except ModelError as e:
            missing = tuple(e.problems())
            raise
        said = tuple(hints(annotated))
        try:
            packed = pipeline.to_packed_unnamed(annotated, parsed)
        except ModelError as e:
            floats = tuple(e.problems())
            raise
        schedules.check_rules_of(packed, parsed)
    except UsageError:
        raise
    except HawqError as e:
        return InspectReport(_described(frontend, source), missing, floats, 0, str(e), hints=said, sentence=e.sentence)
    outside, nodes = stages.float_tail(packed["main"]), stages.model_nodes(annotated["main"])
    kept = dict.fromkeys(
        stages.model_node(b.var.name, nodes) for b in stages.bindings(packed["main"]) if b.var.name in outside
    )
    return InspectReport(
        frontend.describe(source),
        (),
        (),
        len(stages.private_functions(packed)),
        float_tail=tuple(kept),
        cut=of_main(packed["main"]),
        hints=said,
    )


def _described(frontend: Frontend, source: Any) -> dict[str, Any]:
    """The description of a model that is refused, empty where that is why."""
    try:
        return frontend.describe(source)
    except ModelError:
        return {}
