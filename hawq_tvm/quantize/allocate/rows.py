"""An allocation as rows of JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .allocation import Allocation


def rows(allocation: Allocation) -> list[dict[str, Any]]:
    """Per layer its choice, sensitivity, share of the sum where pairs cost something, costs and facts (traces among
    them), JSON-ready.
    """
    found, shares = [], allocation.table.shares(allocation.assignment)
    for row in allocation.table.rows:
        choice = allocation.assignment[row.name]
        costs = {r: float(row.cost(r, choice)) for r in allocation.totals}
        entry = {
            "layer": row.name,
            "choice": choice,
            "parameters": row.parameters,
            "macs": row.macs,
            "sensitivity": row.sensitivity[choice],
            **({"share": shares[row.name]} if allocation.table.pairs is not None else {}),
            **costs,
        }
        found.append(
            {
                **entry,
                **({"tie": row.tie} if row.tie else {}),
                **({"fixed": row.fixed} if row.fixed else {}),
                **row.facts,
            }
        )
    return found
