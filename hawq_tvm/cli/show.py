"""What the commands find out, as a person reads it in a terminal; measurements are shown by `bench/show.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hawq_tvm.core.printable import printable

from .terminal import OUT, Grid, Terminal

if TYPE_CHECKING:
    from rich.progress import Progress

    from hawq_tvm.compiler.inspection import InspectReport
    from hawq_tvm.package.package import Package
    from hawq_tvm.package.together import JointReport
    from hawq_tvm.quantize.network.answers import Answers
    from hawq_tvm.tuning.gpu.export import ExportReport
    from hawq_tvm.tuning.tuner import TuneReport, TuneStep
    from hawq_tvm.verify.certificate import Certificate
    from hawq_tvm.verify.compare import VerifyReport


def say(text: str) -> None:
    """Print a line as it is."""
    OUT.print(text)


def hint(answers: Answers) -> None:
    """Say what was taken for granted of a network's answers, if anything was."""
    if answers.hint:
        say(answers.hint)


def interrupted(kept: Path | None) -> KeyboardInterrupt:
    """What an interrupted measurement says: what it leaves, if it leaves anything."""
    if kept is not None and kept.exists():
        where = printable(str(kept))
        return KeyboardInterrupt(f"interrupted; what was measured before is in {where}, and the same command continues")
    return KeyboardInterrupt("interrupted before a result was kept; no file was written")


def shape_text(entry: Mapping[str, Any]) -> str:
    """An input or output of a manifest in a few words."""
    return f"{entry['name']}: {entry.get('type', '?')} {'x'.join(str(d) for d in entry['shape']) or 'scalar'}"


def array_text(fields: Mapping[str, Any]) -> str:
    """An array's summary in a few words."""
    text = f"{fields['dtype']} {'x'.join(map(str, fields['shape'])) or 'scalar'}"
    if fields["mean"] is None:
        return text
    return (
        f"{text}, {fields['min']:.6g} to {fields['max']:.6g}, mean {fields['mean']:.6g}, largest at {fields['largest']}"
    )


def show_float_tail(names: Sequence[str]) -> None:
    """Name what computes in float because the user allowed it, if anything does."""
    if names:
        say(f"FLOAT   outside the integer region, as --allow-float-tail permits: {', '.join(names)}")


def show_cut(manifest: Mapping[str, Any]) -> None:
    """Where the model's float end was cut off, if it was."""
    if manifest.get("cut"):
        from hawq_tvm.core.cut import of_fields

        say(f"CUT     behind {of_fields(manifest['cut']).text()}; in tail.onnx, which `run` gives to ONNX Runtime")


def show_operators(known: Mapping[str, Sequence[str]]) -> None:
    """The operators of every domain."""
    for where, names in known.items():
        say(f"{where} ({len(names)}): {', '.join(names)}")


def show_inspect(report: InspectReport) -> None:
    """What is in a model, its problems and the verdict."""
    for line in report.lines():
        say(line)
    problems = [*report.unsupported, *report.float_layers]
    if problems:
        table = Grid("layer", "operator", "why it cannot be integer", "remedy")
        for p in problems:
            table.add_row(*(str(p.get(k, "")) for k in ("layer", "op", "reason", "remedy")))
        OUT.print(table)
    for hint in report.hints:
        say(f"hint: {hint}")
    say(report.verdict)
    show_cut(report.to_dict())


def show_compiled(package: Package, summary: Mapping[str, Any]) -> None:
    """The interface, the rules that made the kernels, the proof and the place of a new package."""
    for side in ("input", "output"):
        for entry in summary[f"{side}s"]:
            say(f"{side:<7} {shape_text(entry)}")
    say(f"kernels {', '.join(f'{n} by {rule}' for rule, n in sorted(summary['kernels_by_rule'].items())) or 'none'}")
    tiles = summary["tiles_from"]
    say(
        f"tiles   {tiles.get('record', 0)} from records, {tiles.get('cost model', 0)} by the cost model,"
        f" {tiles.get('rule', 0)} without a choice"
    )
    show_proof(package.certificate())
    show_cut(package.manifest)
    say(f"wrote   {summary['package']} ({summary['bytes'] / 1e6:.1f} MB)")


