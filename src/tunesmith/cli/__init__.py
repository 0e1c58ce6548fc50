"""The command line: one file a verb, each reading its input, making one library call and rendering the record."""

from tunesmith.cli.app import main

__all__ = ["main"]
