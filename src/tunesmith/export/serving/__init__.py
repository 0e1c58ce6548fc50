"""How the servers of others are started so that they hold a run's variants by name: their lines, and their limits."""

from tunesmith.export.serving.lines import PORTS, serve_lines
from tunesmith.export.serving.records import ENGINES, ServeCommand, ServedVariant, ServeFile, ServingEngine, Source

__all__ = ["ENGINES", "PORTS", "ServeCommand", "ServeFile", "ServedVariant", "ServingEngine", "Source", "serve_lines"]
