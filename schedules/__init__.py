"""Kernels: a list of rules, each of which schedules the fused layers it fits and says why it refuses the others."""

from .lower import lower_to_tir
from .record import apply_records
from .report import report

__all__ = ["apply_records", "lower_to_tir", "report"]
