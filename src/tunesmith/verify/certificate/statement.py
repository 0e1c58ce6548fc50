"""What a certificate holds: an in-toto Statement, version 1, and a predicate of ours.

Source: https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, and its parsing rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from tunesmith.checkpoint import read_json_object
from tunesmith.errors import CheckpointError
from tunesmith.record import Finding
from tunesmith.verify.records import Answer, LevelName, Status

CERTIFICATE_FILE = "tunesmith-certificate.json"
STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Literal["https://github.com/tunesmith/tunesmith/certificate/v1"] = (
    "https://github.com/tunesmith/tunesmith/certificate/v1"
)


def _inside(name: str) -> str:
    """A relative POSIX path that stays where it begins."""
    parts = PurePosixPath(name).parts
    if not name or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or name != "/".join(parts):
        raise ValueError("not a file's name below the directory")
    return name


class _Piece(BaseModel):
    """A piece of the statement: camelCase in JSON, and what a later version adds is passed over, as in-toto asks."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", alias_generator=to_camel, populate_by_name=True, ser_json_inf_nan="strings"
    )


class Digest(_Piece):
    """A file's SHA-256, hexadecimal."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class HashedFile(_Piece):
    """A file by its POSIX name below its directory, and its hash; an in-toto ResourceDescriptor."""

    name: Annotated[str, AfterValidator(_inside)]
    digest: Digest


class CertifiedBase(_Piece):
    """The base model.

    Attributes:
        name: its hub id; of a local directory, the last name of its path.
        revision: the hub's commit; None where it is not known.
        view: how the merge saw it, as QLoRA training did; None for as it is stored.
        is_residual: whether it is what an initialisation such as PiSSA's left of a model.
        files: weights, ``config.json``, tokenizer, and what else a loader reads.
    """

    name: str
    revision: str | None = None
    view: str | None = None
    is_residual: bool = False
    files: tuple[HashedFile, ...] = ()


class CertifiedAdapter(_Piece):
    """An adapter that was merged in.

    Attributes:
        run: the last name of its run's directory.
        checkpoint: which of that run's adapters.
        weight: what its update was multiplied by.
        files: its configuration and its weights.
    """

    run: str
    checkpoint: str
    weight: float = 1.0
    files: tuple[HashedFile, ...] = ()


class Numerics(_Piece):
    """What rounding kept of the update; ``tunesmith.merge`` says how each figure is formed."""

    share_unchanged: float
    relative_error: float
    gain: float
    error_inside: float | None = None


class CertifiedMerge(_Piece):
    """How Tunesmith merged.

    Attributes:
        dtype: what the changed tensors are stored in.
        convert_to: the dtype that every floating-point tensor is stored in; None for the base's own.
        rounding: how the tensors with a low-rank update were rounded.
        rounded: how many tensors were rounded in each way.
        seed: of what was drawn by chance.
        calibration: hash of the user's file of rows; None where the tuned model wrote the text, or nothing was
            calibrated.
        shard_bytes: the size that no file of more than one tensor exceeds; None for the base's own files.
        kept: what rounding kept of the update.
        nearest: what rounding to nearest would have kept of it.
        tools: versions of what merged.
    """

    dtype: str
    convert_to: str | None = None
    rounding: str
    rounded: dict[str, int] = {}
    seed: int = 0
    calibration: Digest | None = None
    shard_bytes: int | None = None
    kept: Numerics
    nearest: Numerics
    tools: dict[str, str] = {}


class CertifiedQuantization(_Piece):
    """How Tunesmith quantized.

    Attributes:
        scheme: its short name, such as ``int4:64`` or ``w8a8``.
        format: of compressed-tensors: ``pack-quantized``, ``int-quantized`` or ``float-quantized``.
        bits: of a stored code.
        group_size: columns that share a scale; None for whole rows.
        activations: bits of the activations; None where they are not quantized.
        rounding: how codes were chosen: ``nearest``, ``faithful`` or ``calibrated``.
        modules: how many layers were quantized.
        ignore: layers that were not, as the configuration lists them.
        seed: of what was drawn by chance.
        calibration: hash of the user's file of rows; None where the tuned model wrote the text, or nothing was
            calibrated.
        shard_bytes: the size that no file of more than one tensor exceeds; None for the base's own files.
        relative_error: ‖Ŵ − W'‖ / ‖W'‖ over the quantized tensors; None where it was not measured.
        tools: versions of what quantized.
    """

    scheme: str
    format: str
    bits: int
    group_size: int | None = None
    activations: int | None = None
    rounding: str
    modules: int
    ignore: tuple[str, ...] = ()
    seed: int = 0
    calibration: Digest | None = None
    shard_bytes: int | None = None
    relative_error: float | None = None
    tools: dict[str, str] = {}


class CertifiedLevel(_Piece):
    """One level of proof, as :class:`tunesmith.verify.Level` has it, but for how long it took."""

    name: LevelName
    status: Status
    findings: tuple[Finding, ...] = ()


class CertifiedCounts(_Piece):
    """The sums of the weights level over all tensors; each but the first counts numbers."""

    tensors: int
    elements: int
    exact: int
    faithful: int
    twice_rounded: int
    outside: int
    unchanged: int


class CertifiedCodes(_Piece):
    """The sums of the weights level over all quantized tensors; each but the first and the last two counts codes.

    Attributes:
        tensors: how many there are.
        elements: all codes.
        nearest: the nearest to their number.
        twice_rounded: explained by a rounding to bf16 before.
        saturated: the outermost, for a number beyond it.
        neighbour: the other one around their number.
        further: none of these, as where rounding errors are passed on.
        gain: how many times the update was found in them; None where there is none.
        gain_error: its standard error.
    """

    tensors: int
    elements: int
    nearest: int
    twice_rounded: int
    saturated: int
    neighbour: int
    further: int
    gain: float | None = None
    gain_error: float | None = None


class CertifiedBehaviour(_Piece):
    """The sums of the behaviour level.

    Attributes:
        prompts: how many were answered.
        tokens: positions compared.
        mean_kl: mean KL(adapter ‖ merged) over them, nats a token.
        base_kl: mean KL(adapter ‖ base) over them.
        max_logit_difference: largest |Δ logit|.
        top1_agreement: share of positions with the same most likely token.
        same_texts: how many greedy texts are the same.
        ties: how many of the others part where rounding alone decides between two tokens.
        dtype: of the arithmetic.
    """

    prompts: int
    tokens: int
    mean_kl: float
    base_kl: float
    max_logit_difference: float
    top1_agreement: float
    same_texts: int
    ties: int = 0
    dtype: str | None = None


class CertifiedVerdict(_Piece):
    """What was proved.

    Attributes:
        answer: the verdict.
        levels: every level.
        counts: of the weights level, of what is stored in full.
        codes: of the weights level, of what is quantized; None where nothing is.
        behaviour: of the behaviour level; None where it was skipped.
        tools: versions of what verified.
    """

    answer: Answer
    levels: tuple[CertifiedLevel, ...]
    counts: CertifiedCounts
    codes: CertifiedCodes | None = None
    behaviour: CertifiedBehaviour | None = None
    tools: dict[str, str] = {}


class Predicate(_Piece):
    """What the certificate says of its subjects.

    Attributes:
        base: what the adapters were merged into.
        adapters: the adapters; their updates are summed.
        merge: how Tunesmith merged; None where another tool did, or that is not known.
        quantization: how Tunesmith quantized; None where nothing was, another tool did, or that is not known.
        verdict: what was proved; None where nothing was yet.
    """

    base: CertifiedBase
    adapters: tuple[CertifiedAdapter, ...]
    merge: CertifiedMerge | None = None
    quantization: CertifiedQuantization | None = None
    verdict: CertifiedVerdict | None = None


class Certificate(_Piece):
    """The whole statement.

    Attributes:
        type_: in-toto's own, ``_type`` in JSON.
        subject: every visible file of the directory but the certificate, sorted by name.
        predicate_type: which certificate this is.
        predicate: what it says.
    """

    type_: Annotated[Literal["https://in-toto.io/Statement/v1"], Field(alias="_type")] = STATEMENT_TYPE
    subject: Annotated[tuple[HashedFile, ...], Field(min_length=1)]
    predicate_type: Literal["https://github.com/tunesmith/tunesmith/certificate/v1"] = PREDICATE_TYPE
    predicate: Predicate

    def to_json(self) -> str:
        """The statement as an indented JSON document, with one final newline."""
        return self.model_dump_json(indent=2, by_alias=True) + "\n"

    @property
    def hashes(self) -> dict[str, str]:
        """The subjects' hashes by name."""
        return hashes_of(self.subject)


def read_certificate(path: Path) -> Certificate:
    """Read a certificate that :func:`write_certificate` wrote.

    Args:
        path: the file.

    Raises:
        CheckpointError: it is absent, cannot be read, or is not a certificate of ours.
    """
    document = read_json_object(path)
    try:
        certificate = Certificate.model_validate(document)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"]) or "document"
        raise CheckpointError(
            "This is not a certificate of Tunesmith's, or a later version's.",
            where=path,
            expected=f"an in-toto Statement with the predicate {PREDICATE_TYPE}",
            found=f"{place}: {problem['msg']}",
            next_step="verify the model against its run, which writes the certificate anew",
        ) from error
    if len(certificate.hashes) != len(certificate.subject):
        raise CheckpointError("The certificate names a file twice.", where=path)
    return certificate


def hashed_file(name: str, digest: str) -> HashedFile:
    """A file by its name and its SHA-256, hexadecimal."""
    return HashedFile(name=name, digest=Digest(sha256=digest))


def hashes_of(files: Sequence[HashedFile]) -> dict[str, str]:
    """Hashes by name."""
    return {file.name: file.digest.sha256 for file in files}
