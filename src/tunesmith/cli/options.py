"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunArgument = Annotated[
    Path,
    typer.Argument(
        metavar="RUN",
        help="A run directory, one of its checkpoint-N directories, an adapter directory, or a hub id (org/name).",
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
AdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="RUN:WEIGHT",
        help="A further run whose final adapter is summed with RUN's; without a weight, 1. Repeat for several.",
    ),
]
BaseIsResidualOption = Annotated[
    bool,
    typer.Option(
        "--base-is-residual",
        help="The base is what PiSSA or a like initialisation left of the model, with the adapter's start taken out.",
    ),
]
BaseViewOption = Annotated[
    str | None,
    typer.Option(
        "--base-view", metavar="VIEW", help="Start from the base as QLoRA training saw it: nf4, nf4-double or int8."
    ),
]
CheckpointOption = Annotated[
    str, typer.Option("--checkpoint", metavar="NAME", help="Which adapter: final, checkpoint-N or N.")
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="Dtype of the arithmetic: auto (measured), fp32, bf16 or fp16.")
]
CertificateOption = Annotated[
    bool,
    typer.Option(
        "--certificate/--no-certificate",
        help="Whether to write tunesmith-certificate.json beside the weights: what they are made of, and the SHA-256 "
        "of every file.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def weighted_run(text: str | Path) -> tuple[Path, float]:
    """Read ``RUN:WEIGHT``; a directory of just that name goes before, and without a weight it is 1."""
    name, colon, tail = str(text).rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0
    return (Path(name), weight) if colon and name and not Path(text).exists() else (Path(text), 1.0)
