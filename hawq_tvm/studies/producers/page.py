"""The page of the table: one line per network, one column per producer, and the sentences of what is refused."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .judge import INTEGERS, NOTHING, REFUSED, TAIL
from .networks import NETWORKS, OPSETS
from .tools import PRODUCERS
from .worker import DRAWS, FAILED

MISSING, NOT_MADE = "missing", "not made"
EXPORTERS = {"script": "TorchScript", "dynamo": "torch.export"}
COMPILED = (INTEGERS, TAIL)
Row = Mapping[str, Any]


def cell(row: Row) -> str:
    """A row in a few words: kernels and the largest difference in steps, float operators, or why there are none."""
    verdict = row["verdict"]
    if verdict not in COMPILED:
        return str(verdict)
    if "layers" in row:
        floats = f" and {row['float_layers']} of float" if row["float_layers"] else ""
        return f"{row['layers']} layers{floats}, inspected"
    wrong = [] if row["verified"] else ["NOT EXACT"]
    wrong += [] if row["proved"] else ["NOT PROVED"]
    wrong += [] if row["indices"] else ["other indices"]
    kept = [" and ".join(f"{n} {name}" for name, n in sorted(row["float"].items()))] if row["float"] else []
    itself = f" (itself {row['moved']:.2g})" if row.get("moved", 0.0) >= 1 else ""
    ranged = ["--range"] if row.get("ranges") else []
    return "; ".join([f"{row['kernels']} kernels", *kept, *ranged, f"{row['apart']:.2g}{itself}", *wrong])


def markdown(numbers: Mapping[str, Any]) -> str:
    """The page."""
    rows: Mapping[str, Row] = numbers["rows"]
    notes: dict[str, int] = {}
    reading = [p for p in PRODUCERS if PRODUCERS[p].reads]
    others = [p for p in PRODUCERS if not PRODUCERS[p].reads]
    by_exporter = [(f"{n}, {EXPORTERS[e]}", f"{n}.{e}.") for n in NETWORKS for e in OPSETS]
    tables = [
        *_table(rows, by_exporter, reading, notes),
        "",
        *_table(rows, [(n, f"{n}.") for n in NETWORKS], others, notes),
    ]
    compiled = [r for r in rows.values() if r["verdict"] in COMPILED and "layers" not in r]
    waiting = sum("layers" in r for r in rows.values())
    counts = Counter(r["verdict"] for r in rows.values())
    tools = {tool.package: numbers["versions"][name] for name, tool in PRODUCERS.items()}
    versions = ", ".join(f"{package} {version or 'not installed'}" for package, version in tools.items())
    said = [
        "What the quantized files of other tools, and of our own `quantize`, become here. Made by"
        " `python -m hawq_tvm.studies.producers`: small networks of the kinds in the field, random weights, statistics"
        " of their own data; each tool called as its documentation says, on the float ONNX file of either exporter of"
        " PyTorch or on the module. Every file was compiled for the machine at hand, verified layer by layer on"
        f" {DRAWS} inputs, and proved; then run beside its producer's own float simulation (ONNX Runtime without"
        " optimizations, PyTorch, QONNX's executor).",
        "A cell has the kernels between the border's; float operators, where it needed `--allow-float-tail`; and the"
        " largest difference from the simulation, in steps of the output's scale (1/255 of its range where it has"
        " none); in brackets, from 1 on, by how much the simulation differs from itself when its inputs move by 2^-17"
        " of themselves or less: random weights magnify a rounding. `--range` stands where nothing in the file tells"
        " the range of a float input, which was declared as that of the inputs. An empty cell was not run.",
        f"{versions}.",
        *_states(rows),
        f"{counts[INTEGERS]} files compile to integers alone, {counts[TAIL]} with a float tail; {counts[REFUSED]} are"
        f" refused and {counts[FAILED]} failed; {counts[NOT_MADE]} could not be made by their tool, in"
        f" {counts[NOTHING]} the tool quantizes nothing, and {counts[MISSING]} lack their tool."
        + (f" {waiting} were only inspected, not built and run (`--inspect`)." if waiting else "")
        + f" Of {len(compiled)} that were built, not exact:"
        f" {sum(not r['verified'] for r in compiled)}. Not proved: {sum(not r['proved'] for r in compiled)}."
        f" {sum(r['differing'] for r in compiled)} of {sum(r['thresholds'] for r in compiled)} thresholds differ from"
        " the exact real formula.",
    ]
    lines = ["# Networks by producers", ""]
    for paragraph in said:
        lines += [textwrap.fill(paragraph, 118, break_on_hyphens=False), ""]
    lines += [*tables, ""]
    lines += [f"{number}. {sentence}" for sentence, number in notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def _states(rows: Mapping[str, Row]) -> list[str]:
    """Which states of this project judged the files, where that is known: all but those of the most by name."""
    counts = Counter(row["state"] for row in rows.values() if row.get("state"))
    if not counts:
        return []
    (most, _), *others = counts.most_common()
    said = [
        f"; by {state}: " + ", ".join(sorted(k for k, r in rows.items() if r.get("state") == state))
        for state, _ in others
    ]
    return [f"Judged by {most}{''.join(said)}."]


def _table(
    rows: Mapping[str, Row], lines: Sequence[tuple[str, str]], producers: Sequence[str], notes: dict[str, int]
) -> list[str]:
    """A table of Markdown; notes: the sentences so far and their numbers, which grow."""
    made = [f"| network | {' | '.join(producers)} |", "|---" * (len(producers) + 1) + "|"]
    for title, start in lines:
        found = [rows.get(start + producer) for producer in producers]
        if any(found):
            made.append(f"| {title} | {' | '.join(_noted(row, notes) if row else '' for row in found)} |")
    return made


def _noted(row: Row, notes: dict[str, int]) -> str:
    if "sentence" not in row:
        return cell(row)
    sentence = " ".join(str(row["sentence"]).split())
    if "runs" in row:
        sentence += f" ({row['runs'] or 'nobody'} runs the file)"
    return f"{cell(row)} ({notes.setdefault(sentence, len(notes) + 1)})"
