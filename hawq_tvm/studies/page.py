"""A page of measurements and the numbers behind it, as deploy/benchmarks keeps them."""

from __future__ import annotations

import re
from pathlib import Path

from hawq_tvm.core.files import write_text


def write_page(folder: Path, device: str, date: str, page: str, numbers: str) -> Path:
    """Write a page as DEVICE-DATE.md and its numbers, JSON, as DEVICE-DATE.json; returns the page's path.

    Raises OutputError when one of them cannot be written.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower().replace("(r)", "").replace("(tm)", "")).strip("-")
    made = folder / f"{slug}-{date}.md"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(made.with_suffix(".json"), numbers + "\n")
    write_text(made, page)
    return made
