"""Records of measured tiles: JSON files, and the pass that writes a record's tile into every layer function it is for.

A tile that was chosen by a record is an attribute of the function, so that a stored graph lowers to the same kernels
again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import tvm

from hawq_tvm.core import stages
from hawq_tvm.core.errors import InputError, ScheduleError
from hawq_tvm.targets.gpu import architectures, is_cuda

from . import workload
from .layer import Layer
from .rule import Modelled, Rule, Tile, Tiled, choose
from .rules import rules_for

FORMAT = "hawq_tvm tile records 1"
SHIPPED = Path(__file__).with_name("records")
ATTRIBUTE = "hawq.record"
Fields = dict[str, int | str | list[int]]


@dataclass(frozen=True)
class Record:
    """The fastest tile of one workload.

    tile: the fields of the rule's tile.  median_us, default_us: of this tile and of the cost model's, measured in
    turns.
    layer: one layer that has this workload, for people.  candidates: how many tiles were measured.
    machine, load, versions, date: where and when, and the load average of the machine just before.
    On a GPU the machine is its name, and threads and load are 0.
    """

    rule: str
    tile: Fields
    median_us: float
    default_us: float
    layer: str
    threads: int
    candidates: int
    machine: str
    load: float
    versions: dict[str, str]
    date: str


Records = Mapping[str, Record]


def warn(text: str) -> None:
    """Say on standard error that something was ignored."""
    print(f"hawq_tvm: warning: {text}", file=sys.stderr)


def parse(data: bytes, where: str) -> dict[str, Record] | None:
    """The records in a file's bytes; entries that are none are ignored with a warning, and so is a foreign file:
    None.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as e:  # ValueError: no JSON, no UTF-8, or a number of absurd length
        warn(f"{where} is ignored: no JSON ({str(e).splitlines()[0]})")
        return None
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), dict):
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        warn(f"{where} is ignored: its format is {found!r:.60}, not {FORMAT!r}")
        return None
    records = {}
    for key, entry in content["entries"].items():
        why = _wrong(entry)
        if why:
            warn(f"{where}: the record {key!r} is ignored: {why}")
        else:
            records[key] = Record(**entry)
    return records


def read(path: Path) -> dict[str, Record]:
    """The records of a file; what is none is ignored with a warning.

    Raises InputError when there is no such file.
    """
    try:
        return parse(path.read_bytes(), str(path)) or {}
    except OSError as e:
        raise InputError(
            "cannot be read", where=str(path), expected="a file that `hawq-tvm tune` wrote", found=e.strerror or str(e)
        ) from e


def _wrong(entry: Any) -> str | None:
    """Why an entry is no record, or None."""
    if not isinstance(entry, dict):
        return "it is no object"
    kinds = {
        "rule": str,
        "tile": dict,
        "layer": str,
        "threads": int,
        "candidates": int,
        "machine": str,
        "versions": dict,
        "date": str,
    }
    odd = sorted(set(entry) ^ {f.name for f in fields(Record) if f.default is MISSING})
    if odd:
        return f"it has other fields than a record ({', '.join(odd)})"
    odd = [name for name, kind in kinds.items() if not isinstance(entry[name], kind)]
    odd += [name for name in ("median_us", "default_us") if not _is_number(entry[name]) or entry[name] == 0]
    odd += ["load"] if not _is_number(entry["load"]) else []
    odd += ["tile"] if isinstance(entry["tile"], dict) and not all(_is_size(v) for v in entry["tile"].values()) else []
    return f"wrong values of {', '.join(odd)}" if odd else None


def _is_size(value: Any) -> bool:
    return type(value) in (int, str) or (type(value) is list and all(type(v) is int for v in value))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def dump(records: Records) -> str:
    """Records as the text of a file; equal records give equal text."""
    return (
        json.dumps({"format": FORMAT, "entries": {k: asdict(r) for k, r in records.items()}}, indent=1, sort_keys=True)
        + "\n"
    )


