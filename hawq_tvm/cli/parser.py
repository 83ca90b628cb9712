"""What argparse says of a wrong command line, in this project's words."""

from __future__ import annotations

import argparse
import json
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from hawq_tvm.core.errors import UsageError
from hawq_tvm.core.printable import printable


class Parser(argparse.ArgumentParser):
    """A parser whose complaints can hold any text, name what was meant, and are JSON where that was asked for; no
    option can be shortened.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})
        self._given: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but what is left over is an error of this command, which knows its own options."""
        self._given = list(sys.argv[1:] if args is None else args)
        found, left = super().parse_known_args(args, namespace)
        if left:
            self.error(f"unrecognized arguments: {' '.join(left)}")
        return found, left

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and exit."""
        near = self._near()
        said = UsageError(message, where=self.prog, remedy=f"did you mean {near}?" if near else "")
        if self._json():
            print(json.dumps({**said.to_dict(), "exit_code": said.exit_code}))
        super().error(printable(message) + (f"; did you mean {near}?" if near else ""))

    def _near(self) -> str:
        """The most similar option or command to the first that does not exist, "" where nothing is like it."""
        verbs = next((a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction)), None)
        known = [*self._option_string_actions]
        options = [text.partition("=")[0] for text in self._given if text.startswith("--") and len(text) > 2]
        wrong = [text for text in options if text not in known]
        if verbs is not None:  # the options behind a command are the command's
            wrong, known = [text for text in self._given[:1] if text not in verbs], [*verbs, *known]
        return next(iter(get_close_matches(wrong[0], known, 1)), "") if wrong else ""

    def _json(self) -> bool:
        """Whether JSON on standard output was asked for: `--json`, and no file."""
        if "--json" not in self._given:
            return False
        action = self._option_string_actions.get("--json")
        after = self._given[self._given.index("--json") + 1 :]
        return action is None or action.nargs == 0 or not after or after[0].startswith("-")
