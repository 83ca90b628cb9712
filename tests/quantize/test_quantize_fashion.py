"""The Fashion-MNIST figure in small: one epoch, and what must hold of any seed. Skipped where Debian's data set is
not installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from hawq_tvm.core.errors import InputError
from hawq_tvm.studies import fashion


def test_lost_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="apt-get install dataset-fashion-mnist"):
        fashion.read(tmp_path, "train")


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