def shipped(target: tvm.target.Target) -> dict[str, Record]:
    """The records that come with this version for a target's CPU or GPU: records/MCPU.json or sm_90.json, if there
    is one.
    """
    name = "-".join(architectures(target)) if is_cuda(target) else target.attrs.get("mcpu", "generic")
    path = SHIPPED / f"{name}.json"
    return (parse(path.read_bytes(), str(path)) or {}) if path.is_file() else {}


def fields_of(tile: Tile) -> Fields:
    """The fields of a tile as JSON has them."""
    values = asdict(tile)  # type: ignore[call-overload]
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def tile_of(rule: Tiled, layer: Layer, target: tvm.target.Target, wanted: Mapping[str, Any]) -> Tile | None:
    """The tile of a layer with given fields, or None when the layer has no such tile."""
    tiles = rule.possible(layer, target) if isinstance(rule, Modelled) else rule.tiles(layer, target)
    return next((t for t in tiles if fields_of(t) == wanted), None)


def find(
    records: Records, possible: Iterable[str], rule: Tiled, layer: Layer, target: tvm.target.Target, told: set[str]
) -> Record | None:
    """The first record under one of the `possible` keys whose tile the layer has; others are ignored with one
    warning each.
    """
    for key in dict.fromkeys(possible):
        record = records.get(key)
        if record is None:
            continue
        if record.rule == rule.name and tile_of(rule, layer, target, record.tile) is not None:
            return record
        if key not in told:
            told.add(key)
            why = (
                f"the layer's rule is {rule.name}, not {record.rule}"
                if record.rule != rule.name
                else f"{layer.name} has no such tile: {record.tile}"
            )
            warn(f"the record {key!r} is ignored: {why}")
    return None


def check_rules(records: Records, rules: Iterable[Rule]) -> dict[str, Record]:
    """The records whose rule exists and has tiles; others are ignored with a warning."""
    known = {r.name for r in rules if isinstance(r, Tiled)}
    for key, record in records.items():
        if record.rule not in known:
            warn(f"the record {key!r} is ignored: no rule {record.rule!r} has tiles here")
    return {k: r for k, r in records.items() if r.rule in known}


def apply_records(module: tvm.IRModule, target: tvm.target.Target, records: Records) -> tuple[tvm.IRModule, int]:
    """A PACKED module whose functions carry the tiles that records have for them, and the number of these functions.

    Packages run with every core unless told: a record of several threads goes before one of a single thread.
    """
    rules = rules_for(target)
    records = check_rules(records, rules)
    if not records:
        return module, 0
    new, told, count = module.clone(), set[str](), 0
    for name, func in stages.private_functions(module).items():
        gv = module.get_global_var(name)
        layer = Layer.of(gv, func)
        rule = choose(rules, layer, target).rule
        if not isinstance(rule, Tiled):
            continue
        record = find(records, workload.keys(rule, layer, target).values(), rule, layer, target, told)
        if record is not None:
            chosen = json.dumps({"rule": record.rule, "tile": record.tile}, sort_keys=True)
            new.update_func(gv, func.with_attr(ATTRIBUTE, chosen))
            count += 1
    return new, count


def recorded_tile(rule: Rule, layer: Layer, target: tvm.target.Target) -> Tile | None:
    """The tile that `apply_records` wrote into a layer's function, or None when it wrote none.

    Raises ScheduleError when rule or tile do not fit the layer: the graph comes from another version or target.
    """
    attrs = layer.func.attrs or {}
    if ATTRIBUTE not in attrs:
        return None
    chosen = json.loads(str(attrs[ATTRIBUTE]))
    tile = (
        tile_of(rule, layer, target, chosen["tile"])
        if isinstance(rule, Tiled) and rule.name == chosen["rule"]
        else None
    )
    if tile is None:
        raise ScheduleError(
            "its recorded tile does not fit it",
            where=layer.name,
            expected=f"a tile of {rule.name}",
            found=str(attrs[ATTRIBUTE]),
            remedy="compile the model again with this version",
        )
    return tile
