"""The Fashion-MNIST figure in small: one epoch, and what must hold of any seed. Skipped where Debian's data set is
not installed.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest

from hawq_tvm.core.errors import InputError
from hawq_tvm.quantize.allocate.table import Row, Table
from hawq_tvm.studies import fashion, fashion_mixed


def test_lost_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        fashion.read(tmp_path, "train")


@pytest.mark.parametrize("choices", [("W8A8", "W4A4"), ("W8A8", "W4A8", "W4A4")])
def test_chance_wastes_no_budget(choices: tuple[str, ...]) -> None:
    """Drawn assignments differ, keep the budget, ties and fixed layers, and no layer of them fits in a wider choice."""
    rows = [Row(f"l{i}", 10, 7 + i, dict.fromkeys(choices, 0.0), tie="t" * (i in (2, 3))) for i in range(7)]
    table = Table((Row("first", 1, 5, dict.fromkeys(choices, 0.0), fixed="W8A8"), *rows), choices)
    limit = Fraction(64 * 75 // 2)
    made = fashion_mixed.drawn(table, "bops", limit, {}, 6, 0)
    assert len(made) == 6 and all(one not in made[:i] for i, one in enumerate(made))
    for one in made:
        assert one["first"] == "W8A8" and one["l2"] == one["l3"] and table.total("bops", one) <= limit
        for group in table.groups()[1:]:
            now = choices.index(one[group[0].name])
            wider = [{**one, **dict.fromkeys((r.name for r in group), c)} for c in choices[:now]]
            assert all(table.total("bops", other) > limit for other in wider)


@pytest.mark.slow
@pytest.mark.skipif(not fashion.FOLDER.is_dir(), reason=f"no {fashion.FOLDER}: apt-get install dataset-fashion-mnist")
def test_eight_bits_cost_little_and_learned_rounding_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fashion, "EPOCHS", 1)
    rows = {
        row["network"]: row
        for row in fashion.measure(fashion.FOLDER, 0, ["W8A8", "W4A4, nearest", "W4A4, learned"], lambda text: None)
    }
    assert rows["float"]["top1"] > 0.8
    # The half a point that the project promises at 8 bits.
    assert abs(rows["W8A8"]["top1"] - rows["float"]["top1"]) < 0.005
    assert rows["W4A4, learned"]["flips"] < rows["W4A4, nearest"]["flips"]