def _within(distance: float) -> str:
    """How far an integer can be from the real formula, in steps."""
    return f"1/2 + {distance:.1f} steps" if distance >= 1 else f"1/2 + {distance:.1e} of a step"


# Two integers that are each nearer than one and a half to a number, and one of them than a half, are neighbours.
AT_MOST_ONE = ", so at most one step from it rounded"


def show_proof(c: Mapping[str, Any]) -> None:
    """A certificate's fields: the verdict, what is float outside the integer region, and the thresholds."""
    region = " between quantize and dequantize" if c["float_tail"] else ""
    verdict = f"{'integer-only' if c['ok'] else 'NOT integer-only'}{region}"
    say(
        f"proof   {verdict}: {c['kernels']} kernels ({len(c['border'])} more at the border), {c['expressions']} TIR"
        f" expressions, {c['instructions']} machine instructions, {len(c['tir_offenders']) + len(c['code_offenders'])}"
        " of them float"
    )
    if c.get("device_instructions"):
        counts = ", ".join(f"{n} for {arch}" for arch, n in sorted(c["device_instructions"].items()))
        say(f"        GPU instructions read: {counts}")
    show_float_tail(c["float_tail"])
    margin = c["least_margin"]
    if margin:
        say(
            f"        no accumulator can overflow: at least {margin['spare_bits']} bits to spare, in {margin['layer']}"
            f" ({margin['kind']}, {margin['dtype']})"
        )
    say(f"        {c['differing']} of {c['thresholds']} requantize thresholds differ from the exact real formula")
    if c.get("functions"):
        passed = [sum(row[name] for row in c["functions"].values()) for name in ("differing", "thresholds")]
        say(
            f"        {passed[0]} of {passed[1]} thresholds of {len(c['functions'])} functions of sums differ from the"
            " exact real formula"
        )
    if c.get("distances"):
        most = max(c["distances"].values())
        say(
            f"        {len(c['distances'])} layers within {_within(most)} of the real formula"
            f"{AT_MOST_ONE if most < 1 else ''}"
        )
    if c.get("outputs"):
        most = max(c["outputs"].values())
        say(f"        {len(c['outputs'])} float outputs in fixed point, within {most:.1e} of the real formula")
    if c.get("nonlinear"):
        kinds = Counter(c["nonlinear"].values()).most_common()
        say(f"        nonlinear: {'; '.join(f'{count} x {kind}' for kind, count in kinds)}")
    if c["not_enumerated"]:
        names = ", ".join(dict.fromkeys(c["not_enumerated"]))
        say(f"        thresholds not compared with the real formula, for there are too many: {names}")


def show_certificate(certificate: Certificate) -> None:
    """A proof made anew, with everything that it found."""
    show_proof(certificate.to_dict())
    roundings = ", ".join(f"{count} {kind}" for kind, count in sorted(certificate.roundings.items()))
    say(f"        border: {', '.join(certificate.border) or 'none'}; roundings: {roundings or 'none'}")
    for layer, distance in certificate.distances.items():
        say(f"        within {_within(distance)}{AT_MOST_ONE if distance < 1 else ''}: {layer}")
    for layer, distance in certificate.outputs.items():
        say(f"        within {distance:.1e} of the real formula: {layer}")
    for layer, row in certificate.functions.items():
        say(f"        {row['differing']} of {row['thresholds']} thresholds of a function of sums differ in {layer}")
    for layer, count in certificate.differing_layers.items():
        say(f"        {count} differing thresholds in {layer}")
    for offender in [*certificate.tir_offenders, *certificate.code_offenders]:
        say(f"  float: {offender}")


