"""A profile as an SVG picture: one horizontal bar per kernel in network order, as long as its time, coloured by its
rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

if TYPE_CHECKING:
    from hawq_tvm.measure.profile import KernelRow, ProfileReport

# Okabe and Ito's colours, which people who confuse red and green can tell apart; black and the pale yellow left out.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
GREY, INK, FAINT, LINE, STRIPE = "#8c8c8c", "#1a1a1a", "#595959", "#dddddd", "#f5f5f5"
ROW, BAR, FONT = 17, 12, 11
# The width of a letter of the monospaced font, in parts of its size; generous, as fonts differ.
LETTER = 0.61
BARS, MARGIN = 520, 16
# The lines above the legend.
HEAD = 62
LONGEST_NAME = 100
WHAT = {
    "outside kernels": "the virtual machine, its memory, a float head or tail",
    "disturbance": "what whole inferences take longer than the medians of their parts: other programs' time",
}


def draw(report: ProfileReport) -> str:
    """The picture as the text of an SVG file."""
    rest = [(name, ms) for name, ms, count in report.parts() if not count]
    names = [_short(r.layer) for r in report.rows] + [name for name, _ in rest]
    left = MARGIN + math.ceil(max(map(len, names)) * FONT * LETTER) + 8
    legend = _legend(report)
    top = MARGIN + HEAD + ROW * len(legend) + 26
    bottom = top + ROW * len(names)
    notes = [*map(_note, report.rows), *(f"{_ms(ms)} {ms / report.latency_ms:6.1%}" for _, ms in rest)]
    right = left + BARS + 12
    width, height = right + math.ceil(max(map(len, notes)) * FONT * LETTER) + MARGIN, bottom + MARGIN + 8
    longest = max([r.median_ms for r in report.rows] + [report.outside_ms])
    step = _step(longest)
    end = step * max(1, math.ceil(longest / step))
    colours = _colours(report)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace">'
        ),
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_title(report),
    ]
    for i, (rule, text) in enumerate(legend):
        y = MARGIN + HEAD + ROW * i
        parts.append(f'<rect x="{MARGIN}" y="{y}" width="{BAR}" height="{BAR}" fill="{colours[rule]}"/>')
        parts.append(_text(MARGIN + BAR + 8, y + BAR - 2, text))
    parts += [
        f'<rect x="{MARGIN}" y="{top + ROW * i - 2}" width="{width - 2 * MARGIN}" height="{ROW}" fill="{STRIPE}"/>'
        for i in range(1, len(names), 2)
    ]
    parts += _axis(left, top, bottom, end, step)
    for i, row in enumerate(report.rows):
        parts += _bar(left, top + ROW * i, names[i], BARS * row.median_ms / end, colours[row.rule], _tooltip(row))
    for i, (name, ms) in enumerate(rest, len(report.rows)):
        # Disturbance has no bar: it is no work of the network, and may be longer than any kernel.
        length = BARS * ms / end if name == "outside kernels" else 0
        parts += _bar(left, top + ROW * i, name, length, GREY, WHAT[name])
    parts += [_text(right, top + ROW * i + BAR - 1, note) for i, note in enumerate(notes)]
    return "\n".join([*parts, "</svg>", ""])


def _title(report: ProfileReport) -> list[str]:
    m = report.machine
    threads = f"{report.threads} thread{'s' * (report.threads != 1)}"
    heading = f"{report.name}: {report.latency_ms:.3f} ms per inference, {report.gop:.3g} GOP, {report.tops:.3g} TOPS"
    return [
        f"<title>{escape(_printable(heading))}</title>",
        _text(MARGIN, MARGIN + 14, heading, size=16, weight="bold"),
        _text(
            MARGIN,
            MARGIN + 32,
            f"{m['cpu']}, {threads} of {m['cores']} cores, {m['system']}, tvm {m['tvm']}",
            fill=FAINT,
        ),
        _text(MARGIN, MARGIN + 48, f"medians of {report.iterations} inferences; kernels in network order", fill=FAINT),
    ]


def _legend(report: ProfileReport) -> list[tuple[str, str]]:
    rules = [part for part in report.parts() if part[2]]
    widest = max((len(rule) for rule, _, _ in rules), default=0)
    return [
        (rule, f"{rule:<{widest}} {_ms(ms)} {ms / report.latency_ms:6.1%}  {count} kernel{'s' * (count != 1)}")
        for rule, ms, count in rules
    ]


def _colours(report: ProfileReport) -> dict[str, str]:
    """By name, so that a rule keeps its colour when times change."""
    return {rule: COLOURS[i % len(COLOURS)] for i, rule in enumerate(sorted(report.rules()))}


def _axis(left: int, top: int, bottom: int, end: float, step: float) -> Iterator[str]:
    for i in range(round(end / step) + 1):
        x = left + BARS * i * step / end
        yield f'<line x1="{x:.1f}" y1="{top - 4}" x2="{x:.1f}" y2="{bottom}" stroke="{LINE}"/>'
        yield _text(
            x, top - 8, f"{i * step:g}" + (" ms" if i == round(end / step) else ""), fill=FAINT, anchor="middle"
        )


def _bar(left: int, y: int, name: str, length: float, colour: str, tooltip: str) -> list[str]:
    return [
        "<g>",
        f"<title>{escape(_printable(tooltip))}</title>",
        _text(left - 8, y + BAR - 1, name, anchor="end"),
        f'<rect x="{left}" y="{y}" width="{max(length, 0):.2f}" height="{BAR}" fill="{colour}"/>',
        "</g>",
    ]


def _note(row: KernelRow) -> str:
    speed = "" if row.tops is None else f" {row.tops:7.3f} TOPS"
    limit = "" if row.share_of_limit is None else f" {row.share_of_limit:6.1%} of limit"
    return f"{_ms(row.median_ms)} {row.share:6.1%}{speed}{limit}"


def _tooltip(row: KernelRow) -> str:
    return f"{row.layer}: {row.rule}, {row.tile}; {row.gop:.4g} GOP, {row.bytes} bytes"


def _ms(value: float) -> str:
    return f"{value:8.4f} ms"


def _text(
    x: float, y: float, text: str, *, size: int = FONT, fill: str = INK, anchor: str = "start", weight: str = "normal"
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"'
        f' font-weight={quoteattr(weight)} xml:space="preserve">{escape(_printable(text))}</text>'
    )


def _printable(text: str) -> str:
    """Without the control characters, which no XML file may hold."""
    return "".join(c if c.isprintable() else "�" for c in text)


def _short(name: str) -> str:
    """A name with its middle left out where it is too long; its end says more than its beginning."""
    return name if len(name) <= LONGEST_NAME else f"{name[:32]}…{name[-(LONGEST_NAME - 33) :]}"


def _step(longest: float) -> float:
    """The distance of the lines of the time axis: 1, 2 or 5 times a power of ten, four to ten of them."""
    if longest <= 0:
        return 1.0
    power = 10 ** math.floor(math.log10(longest))
    return float(next(power * f for f in (0.1, 0.2, 0.5, 1.0) if longest / (power * f) <= 10))
