"""The allocation: against brute force over every assignment, against HAWQ-V3's published answers, its fronts, and
what it says when nothing fits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hawq_tvm.core.errors import InputError, UsageError
from hawq_tvm.quantize.allocate.allocation import InfeasibleError, allocate
from hawq_tvm.quantize.allocate.budgets import RESOURCES, Budget, readable
from hawq_tvm.quantize.allocate.pareto import draw, front
from hawq_tvm.quantize.allocate.table import CHOICES, Row, Table, parse_table, read_bits

from .published import RESNET18, RESNET18_IN_4_BITS, RESNET50, RESNET50_IN_4_BITS, table


def assignments(problem: Table) -> Iterator[dict[str, str]]:
    """Every assignment that keeps ties and fixed layers."""
    groups = problem.groups()
    for picked in itertools.product(*(problem.allowed(g) for g in groups)):
        yield {row.name: choice for group, choice in zip(groups, picked, strict=True) for row in group}


@st.composite
def tables(draw_: Any) -> Table:
    """Up to six layers; sensitivities are integers, so that sums are exact; ties, fixed layers, latencies of any
    order.
    """
    choices = draw_(st.sampled_from([CHOICES, ("W8A8", "W4A4")]))
    numbers = st.integers(0, 1000)
    rows = []
    for i in range(draw_(st.integers(1, 6))):
        sensitivity = {c: float(draw_(numbers)) for c in choices}
        latency = {c: draw_(numbers) / 8 for c in choices}
        tie = draw_(st.sampled_from(["", "", "a", "b"]))
        rows.append(
            Row(
                f"x{i}",
                draw_(st.integers(1, 10**6)),
                draw_(st.integers(0, 10**9)),
                sensitivity,
                latency,
                tie,
                draw_(st.sampled_from(["", "", "", "W8A8"])),
            )
        )
    return Table(tuple(rows), choices)


@st.composite
def budgets(draw_: Any) -> list[Budget]:
    made = []
    for resource in draw_(st.lists(st.sampled_from(list(RESOURCES)), unique=True, max_size=3)):
        kind = draw_(st.sampled_from(["fraction", "share"]))
        value = Fraction(draw_(st.integers(0, 100)), 100)
        made.append(Budget(resource, kind, value, f"{resource}={float(value)}"))
    return made


def limits_of(problem: Table, given_: Sequence[Budget]) -> list[tuple[str, Fraction]]:
    """The limits by their definition, over all assignments."""
    every, found = list(assignments(problem)), []
    for b in given_:
        widest = {r.name: problem.allowed(g)[0] for g in problem.groups() for r in g}
        least, most = min(problem.total(b.resource, a) for a in every), problem.total(b.resource, widest)
        share = sum(r.cost(b.resource, problem.choices[0]) for r in problem.rows)
        found.append(
            (b.resource, b.value * share if b.kind == "share" else least + b.value * max(most - least, Fraction(0)))
        )
    return found


@settings(max_examples=150, deadline=None)
@given(tables(), budgets())
def test_equals_brute_force(problem: Table, chosen: list[Budget]) -> None:
    limits = limits_of(problem, chosen)
    feasible = [a for a in assignments(problem) if all(problem.total(r, a) <= limit for r, limit in limits)]
    if not feasible:
        with pytest.raises(InfeasibleError, match="no assignment meets"):
            allocate(problem, chosen)
        return
    found = allocate(problem, chosen)
    assert found.assignment in feasible
    assert found.sensitivity == min(problem.sensitivity(a) for a in feasible)
    assert [one.limit for one in found.limits] == [limit for _, limit in limits]


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from(list(RESOURCES)))
def test_front_equals_brute_force(problem: Table, resource: str) -> None:
    found = front(problem, resource)
    points = sorted({(float(problem.total(resource, a)), problem.sensitivity(a)) for a in assignments(problem)})
    best, expected = float("inf"), []
    for cost, value in points:
        if value < best:
            best = value
            expected.append((cost, value))
    assert list(zip(found.costs, found.sensitivities, strict=True)) == expected
    for cost, value, row in zip(found.costs, found.sensitivities, found.choices, strict=True):
        assignment = {r.name: problem.choices[c] for r, c in zip(problem.rows, row, strict=True)}
        assert (float(problem.total(resource, assignment)), problem.sensitivity(assignment)) == (
            cost,
            value,
        ) and assignment in list(assignments(problem))


@pytest.mark.parametrize("budget", RESNET18_IN_4_BITS)
def test_published_resnet18(budget: str) -> None:
    found = allocate(table(RESNET18), [Budget.parse(budget)])
    assert {i for i, c in enumerate(found.assignment.values(), 1) if c == "W4A4"} == RESNET18_IN_4_BITS[budget]


@pytest.mark.parametrize("budget", RESNET50_IN_4_BITS)
def test_published_resnet50(budget: str) -> None:
    problem = table(RESNET50)
    found = allocate(problem, [Budget.parse(budget)])
    four = {i for i, c in enumerate(found.assignment.values(), 1) if c == "W4A4"}
    published = RESNET50_IN_4_BITS[budget]
    if budget == "size=0.25":
        # bit_config.py has layer 40 in 4 bits too, which its own numbers do not call for: the budget is met without.
        assert four == published - {40} and found.totals["size"] <= found.limits[0].limit
    else:
        assert four == published
    assert found.solver["seconds"] < 1


@pytest.mark.parametrize("resource", RESOURCES)
def test_the_front_holds_what_the_programme_finds(resource: str) -> None:
    problem = table(RESNET50)
    points = front(problem, resource)
    for percent in (10, 35, 50, 80):
        found = allocate(problem, [Budget.parse(f"{resource}={percent / 100}")])
        inside = points.costs <= float(found.limits[0].limit)
        # Sums of floats in another order.
        assert points.sensitivities[inside].min() == pytest.approx(found.sensitivity, rel=1e-9)


def test_several_budgets_hold_at_once() -> None:
    problem = table(RESNET50)
    found = allocate(problem, [Budget.parse(b) for b in ("size=0.5", "bops=0.6", "latency=0.7")])
    assert all(found.totals[one.budget.resource] <= one.limit for one in found.limits)
    assert found.assignment["x1"] == found.assignment["x4"] and found.solver["seconds"] < 1


def test_budgets_are_read() -> None:
    assert (
        Budget.parse("size=6.5MB").value == 52_000_000
        and Budget.parse("size=6500kB") == Budget("size", "absolute", Fraction(52_000_000), "size=6500kB")
        and Budget.parse("bops=72 G").value == 72 * 10**9
        and Budget.parse("latency=2.5ms").value == 2500
    )
    assert (
        Budget.parse("size=60%") == Budget("size", "share", Fraction(3, 5), "size=60%")
        and Budget.parse("bops=.5").kind == "fraction"
    )
    for text in ("speed=1", "size", "size=-1", "size=x", "bops=3MB", "size=2", "latency=1e3", "size=nan"):
        with pytest.raises(UsageError, match=r"--budget "):
            Budget.parse(text)
    assert [readable("size", 8 * n) for n in (432, 500_000, 2304)] == ["432 B", "500 KB", "2.304 KB"]
    for resource, amount in (("size", 123_456_789), ("bops", 7 * 10**10), ("latency", 12.25), ("latency", 0.001)):
        again = Budget.parse(f"{resource}={readable(resource, amount, up=True)}").value
        assert amount <= again <= Fraction(amount) * Fraction(1001, 1000) + Fraction(8, 1000)


def test_infeasible_budgets_are_explained() -> None:
    rows = [
        Row("small", 100, 1000, {"W8A8": 0, "W4A8": 1, "W4A4": 2}, {"W8A8": 5, "W4A8": 9, "W4A4": 10}),
        Row("ends", 900, 10, {c: 0 for c in CHOICES}, {c: 1 for c in CHOICES}, fixed="W8A8"),
    ]
    problem = Table(tuple(rows))
    with pytest.raises(
        InfeasibleError,
        match=(
            r"size=90%: no assignment meets this budget; .*at most 900 B; found 950 B at least, by ends W8A8"
            r" \(fixed\) 95%, small W4A8 5%; remedy: raise it to 950 B"
        ),
    ):
        allocate(problem, [Budget.parse("size=90%")])
    allocate(problem, [Budget.parse("size=950B")])
    # 4 bits are slower here: each budget can be met, both cannot.
    with pytest.raises(
        InfeasibleError,
        match=(
            r"latency=6us: no assignment meets this budget together with size=96%; .*found 10 us at least under"
            r" size=96%, by small W4A8 90%"
        ),
    ):
        allocate(problem, [Budget.parse("size=96%"), Budget.parse("latency=6us")])
    with pytest.raises(UsageError, match="two budgets of size"):
        allocate(problem, [Budget.parse("size=0.5"), Budget.parse("size=1MB")])
    with pytest.raises(UsageError, match="has no latency of W8A8"):
        allocate(Table((Row("x", 1, 1, {c: 0 for c in CHOICES}),)), [Budget.parse("latency=0.5")])
    tied = Table(
        (
            Row("a", 1, 1, {c: 0 for c in CHOICES}, tie="t", fixed="W8A8"),
            Row("b", 1, 1, {c: 0 for c in CHOICES}, tie="t", fixed="W4A4"),
        )
    )
    with pytest.raises(UsageError, match="b is fixed to W4A4 and a, which is tied to it, to W8A8"):
        allocate(tied, [])


ENTRY = {"parameters": 10, "macs": 20, "sensitivity": {"W8A8": 0, "W4A4": 1.5}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": -1}, "parameters that are no count"),
        ({"macs": 1.5}, "macs that are no count"),
        ({"sensitivity": {"W8A8": 0}}, "lacks a choice"),
        ({"sensitivity": {"W8A8": 0, "W4A4": float("nan")}}, "no number"),
        ({"latency_us": {"W8A8": 1}}, "lacks a choice"),
        ({"fixed": "W2A2"}, "no choice"),
        ({"tie": 3}, "tie that is no text"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_tables(change: dict[str, Any], message: str) -> None:
    good = {"choices": ["W4A4", "W8A8"], "layers": {"x": ENTRY}}
    parsed = parse_table(good, "t.json")
    assert parsed.choices == ("W8A8", "W4A4") and parse_table(parsed.to_dict(), "again") == parsed
    with pytest.raises(InputError, match=f"t.json: x.*{message}"):
        parse_table({**good, "layers": {"x": {**ENTRY, **change}}}, "t.json")
    for bad in ([], {"layers": {}}, {"layers": {"x": 3}}):
        with pytest.raises(InputError):
            parse_table(bad, "t.json")
    for choices in (["W9A8"], ["W1A4"], ["int8"]):
        with pytest.raises(UsageError, match=r"out of range|no choice"):
            parse_table({**good, "choices": choices}, "t.json")
    with pytest.raises(UsageError, match="no weighted layer 'y'"):
        parsed.with_fixed({"y": "W8A8"})


def test_files_of_bits(tmp_path: Path) -> None:
    path = tmp_path / "bits.json"
    path.write_text('{"layers": {"a": {"weight": 4, "activation": 8}, "b": {"weight": 8, "activation": 8}}}')
    assert read_bits(path, ["a", "b"]) == {"a": (4, 8), "b": (8, 8)}
    for layers, text, message in [
        (["a"], None, "no weighted layer 'b'"),
        (["a", "b", "c"], None, "lacks 1 layers"),
        (["a"], '{"layers": {"a": {"weight": 9, "activation": 8}}}', "out of range.*2 to 8; found 9"),
        (["a"], '{"layers": {"a": {"weight": true, "activation": 8}}}', "out of range"),
        (["a"], '{"layers": {"a": {"weight": 4}}}', "lacks the bits"),
        (["a"], "[1]", "no bits of layers"),
        (["a"], "{", "is no JSON"),
    ]:
        if text is not None:
            path.write_text(text)
        with pytest.raises((InputError, UsageError), match=message):
            read_bits(path, layers)
    with pytest.raises(InputError, match="cannot be read"):
        read_bits(tmp_path / "none.json", ["a"])


def test_pictures(tmp_path: Path) -> None:
    problem = table(RESNET18)
    fronts = [front(problem, r) for r in RESOURCES]
    marks = {c: {r.name: c for r in problem.rows} for c in problem.choices}
    svg, again, png = (
        draw(fronts, tmp_path / "a.svg", marks),
        draw(fronts, tmp_path / "a.svg", marks),
        draw(fronts, tmp_path / "a.png", marks),
    )
    assert svg == again and b"<svg" in svg and b"weights, MB" in svg and png.startswith(b"\x89PNG")
    with pytest.raises(UsageError, match="PNG or SVG"):
        draw(fronts, tmp_path / "a.pdf", marks)
