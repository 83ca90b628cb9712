"""Kernels: a list of rules, each of which schedules the fused layers it fits and says why it refuses the others."""

from .lower import check_rules_of, lower_to_tir
from .record import Records, apply_records
from .record import read as read_records
from .record import shipped as shipped_records
from .report import report, with_usage

__all__ = [
    "Records",
    "apply_records",
    "check_rules_of",
    "lower_to_tir",
    "read_records",
    "report",
    "shipped_records",
    "with_usage",
]
