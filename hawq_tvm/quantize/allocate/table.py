"""The allocation problem as a table: per layer its parameters, multiplications, sensitivities, latencies and ties; the
file of bits.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.core.json_files import clipped, number, read_json
from hawq_tvm.quantize.network.float_graph import unknown_layer

from .budgets import RESOURCES

# Bits of weights and activations, as a choice is spelled.
CHOICES = ("W8A8", "W4A8", "W4A4")
WIDTHS = (2, 8)
# Of those, what kernels store weights in, and what files have types of activations for.
WEIGHT_BITS, ACTIVATION_BITS = (2, 3, 4, 6, 8), (4, 8)
# What the ties of a block's layers begin with.
BLOCK = "block "
# Of weights and of multiplications: no layer has more, and their products with bits are exact in any arithmetic.
COUNTS = 1e15
_FIELDS = {"parameters", "macs", "sensitivity", "latency_us", "tie", "fixed"}


def widths(choice: str, where: str = "") -> tuple[int, int]:
    """The bits of weights and of activations of a choice such as "W4A8".

    Raises UsageError for another text or a width out of range.
    """
    match = re.fullmatch(r"W(\d+)A(\d+)", choice)
    if not match:
        raise UsageError(
            "is no choice of bits",
            where=where,
            found=clipped(choice),
            expected=f"W and A with bits, such as {', '.join(CHOICES)}",
        )
    weight, activation = int(match[1]), int(match[2])
    for bits in (weight, activation):
        checked_width(bits, where or choice)
    return weight, activation


def checked_choices(texts: Sequence[str]) -> tuple[str, ...]:
    """Choices that files and kernels have types for, the widest first.

    Raises UsageError for another text, a width that there are no kernels for, or a choice that stands twice.
    """
    for text in texts:
        check_kernels(widths(text, "--choices"), "--choices")
    if len(set(texts)) < len(texts):
        raise UsageError(
            "names a choice twice", where="--choices", expected="each of them once", found=", ".join(texts)
        )
    if CHOICES[0] not in texts:
        raise UsageError(
            "lacks the choice that the first and last layers keep and that budgets are parts of",
            where="--choices",
            expected=f"{CHOICES[0]} among them",
            found=", ".join(texts),
        )
    return tuple(sorted(texts, key=lambda c: (-math.prod(widths(c)), c)))


def check_kernels(pair: tuple[int, int], where: str) -> None:
    """Raise UsageError for bits of weights and of activations that there are no kernels for."""
    if pair[0] not in WEIGHT_BITS or pair[1] not in ACTIVATION_BITS:
        raise UsageError(
            "is a bit width out of range",
            where=where,
            expected="weights of 2, 3, 4, 6 or 8 bits and activations of 4 or 8, which there are kernels for",
            found=f"W{pair[0]}A{pair[1]}",
        )


def checked_width(bits: Any, where: str) -> int:
    """A number of bits.

    Raises UsageError when it is none, or out of range.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not WIDTHS[0] <= bits <= WIDTHS[1]:
        raise UsageError(
            "is a bit width out of range",
            where=where,
            expected=f"an integer from {WIDTHS[0]} to {WIDTHS[1]}",
            found=clipped(bits),
        )
    return bits


