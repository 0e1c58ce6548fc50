"""The page: one process, one root folder, an API that is the verbs' own, and static files.

A thin client of the public API: what the command line can do the page can do, by the same code.
"""

from __future__ import annotations

from tunesmith.web.app import create_app, serve
from tunesmith.web.settings import Settings

__all__ = ["Settings", "create_app", "serve"]
