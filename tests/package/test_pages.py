"""Huge pages for what a library reads and writes in TVM's virtual machine: asked for once, results stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hawq_tvm as ht
from deploy.machine import pages
from hawq_tvm.package import runtime

HUGE = pages.HUGE


def test_whole_pages_lie_inside_of_ranges_that_touch() -> None:
    assert pages.whole_pages([]) == [] and pages.whole_pages([(0, HUGE - 1), (5 * HUGE + 1, 7 * HUGE - 1)]) == []
    assert pages.whole_pages([(HUGE + 64, 4 * HUGE - 64)]) == [(2 * HUGE, 3 * HUGE)]
    # Buffers one behind another make one range, in whatever order they are met; one inside another adds nothing.
    parts = [(2 * HUGE - 64, 3 * HUGE + 64), (HUGE, 2 * HUGE - 128), (HUGE + 64, HUGE + 128)]
    assert pages.whole_pages(parts) == [(HUGE, 3 * HUGE)]
    assert pages.whole_pages([(0, HUGE), (2 * HUGE, 3 * HUGE)]) == [(0, HUGE), (2 * HUGE, 3 * HUGE)]


@pytest.mark.parametrize("load", [ht.load, runtime.load], ids=["compiler", "runtime"])
def test_the_first_run_asks_and_no_other(load: Any, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(pages, "allowed", lambda: True)
    monkeypatch.setattr(pages, "ask", lambda ranges: asked.append(list(ranges)))
    model = load(tiny)
    assert asked == []
    (feed,) = ht.load(tiny).random_inputs(1, 0)
    first, second = model.run(feed), model.run(feed)
    assert len(asked) == 1 and all(start < end for start, end in asked[0])
    weights = sum(end - start for start, end in asked[0])
    assert weights > sum(x.nbytes for x in feed.values())
    assert first.keys() == second.keys() and all(np.array_equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_system_without_huge_pages_is_not_asked(
    setting: str | None, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "enabled"
    if setting is not None:
        place.write_text(setting)
    monkeypatch.setattr(pages, "SETTING", place)
    monkeypatch.setattr(pages, "ask", lambda ranges: pytest.fail("asked"))
    model = runtime.load(tiny)
    (feed,) = ht.load(tiny).random_inputs(1, 0)
    model.run(feed)


def test_linux_is_asked_for_what_is_there() -> None:
    """Whatever it answers, the bytes stay."""
    array = np.arange(3 * HUGE // 8)
    pages.ask([(array.ctypes.data, array.ctypes.data + array.nbytes)])
    assert np.array_equal(array, np.arange(array.size))
