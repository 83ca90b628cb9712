"""Every model that a test of the frontends imports is compared with a third party's run of it, after the test."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import tvm

from hawq_tvm.frontend.onnx import importer as onnx_importer

from .. import third_party

_done: set[bytes] = set()


@pytest.fixture(autouse=True)
def beside_a_third_party(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """See `third_party.check_onnx`."""
    seen: list[tuple[Any, tvm.IRModule]] = []
    complete = onnx_importer.Importer.complete

    def noted(self: Any) -> tvm.IRModule:
        module = complete(self)
        key = hashlib.sha1(self.model.SerializeToString(deterministic=True) + repr(self.inputs).encode()).digest()
        if key not in _done:
            _done.add(key)
            seen.append((self.model, module))
        return module

    monkeypatch.setattr(onnx_importer.Importer, "complete", noted)
    yield
    monkeypatch.undo()
    for model, module in seen:
        third_party.check_onnx(model, module)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Who compared how many models; with several processes each counts its own, and nothing is shown."""
    if third_party.compared:
        terminalreporter.write_line("third parties: " + ", ".join(f"{n} models by {by}" if by[0].isupper() else f"{n} {by}" for by, n in third_party.compared.most_common()))