@dataclass(frozen=True)
class Row:
    """One layer.

    parameters: its weights.  macs: multiplications for one image.  sensitivity: by choice, any unit, the same for
    all layers.
    latency_us: by choice.  tie: layers with the same text get the same choice.  fixed: its only choice.  facts: what
    a report shows beside.
    """

    name: str
    parameters: int
    macs: int
    sensitivity: Mapping[str, float]
    latency_us: Mapping[str, float] = field(default_factory=dict)
    tie: str = ""
    fixed: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def cost(self, resource: str, choice: str) -> Fraction:
        """What a choice takes of a resource, in its unit, exactly.

        Raises UsageError when the table has no latency.
        """
        weight, activation = widths(choice)
        if resource == "size":
            return Fraction(self.parameters * weight)
        if resource == "bops":
            return Fraction(self.macs * weight * activation)
        if choice not in self.latency_us:
            raise UsageError(
                f"has no latency of {choice}",
                where=self.name,
                remedy="measure a table with `hawq-tvm latency`, and give it with --latency",
            )
        return Fraction(self.latency_us[choice])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as `parse_table` reads them."""
        fields: dict[str, Any] = {
            "parameters": self.parameters,
            "macs": self.macs,
            "sensitivity": dict(self.sensitivity),
        }
        optional = {"latency_us": dict(self.latency_us), "tie": self.tie, "fixed": self.fixed}
        return {**fields, **{k: v for k, v in optional.items() if v}, **self.facts}


@dataclass(frozen=True)
class Table:
    """The layers in network order, and the choices for each; the first choice is the widest.

    pairs: what two layers cost together, twice a pair, and a layer alone (its sensitivity) on the diagonal [layer and
    choice, layer and choice], in the order of rows and choices: an assignment costs the sum over all its pairs. None:
    the sum of sensitivities.
    """

    rows: tuple[Row, ...]
    choices: tuple[str, ...] = CHOICES
    pairs: np.ndarray[Any, Any] | None = field(default=None, compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields, as `parse_table` reads them."""
        return {"choices": list(self.choices), "layers": {r.name: r.to_dict() for r in self.rows}}

    def groups(self) -> list[list[Row]]:
        """The layers that get one choice together, in the order of their first."""
        found: dict[str, list[Row]] = {}
        for i, row in enumerate(self.rows):
            found.setdefault(f"tie {row.tie}" if row.tie else f"row {i}", []).append(row)
        return list(found.values())

    def allowed(self, group: Sequence[Row]) -> tuple[str, ...]:
        """The choices of a group: one when a layer of it is fixed.

        Raises UsageError when two of its layers are fixed differently.
        """
        fixed = {r.fixed: r.name for r in group if r.fixed}
        if len(fixed) > 1:
            (one, first), (other, second) = sorted(fixed.items())[:2]
            raise UsageError(
                f"{first} is fixed to {one} and {second}, which is tied to it, to {other}",
                where=first,
                remedy="fix them alike, or take the tie away",
            )
        return tuple(fixed) or self.choices

    def resources(self) -> list[str]:
        """The resources that there are numbers of."""
        return [
            r for r in RESOURCES if r != "latency" or all(set(self.choices) <= set(row.latency_us) for row in self.rows)
        ]

    def total(self, resource: str, assignment: Mapping[str, str]) -> Fraction:
        """What an assignment (choice by layer) takes of a resource."""
        return sum((r.cost(resource, assignment[r.name]) for r in self.rows), Fraction(0))

    def sensitivity(self, assignment: Mapping[str, str]) -> float:
        """What an allocation minimizes: the sum of all layers' shares."""
        return math.fsum(self.shares(assignment).values())

    def shares(self, assignment: Mapping[str, str]) -> dict[str, float]:
        """What every layer has of that: its sensitivity, and half of what every pair with another costs besides."""
        if self.pairs is None:
            return {r.name: r.sensitivity[assignment[r.name]] for r in self.rows}
        taken = [i * len(self.choices) + self.choices.index(assignment[r.name]) for i, r in enumerate(self.rows)]
        sums = self.pairs[np.ix_(taken, taken)].sum(1)
        return dict(zip((r.name for r in self.rows), map(float, sums), strict=True))

    def with_fixed(self, fixed: Mapping[str, str]) -> Table:
        """The table with some layers fixed.

        Raises UsageError for an unknown layer or a choice that the table does not have.
        """
        known = [r.name for r in self.rows]
        for name, choice in fixed.items():
            if name not in known:
                raise unknown_layer(name, known, "--fix")
            widths(choice, f"--fix {name}")
            if choice not in self.choices:
                raise UsageError(
                    "is no choice of this table", where=f"--fix {name}", expected=", ".join(self.choices), found=choice
                )
        return replace(self, rows=tuple(replace(r, fixed=fixed.get(r.name, r.fixed)) for r in self.rows))

    def with_latencies(self, other: Mapping[str, Mapping[str, float]]) -> Table:
        """The table with latencies in microseconds by layer and choice.

        Raises InputError when a layer or a choice lacks.
        """
        for row in self.rows:
            lacking = [c for c in self.choices if c not in other.get(row.name, {})]
            if lacking:
                raise InputError(
                    f"lacks the latency of {row.name} in {', '.join(lacking)}",
                    where="the table of latencies",
                    remedy="measure it for this model with `hawq-tvm latency`, and the same --choices",
                )
        return replace(self, rows=tuple(replace(r, latency_us=dict(other[r.name])) for r in self.rows))


