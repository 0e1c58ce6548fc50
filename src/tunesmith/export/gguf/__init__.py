"""GGUF, for llama.cpp and all that is built on it: written by llama.cpp's own converter, never by a copy of it."""

from tunesmith.export.gguf.adapter import write_adapter
from tunesmith.export.gguf.records import GgufExport
from tunesmith.export.gguf.types import ADAPTER_DEFAULT, MODEL_DEFAULT
from tunesmith.export.gguf.write import write_model

__all__ = ["ADAPTER_DEFAULT", "GgufExport", "MODEL_DEFAULT", "write_adapter", "write_model"]
