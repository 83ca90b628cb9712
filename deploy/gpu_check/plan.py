"""What is checked and timed, in order of importance, within a budget of seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from deploy.machine.refusal import FAILURES, sentence

NETS, PRECISIONS = ("resnet50", "resnet18", "mobilenetv2", "inceptionv3"), ("w8a8", "w4a8", "w4a4")
DETAILED = (1, 8, 128)  # batches of which every layer is timed

OF_TORCH = ("limits", "peer", "products")  # kinds of steps that need PyTorch


@dataclass(frozen=True)
class Step:
    """One thing to do: where its result goes in the JSON, and about how many seconds it takes.

    kind: "verify", "time", "layers", "peer", "products" or "limits".  key: an entry's name, a peer's
    NET-bBATCH/PEER, or the kind.
    """

    kind: str
    key: str
    seconds: float

    @property
    def name(self) -> str:
        """How the report calls it."""
        return f"{self.kind} {self.key}" if self.key != self.kind else self.kind


def steps(entries: Sequence[dict[str, Any]], peers: Sequence[str], timed: bool) -> list[Step]:
    """The steps for a bundle's entries, most important first: exactness at batch 1 and odd shapes, ResNet-50 beside
    PyTorch, the rest.

    peers: the names of PyTorch's forms.  timed: whether there is a GPU to time on.
    """
    checked = [e for e in entries if e["verifiable"]]
    first = [e for e in checked if not e["net"] or e["batch"] <= 3]
    made = [Step("verify", e["name"], _cost(e, 3)) for e in first]
    if not timed:
        return made + [Step("verify", e["name"], _cost(e, 3)) for e in checked if e not in first]
    networks = sorted((e for e in entries if e["net"] and e["batch"] != 3), key=_rank)
    made.append(Step("limits", "limits", 5))
    for group in _groups(networks):
        made += [Step("time", e["name"], _cost(e, 5)) for e in group]
        made += [Step("layers", e["name"], _cost(e, 4)) for e in group if e["batch"] in DETAILED]
        if group[0]["precision"] == PRECISIONS[0]:
            made += [
                Step("peer", f"{e['net']}-b{e['batch']}/{p}", 45 if p.startswith("compile") else 6)
                for p in reversed(peers)
                for e in group
            ]
            made += [Step("products", e["name"], 6) for e in group]
        made += [Step("verify", e["name"], _cost(e, 3)) for e in group if e in checked and e not in first]
    return made


def _rank(entry: dict[str, Any]) -> tuple[int, int, int]:
    """ResNet-50 in every precision, then the others in W8A8, then their other precisions."""
    net, precision = _place(NETS, entry["net"]), _place(PRECISIONS, entry["precision"])
    return (precision if net == 0 else 3 + net + 4 * precision, entry["size"], entry["batch"])


def _place(known: Sequence[str], name: str) -> int:
    return known.index(name) if name in known else len(known)


def _groups(entries: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for e in entries:
        found.setdefault((e["net"], e["precision"], e["size"]), []).append(e)
    return list(found.values())


def _cost(entry: dict[str, Any], seconds: float) -> float:
    return seconds + 0.1 * float(entry["batch"])


class Run:
    """Does steps while the budget lasts; `report` gets every result as it comes.

    seconds: the budget.  keep: called after every step, so that an interruption loses nothing.
    """

    def __init__(
        self,
        report: dict[str, Any],
        seconds: float,
        keep: Callable[[], None],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.report, self.seconds, self.keep, self.say, self.clock = report, seconds, keep, say, clock
        self.start = clock()

    def go(self, wanted: Sequence[Step], do: Callable[[Step], Any]) -> None:
        """Do the steps that have no result yet; what does not fit any more is named in report["left_out"]."""
        self.report["left_out"], self.report["failed"] = [], {}
        for step in wanted:
            place = self.report.setdefault(step.kind, {})
            if step.key in place:
                continue
            if self.clock() - self.start + step.seconds > self.seconds:
                self.report["left_out"].append(step.name)
                continue
            began = self.clock()
            try:
                place[step.key] = do(step)
            except FAILURES as e:
                self.report["failed"][step.name] = sentence(e)
                self.say(f"{step.name}: FAILED: {sentence(e)}")
            else:
                self.say(f"{step.name}: {summary(step, place[step.key])} ({self.clock() - began:.1f} s)")
            self.report["seconds"] = round(self.report.get("seconds_before", 0) + self.clock() - self.start, 1)
            self.keep()


def summary(step: Step, result: Any) -> str:
    """A result in a few words."""
    if step.kind == "verify":
        return (
            f"exact, {result['layers']} layers, {result['elements']} elements"
            if result["ok"]
            else f"NOT EXACT: {result['first_difference']}"
        )
    if step.kind in ("time", "peer"):
        graph = (
            f"{result['graph']['median_ms']:.4f} ms as a graph"
            if result.get("graph")
            else f"no graph ({result.get('graph_error')})"
        )
        return f"{graph}, {result['launched']['median_ms']:.4f} ms launched"
    if step.kind == "layers":
        return f"{len(result)} kernels, {sum(r['us'] for r in result):.1f} us"
    if step.kind == "limits":
        return f"int8 {result['int8_tops']} TOPS, memory {result['memory_gb_per_s']} GB/s"
    return f"{len(result)} shapes"
