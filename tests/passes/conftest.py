"""Every test draws the same numbers, whichever ran before it in its process."""

from __future__ import annotations

import numpy as np
import pytest

from .modules import RNG

_STATE = np.random.default_rng(7).bit_generator.state


@pytest.fixture(autouse=True)
def drawn_anew() -> None:
    RNG.bit_generator.state = _STATE
