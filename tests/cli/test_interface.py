"""Options, exit codes and keys of JSON are what they were. Where a change is meant: python -m tests.cli.interface."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("minisign", reason="py-minisign is not installed (extra sign)")
from . import interface

STORED = json.loads(interface.STORED.read_bytes())


def compare(found: Any, what: str) -> None:
    assert found == STORED[what], f"changed; if that is meant: python -m {interface.__name__}"


def test_options() -> None:
    compare(interface.helps(), "options")


def test_exit_codes() -> None:
    compare(interface.exit_codes(), "exit_codes")


def test_exit_codes_and_keys_of_every_json() -> None:
    compare(interface.outputs(interface.COMMANDS.strip().splitlines()), "json")


def test_every_command_is_run() -> None:
    assert {line.split()[0] for line in STORED["json"]} == set(STORED["options"]) - {""}
