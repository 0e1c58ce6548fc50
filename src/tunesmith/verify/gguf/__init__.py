"""The proof of a GGUF file: every number, every setting, every token, and a real llama.cpp.  Never imports export."""

from tunesmith.verify.gguf.adapter import ADAPTER_LEVELS, verify_gguf_adapter
from tunesmith.verify.gguf.records import GgufRow, GgufTensor, GgufVerdict
from tunesmith.verify.gguf.run import GGUF_LEVELS, verify_gguf

__all__ = [
    "ADAPTER_LEVELS",
    "GGUF_LEVELS",
    "GgufRow",
    "GgufTensor",
    "GgufVerdict",
    "verify_gguf",
    "verify_gguf_adapter",
]
