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
ExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="ADDRESS",
        help="Where units of work run: local (threads), processes, processes:N, ray, ray://HOST:PORT, dask or "
        "dask://HOST:PORT. Default: local.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
MaxNewTokensOption = Annotated[int, typer.Option(min=1, help="Limit of every reply, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 is greedy.")]
TopPOption = Annotated[
    float, typer.Option(min=0.01, max=1.0, help="Draw from the fewest tokens that hold this probability.")
]
TopKOption = Annotated[int, typer.Option(min=0, help="Draw from this many most likely tokens; 0 for all.")]
MinPOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Draw from tokens at least so likely, as a share of the likeliest.")
]
RepetitionPenaltyOption = Annotated[
    float, typer.Option(min=0.01, help="Makes tokens that occurred less likely; 1 does nothing.")
]
StopOption = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="A text that ends a reply. Repeat for several.")
]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the random numbers.")]
EndpointOption = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...) instead of loading models. "
        "OPENAI_API_KEY is honoured.",
    ),
]
EndpointsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-compatible server (vLLM, SGLang, llama.cpp, ...) instead of loading models. Repeat for "
        "several servers with the same models, which share the work. OPENAI_API_KEY is honoured.",
    ),
]
ParallelOption = Annotated[
    int, typer.Option("--parallel", min=1, help="How many requests are in flight at each server.")
]
AskingExecutorOption = Annotated[
    str | None,
    typer.Option(
        "--executor",
        metavar="ADDRESS",
        help="Who asks the servers: ray or ray://HOST:PORT, a Ray Data job on a cluster. Default: this process.",
    ),
]
ModelsOption = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="[NAME=]MODEL", help="A model of that server. Repeat for several variants."),
]
RecordsOption = Annotated[
    Path | None,
    typer.Option(
        "--records",
        metavar="DIR",
        help="Where answers are kept, so that the same command goes on where it stopped. Default: the user's cache.",
    ),
]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Compute everything again, whatever is kept.")]


def weighted_run(text: str | Path) -> tuple[Path, float]:
    """Read ``RUN:WEIGHT``; a directory of just that name goes before, and without a weight it is 1."""
    name, colon, tail = str(text).rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return Path(text), 1.0
    return (Path(name), weight) if colon and name and not Path(text).exists() else (Path(text), 1.0)