def parse_table(fields: Any, where: str) -> Table:
    """A table from JSON: {"choices": ["W8A8", ...], "layers": {name: {"parameters", "macs", "sensitivity": {choice:
    x}, ...}}}.

    Optional per layer: "latency_us" {choice: x}, "tie", "fixed"; other fields are kept for the report.
    Raises InputError naming the layer and the field that is wrong, UsageError for a choice that is none.
    """
    layers = fields.get("layers") if isinstance(fields, dict) else None
    if not isinstance(layers, dict) or not layers:
        raise InputError(
            "is no table of layers",
            where=where,
            expected='{"layers": {name: {"parameters": 1, "macs": 1, "sensitivity": {"W8A8": 0.1}}}}',
        )
    choices = fields.get("choices", list(CHOICES))
    if not isinstance(choices, list) or not choices or len(set(map(str, choices))) != len(choices):
        raise InputError(
            "has choices that are no list", where=where, found=clipped(choices), expected=f"such as {list(CHOICES)}"
        )
    ordered = tuple(sorted(map(str, choices), key=lambda c: -(widths(c, where)[0] * widths(c, where)[1])))
    return Table(tuple(_row(name, entry, ordered, f"{where}: {name}") for name, entry in layers.items()), ordered)


def _row(name: str, entry: Any, choices: Sequence[str], where: str) -> Row:
    if not isinstance(entry, dict):
        raise InputError(
            "is no layer",
            where=where,
            expected="a dictionary with parameters, macs and sensitivity",
            found=type(entry).__name__,
        )
    counts = []
    for key in ("parameters", "macs"):
        value = number(entry.get(key))
        if value is None or not 0 <= value < COUNTS or value != int(value):
            raise InputError(
                f"has {key} that are no count",
                where=where,
                expected=f"a whole number from 0 to {COUNTS:g}",
                found=clipped(entry.get(key)),
            )
        counts.append(int(entry[key]))
    sensitivity = _numbers(entry.get("sensitivity"), choices, f"{where}: sensitivity")
    latency = _numbers(entry["latency_us"], choices, f"{where}: latency_us") if "latency_us" in entry else {}
    fixed, tie = entry.get("fixed", ""), entry.get("tie", "")
    if fixed and (not isinstance(fixed, str) or fixed not in choices):
        raise InputError(
            "is fixed to what is no choice", where=where, expected=", ".join(choices), found=clipped(fixed)
        )
    if not isinstance(tie, str):
        raise InputError("has a tie that is no text", where=where, found=clipped(tie))
    return Row(
        name,
        counts[0],
        counts[1],
        sensitivity,
        latency,
        tie,
        fixed,
        {k: v for k, v in entry.items() if k not in _FIELDS},
    )


def _numbers(values: Any, choices: Sequence[str], where: str) -> dict[str, float]:
    if not isinstance(values, dict) or set(choices) - set(values):
        found = sorted(values) if isinstance(values, dict) else values
        raise InputError(
            "lacks a choice", where=where, expected=f"a number for each of {', '.join(choices)}", found=clipped(found)
        )
    for choice in choices:
        value = number(values[choice])
        if value is None or value < 0:
            raise InputError(
                f"has a value of {choice} that is no number",
                where=where,
                expected="a finite number, not negative",
                found=clipped(values[choice]),
            )
    return {c: float(values[c]) for c in choices}


def read_bits(path: str | Path, layers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """The bits of weights and activations by layer from bits.json; layers: those that the model has, each of which
    must be there.

    Raises InputError when it is no such file or lacks a layer, UsageError for an unknown layer or a width out of range.
    """
    what = '{"layers": {name: {"weight": 4, "activation": 8}}}'
    fields = read_json(path, what)
    entries = fields.get("layers") if isinstance(fields, dict) else None
    if not isinstance(entries, dict):
        raise InputError("has no bits of layers", where=str(path), expected=what)
    found = {}
    for name, entry in entries.items():
        if name not in layers:
            raise unknown_layer(name, layers, str(path))
        if not isinstance(entry, dict) or not {"weight", "activation"} <= set(entry):
            raise InputError("lacks the bits of a layer", where=f"{path}: {name}", expected=what, found=clipped(entry))
        found[name] = (
            checked_width(entry["weight"], f"{path}: {name}: weight"),
            checked_width(entry["activation"], f"{path}: {name}: activation"),
        )
    lacking = [name for name in layers if name not in found]
    if lacking:
        raise InputError(
            f"lacks {len(lacking)} layers of the model",
            where=str(path),
            found=f"nothing about {lacking[0]}",
            remedy="allocate again for this model",
        )
    return found
