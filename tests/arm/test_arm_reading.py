"""What is asked of a server of this architecture by code that is sent there."""

from __future__ import annotations

import numpy as np

from hawq_tvm.remote.session import PATH_BYTES, READ_BYTES, read_kernel

from .on_arm import NEON, call, needs_emulator


@needs_emulator
def test_a_file_is_read() -> None:
    path = "/proc/self/comm"  # without a size
    name = np.frombuffer(path.encode().ljust(PATH_BYTES, b"\0"), np.uint8)
    for offset in (0, 3):
        _, data, place = call(read_kernel(), NEON, name, np.zeros(READ_BYTES, np.uint8), np.array([offset, 0]))
        assert place[1] > 0 and data[: place[1]].tobytes().endswith(b"\n")
    missing = np.frombuffer(b"/no/such/file".ljust(PATH_BYTES, b"\0"), np.uint8)
    assert call(read_kernel(), NEON, missing, np.zeros(READ_BYTES, np.uint8), np.array([0, 0]))[2][1] == -1
