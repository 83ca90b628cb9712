"""The command line: everything that parses options or prints."""

from .main import main

__all__ = ["main"]
