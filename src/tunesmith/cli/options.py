"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", help="A run directory, one of its checkpoint-N directories, or an adapter directory."
    ),
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="BASE",
        help="The base model: a directory, a hub id, or 'demo'. Default: the one that the adapter names.",
    ),
]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="NAME", help="Which adapter: final, checkpoint-N or N.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="Dtype of the arithmetic: auto (measured), fp32, bf16 or fp16.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
