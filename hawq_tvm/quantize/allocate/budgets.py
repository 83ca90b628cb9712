"""What bits take: resources, their units, and budgets of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from hawq_tvm.core.errors import UsageError

# Each resource: its unit in files and reports, and the units that a budget may be given in.
RESOURCES: dict[str, tuple[str, dict[str, Fraction]]] = {
    "size": (
        "bits",
        {
            "B": Fraction(8),
            "kB": Fraction(8_000),
            "KB": Fraction(8_000),
            "MB": Fraction(8_000_000),
            "KiB": Fraction(8 * 2**10),
            "MiB": Fraction(8 * 2**20),
        },
    ),
    "bops": ("bit operations", {"M": Fraction(10**6), "G": Fraction(10**9), "T": Fraction(10**12)}),
    "latency": ("us", {"us": Fraction(1), "ms": Fraction(1000), "s": Fraction(10**6)}),
}


@dataclass(frozen=True)
class Budget:
    """At most so much of a resource.

    kind: "absolute" (value in the resource's unit), "share" (value times what the widest choice everywhere takes),
    or "fraction" (0 is the least that any assignment takes, 1 the widest choice everywhere: the budgets of HAWQ-V3's
    tables).
    """

    resource: str
    kind: str
    value: Fraction
    text: str

    @staticmethod
    def parse(text: str) -> Budget:
        """size=0.5 (a fraction), size=60% (a share), size=6.7MB, bops=72G, latency=2.5ms.

        Raises UsageError for anything else.
        """
        resource, _, amount = text.partition("=")
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)\s*(%|[A-Za-z]*)", amount.strip())
        if resource not in RESOURCES or not match:
            raise UsageError(
                "a budget is not understood",
                where=f"--budget {text}",
                expected=f"{', '.join(f'{r}=0.5' for r in RESOURCES)}, size=60%, size=6.7MB, bops=72G or latency=2.5ms",
            )
        value, unit = Fraction(match[1]), match[2]
        if unit == "%":
            return Budget(resource, "share", value / 100, text)
        units = RESOURCES[resource][1]
        if unit and unit not in units:
            raise UsageError(
                f"is in a unit that {resource} is not measured in",
                where=f"--budget {text}",
                expected=", ".join(units),
                found=unit,
            )
        if not unit and value > 1:
            raise UsageError(
                "a fraction lies between 0 and 1",
                where=f"--budget {text}",
                found=match[1],
                remedy=f"add a unit ({', '.join(units)}) or %",
            )
        return (
            Budget(resource, "absolute", value * units[unit], text)
            if unit
            else Budget(resource, "fraction", value, text)
        )


def readable(resource: str, amount: Fraction | float, up: bool = False) -> str:
    """An amount of a resource as `Budget.parse` reads it, to four digits or so; up: never less than it is."""
    units = {"size": ("B", "KB", "MB"), "bops": ("M", "G"), "latency": ("us", "ms")}[resource]
    factors = [RESOURCES[resource][1][u] for u in units]
    factor, unit = next(
        ((f, u) for f, u in zip(reversed(factors), reversed(units), strict=True) if amount >= f), (factors[0], units[0])
    )
    thousandths = Fraction(amount) / factor * 1000
    digits = f"{(math.ceil(thousandths) if up else round(thousandths)) / 1000:.3f}"
    return f"{digits.rstrip('0').rstrip('.')} {unit}"