def show_verify(report: VerifyReport, float_tail: Sequence[str]) -> None:
    """Every compared layer, and the verdict."""
    table = Grid("layer", "elements", "different")
    for row in report.rows:
        table.add_row(row.layer, str(row.elements), str(row.different))
    OUT.print(table)
    show_float_tail(float_tail)
    say(report.summary())


def show_joint(report: JointReport) -> None:
    """A row for every layer, a column for every package that ran, and the verdict."""
    for number, v in enumerate(report.verdicts, 1):
        say(f"{number}  {v.name}: {v.target}")
    columns = [(n, v.report) for n, v in enumerate(report.verdicts, 1) if v.report is not None]
    table = Grid("layer", "elements", *(str(n) for n, _ in columns))
    for i, row in enumerate(columns[0][1].rows if columns else ()):
        table.add_row(
            row.layer,
            str(row.elements),
            *("equal" if not (d := r.rows[i].different) else f"{d} different" for _, r in columns),
        )
    if columns:
        OUT.print(table)
    for line in report.summary().split("\n"):
        say(line)


def show_info(fields: Mapping[str, Any], rules: bool = False) -> None:
    """What a package holds: the fields of `package_commands.info`; rules: and why kernels were not made by others."""
    from hawq_tvm.targets import target as targets

    target, producer = fields["target"], fields["producer"]
    what = [
        f"a {'single file' if fields['single_file'] else 'folder'} of format {fields['format']}",
        f"{fields['bytes'] / 1e6:.2f} MB",
        f"checksums {fields['checksums']}",
    ]
    what += [
        f"{'a signature, which `verify-signature` checks' if fields['signed'] else 'not signed'}",
        *([] if fields["has_graph"] else ["stripped of its integer graph"]),
    ]
    say(f"{fields['name']}: {', '.join(what)}")
    say(
        f"made by hawq-tvm {producer['hawq_tvm']}, tvm {producer['tvm']}, LLVM"
        f" {producer['llvm']}{', CUDA ' + producer['cuda'] if 'cuda' in producer else ''}; graph"
        f" {fields['graph_sha256'][:16]}"
    )
    say(f"target  {targets.text(target)}: {', '.join(target['cpu_features'])}")
    say(
        "        this machine's CPU"
        f" {'runs it' if fields['runs_on_this_cpu'] else 'does not run it: ' + fields['cannot_run']}"
    )
    version = fields.get("c_interface")
    declared = f"interface version {version}, declared in model.h"
    say(f"C       {declared if version else 'no interface: a library for GPUs runs by TVM'}")
    for side, entries in (("input", fields["inputs"]), ("output", fields["outputs"])):
        for entry in entries:
            q = entry.get("quantization")
            detail = f", scale {q['scale'][0]:g}, zero point {q['zero_point'][0]}" if q and len(q["scale"]) == 1 else ""
            detail += ", saturates at {:g} and {:g}".format(*entry["saturates"]) if "saturates" in entry else ""
            say(f"{side:<7} {shape_text(entry)}{detail}")
    say(
        f"files   {', '.join(f'{name} {size:,}' for name, size in fields['files'].items())} bytes, of them"
        f" {fields['constants_bytes']:,} constants in the library"
    )
    say(f"kernels {', '.join(f'{n} by {rule}' for rule, n in sorted(fields['kernels_by_rule'].items())) or 'none'}")
    show_proof(fields["certificate"])
    show_cut(fields)
    table = Grid("layer", "rule", "tile", "tile from")
    for row in fields["report"]:
        table.add_row(*(str(row.get(k, "")) for k in ("layer", "rule", "tile", "tile_from")))
    OUT.print(table)
    if not rules:
        return
    for (rule, why), count in Counter(
        (row["rule"], row["refused"]) for row in fields["report"] if row.get("refused")
    ).most_common():
        say(f"{count} by {rule}, because earlier rules said: {why}")


