"""The command line: everything that parses options or prints."""

from .commands import main

__all__ = ["main"]