@contextmanager
def tuning(console: Terminal, quiet: bool) -> Iterator[Callable[[TuneStep], None] | None]:
    """The progress of a tuning run: a bar in a terminal, else a line per workload, or nothing."""
    if quiet:
        yield None
    elif not console.is_terminal:
        yield lambda step: console.print(f"  {step.number} of {step.of}  {_raced(step)}") if step.outcome else None
    else:
        # Twice a second: whoever draws takes time from what is measured.
        with _bar("workload", console, refresh_per_second=2) as bar:
            task = bar.add_task("importing", total=None)

            def tell(step: TuneStep) -> None:
                if step.outcome:
                    console.print(f"  {_raced(step)}")
                left = f", {step.seconds_left:.0f} s left" if step.seconds_left is not None else ""
                done = step.number if step.outcome else step.number - 1
                bar.update(task, total=step.of, completed=done, description=f"{step.candidates} tiles{left}")

            yield tell


def _bar(of_what: str, console: Terminal, **options: Any) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn(of_what), MofNCompleteColumn(), BarColumn(20), TextColumn("{task.description}"))
    return Progress(*columns, console=console, transient=True, **options)


@contextmanager
def exporting(console: Terminal, quiet: bool) -> Iterator[Callable[[int, int, str], None] | None]:
    """The progress of an export: a bar in a terminal, else nothing."""
    if quiet or not console.is_terminal:
        yield None
        return
    with _bar("kernels of workload", console) as bar:
        task = bar.add_task("importing", total=None)
        yield lambda number, of, layer: bar.update(task, total=of, completed=number - 1, description=layer)


def show_exported(report: ExportReport) -> None:
    """What was written, and what to do with it."""
    say(
        f"{report.candidates} candidates of {report.workloads} workloads for {report.arch}, {report.bytes / 1e6:.1f}"
        f" MB: {report.folder}"
    )
    say(
        "carry it to a machine with nvcc and such a GPU, run `python run.py` in it, then here: hawq-tvm tune --import"
        f" {report.folder}/times.json -o RECORDS.json"
    )


def _raced(step: TuneStep) -> str:
    """The best tile of a measured workload against the cost model's."""
    o = step.outcome
    assert o is not None
    gain = (
        f"{o.default_us:.1f} -> {o.median_us:.1f} us"
        if o.tile != o.default
        else f"{o.median_us:.1f} us, the cost model's"
    )
    return f"{step.layer}: best of {o.candidates} is {o.tile} ({gain})"


def show_tuned(report: TuneReport) -> None:
    """What was measured, what it saves, and where the records are."""
    table = Grid("layer", "layers", "cost model's tile", "us", "fastest tile", "us", "ratio")
    for o in report.outcomes:
        numbers = (
            f"{o.default_us:.1f}",
            o.tile if o.tile != o.default else "the same",
            f"{o.median_us:.1f}",
            f"{o.default_us / o.median_us:.3f}",
        )
        table.add_row(o.layers[0], str(len(o.layers)), o.default, *numbers)
    if report.outcomes:
        OUT.print(table)
        default, tuned = report.saved_us()
        say(
            f"these layers together: {default / 1e3:.3f} ms before, {tuned / 1e3:.3f} ms with the fastest tiles, on"
            f" {f'{report.threads} threads' if report.threads else 'the GPU'}"
        )
    say(
        f"{report.trials} tiles measured; {report.kept} workloads had records, {report.left} were left out for want of"
        " trials"
    )
    if report.served:
        say("over RPC: " + ", ".join(f"{server} measured {n}" for server, n in sorted(report.served.items())))
    for note in report.notes:
        say(f"note: {note}")
    if report.failed:
        say(f"{report.failed} workloads were given up; the same command tries them again")
    say(f"records {report.records}" if report.outcomes or report.kept else "no records: there was nothing to measure")
