"""``plan_push`` and ``push``: what goes up to a hub, proved first, with a card from the records; and the way there."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path

from tunesmith.adapter import ADAPTER_CONFIG
from tunesmith.api.gguf import verify_gguf
from tunesmith.api.inspecting import inspect
from tunesmith.api.origins import Origin, drift_of_model, origin_of, results_of
from tunesmith.api.places import StrPath
from tunesmith.checkpoint import hash_files
from tunesmith.compare import Drift, Evaluation
from tunesmith.errors import CheckpointError, DataError, TunesmithError
from tunesmith.export.push import (
    CARD_FILE,
    CERTIFICATE_FILE,
    CardFacts,
    LeftOut,
    Licence,
    Pushed,
    PushFile,
    PushPlan,
    Survey,
    a_tool_wrote,
    adapter_config_for_others,
    address_of,
    check_names,
    is_plain,
    licence_of,
    own_paths,
    problems_of,
    push_to_hub,
    push_to_modelscope,
    survey,
    write_card,
)
from tunesmith.export.push.records import CardFrom, Place
from tunesmith.progress import Cancellation, ProgressCallback, SharedProgress, no_progress
from tunesmith.record import Finding, gravest_first
from tunesmith.report import LANGUAGES, finding_text, text
from tunesmith.runs import Run
from tunesmith.verify import Recheck, read_certificate
from tunesmith.verify import recheck as recheck_directory

_GGUF_LEVELS = ("structure", "assets", "weights")


def plan_push(
    directory: StrPath,
    repo_id: str,
    *,
    to: str = "huggingface",
    private: bool = False,
    revision: str | None = None,
    endpoint: str | None = None,
    unverified: bool = False,
    replace: bool = False,
    run: Run | StrPath | None = None,
    model: StrPath | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    evaluation: Evaluation | StrPath | None = None,
    drift: Drift | StrPath | None = None,
    data: str | None = None,
    card: StrPath | None = None,
    language: str = "en",
    progress: ProgressCallback = no_progress,
    cancellation: Cancellation | None = None,
) -> PushPlan:
    """Find out what a push would send, whether it may, and what the card says; nothing is sent or written.

    Args:
        directory: a merged or quantized model, an adapter, a folder of GGUF files, or one such file.
        repo_id: ``owner/name``.
        to: ``huggingface`` or ``modelscope``.
        private: whether a repository that is not there yet is made private.
        revision: the branch to write; None for the main one.
        endpoint: the hub's address; None for ``HF_ENDPOINT`` (``MODELSCOPE_ENDPOINT``), or the hub itself.
        unverified: send also what nobody verified, or what is no longer what was verified; the card says so.
        replace: remove, in the same commit, what an earlier model left there that a loader would read together with
            this one.
        run: the run that it was made from, for the training's settings; an adapter's own directory needs none.
        model: of GGUF files: the model directory (of a GGUF adapter, the run) that they were made from, against which
            they are proved before they go up.
        base_model: the base's hub id, where the records know only a path.
        licence: the hub's word for the licence, where the files at hand do not tell.
        evaluation: a record of ``evaluate``, whose figures the card shows.
        drift: a record of ``drift`` that has a row of this directory: the card shows that row beside the base's.
        data: what it was trained on, in words or as hub ids with commas between; it is never guessed.
        card: a file that becomes README.md as it is; None for one from the records.
        language: of the card's prose, ``en`` or ``zh``.
        progress: told of bytes hashed.
        cancellation: read between chunks.

    Returns:
        The plan.

    Raises:
        TunesmithError: the directory is not one to push, does not hold what its certificate says, names paths of this
            machine, or an argument cannot be.
    """
    place, address = address_of(to, endpoint)
    check_names(repo_id, revision, base_model)
    if language not in LANGUAGES:
        raise DataError("There is no such language.", expected=", ".join(LANGUAGES), found=language)
    folder, only = _folder(Path(directory))
    found = survey(folder, only=only)
    source = Path(model) if model is not None and found.kind == "gguf" else None
    drifted = drift_of_model(drift, folder, found, run=run, language=language)
    known = origin_of(folder, found, run, base_model, source=source)
    licensed = licence_of(known.licence_folders, known.base_name, given=licence)
    proof = _proof(folder, found, source, unverified=unverified, progress=progress, cancellation=cancellation)
    written, card_from, notes = _own_card(folder, card)
    if written is None:
        facts = _card_facts(found, known, proof, licensed, evaluation, place=place, repo_id=repo_id, language=language)
        facts = changed(facts, data=data, drift=drifted[0], drift_note=drifted[1])
        written = write_card(facts, _Say(language))
    texts, rewritten = _texts(folder, found, known, written)
    files = _files(found, texts, proof, progress=progress, cancellation=cancellation)
    findings = [*_warnings(address, found, known, licensed, repo_id), *notes, *proof.findings, *rewritten]
    return PushPlan(
        directory=str(folder.resolve()),
        repo_id=repo_id,
        to=place,
        endpoint=address,
        revision=revision,
        private=private,
        replace=replace,
        kind=found.kind,
        files=files,
        left_out=(*found.left_out, *proof.left_out),
        size_bytes=sum(file.size_bytes for file in files),
        card=written,
        card_from=card_from,
        base_model=known.base_model,
        relation=known.relation,
        licence=licensed.name if licensed else None,
        verified=proof.answer,
        findings=gravest_first(findings),
    )


def push(
    plan: PushPlan, *, progress: ProgressCallback = no_progress, cancellation: Cancellation | None = None
) -> Pushed:
    """Send what a plan names, in one commit, and hold every hash in the repository against the plan's.

    What an earlier push of the same files had sent before it broke is not sent again.

    Args:
        plan: what :func:`plan_push` found.
        progress: told of bytes that lie there.
        cancellation: read while files are sent; no commit is made then.

    Returns:
        What lies there.

    Raises:
        MissingExtraError: ``modelscope`` without its client.
        OutputError: the hub, the network or the account does not allow it, or files changed since they were planned.
    """
    send = push_to_modelscope if plan.to == "modelscope" else push_to_hub
    return send(plan, progress=progress, cancellation=cancellation or Cancellation())


class _Say:
    """The card's words in one language."""

    def __init__(self, language: str) -> None:
        self._language = language

    def __call__(self, key: str, **params: object) -> str:
        return text(key, self._language, **params)


def _card_facts(
    found: Survey,
    known: Origin,
    proof: _Proof,
    licensed: Licence | None,
    evaluation: Evaluation | StrPath | None,
    *,
    place: Place,
    repo_id: str,
    language: str,
) -> CardFacts:
    results, note = results_of(evaluation, language)
    return CardFacts(
        kind=found.kind,
        to=place,
        repo_id=repo_id,
        base_model=known.base_model,
        base_name=known.base_name,
        relation=known.relation,
        fine_tuned=known.fine_tuned,
        licence=licensed,
        pipeline=known.pipeline,
        scheme=known.scheme,
        weights=[file.name for file in found.of_role("weights")],
        verdict=text(f"verdict.{proof.answer}", language) if proof.answer else None,
        certificate=CERTIFICATE_FILE if proof.hashes else "",
        results=results,
        results_note=note,
        settings=known.settings,
        code=bool(found.of_role("code")),
    )


@dataclass(frozen=True)
class _Proof:
    """Whether a directory may go up: the verdict that holds, and what is to be said."""

    answer: str | None
    hashes: Mapping[str, str]
    findings: tuple[Finding, ...] = ()
    left_out: tuple[LeftOut, ...] = ()


def _proof(
    folder: Path,
    found: Survey,
    source: Path | None,
    *,
    unverified: bool,
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> _Proof:
    """Hold a directory against its certificate, an adapter against what makes it usable, GGUF files against a model."""
    if found.kind == "adapter":
        return _healthy(folder, unverified=unverified)
    if source is not None:
        return _same_as(source, found, unverified=unverified, progress=progress, cancellation=cancellation)
    wrong: list[str] = []
    if (folder / CERTIFICATE_FILE).is_file():
        rechecked = recheck_directory(folder, progress=progress, cancellation=cancellation)
        hashes = read_certificate(folder / CERTIFICATE_FILE).hashes
        wrong = _against_certificate(rechecked, hashes, found)
        if rechecked.good and not wrong:
            return _Proof(rechecked.answer, hashes)
    if not unverified:
        what = (
            "The directory is not what its certificate says, so it is not pushed."
            if wrong
            else "Nobody has verified this directory, so it is not pushed."
        )
        raise CheckpointError(
            what,
            where=folder,
            details=wrong[:20],
            next_step=_to_prove(folder, found),
        )
    left = tuple(
        LeftOut(name=file.name, size_bytes=file.path.stat().st_size, reason="certificate")
        for file in found.of_role("certificate")
    )
    return _Proof(None, {}, (Finding(code="push_unverified", severity="warning"),), left)


def _against_certificate(rechecked: Recheck, hashes: Mapping[str, str], found: Survey) -> list[str]:
    """What a certificate says otherwise of what goes up, a line each."""
    going = {file.name for file in found.files}
    return [
        *(f"changed: {name}" for name in rechecked.changed),
        *(f"missing: {name}" for name in rechecked.missing),
        *(f"came since: {name}" for name in rechecked.added),
        *(f"not in the certificate: {file.name}" for file in found.of_role("weights") if file.name not in hashes),
        *(f"certified, but does not go up: {name}" for name in hashes if name not in going),
    ]


def _to_prove(folder: Path, found: Survey) -> str:
    if found.kind == "gguf":
        return "pass --model DIR, the model that the files were made from; or --unverified"
    return f"{shlex.join(['tunesmith', 'verify', 'RUN', str(folder), *_view_words(folder)])}, or pass --unverified"


def _view_words(folder: Path) -> list[str]:
    """The option of a proof that says how the base was seen, as the certificate tells."""
    with suppress(TunesmithError):
        view = read_certificate(folder / CERTIFICATE_FILE).predicate.base.view
        return ["--base-view", view] if view else []
    return []


def _same_as(
    source: Path,
    found: Survey,
    *,
    unverified: bool,
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> _Proof:
    """GGUF files hold no certificate: each is proved against the model, all but how llama.cpp runs it."""
    verdicts = [
        verify_gguf(source, file.path, levels=_GGUF_LEVELS, progress=progress, cancellation=cancellation)
        for file in found.of_role("weights")
    ]
    wrong = [verdict for verdict in verdicts if not verdict.good]
    if not wrong:
        answers = {verdict.answer for verdict in verdicts}
        return _Proof("identical" if answers == {"identical"} else "equal_within_rounding", {})
    if not unverified:
        raise CheckpointError(
            "The GGUF file is not the model, so it is not pushed.",
            where=source,
            details=[f"{one.file}: {text(f'verdict.{one.answer}')}" for one in wrong],
            next_step=f"{shlex.join(['tunesmith', 'verify', str(source), wrong[0].file])}, or pass --unverified",
        )
    return _Proof(None, {}, (Finding(code="push_unverified", severity="warning"),))


def _healthy(folder: Path, *, unverified: bool) -> _Proof:
    """An adapter has no certificate: it must open, and nothing grave may be wrong with it."""
    grave = [finding for finding in inspect(folder).health if finding.severity == "error"]
    if grave and not unverified:
        raise CheckpointError(
            "The adapter is not healthy, so it is not pushed.",
            where=folder,
            details=[finding_text(finding) for finding in grave[:5]],
            next_step=f"{shlex.join(['tunesmith', 'inspect', str(folder)])}, or pass --unverified",
        )
    return _Proof(None, {}, (Finding(code="push_unverified", severity="warning"),) if grave else ())


def _own_card(folder: Path, card: StrPath | None) -> tuple[str | None, CardFrom, list[Finding]]:
    """The card that a person wrote: the one that is given, or the directory's; None where there is none."""
    own = folder / CARD_FILE
    there = _read_card(own) if own.is_file() else None
    if card is not None:
        return _checked(Path(card), _read_card(Path(card))), "file", []
    if there is None:
        return None, "records", []
    if a_tool_wrote(there):
        return None, "records", [Finding(code="push_card_replaced", severity="info", params={"file": CARD_FILE})]
    kept = Finding(code="push_card_kept", severity="info", params={"file": CARD_FILE})
    return _checked(own, there), "directory", [kept]


def _read_card(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        found = getattr(error, "strerror", None) or error
        raise DataError("The card cannot be read.", where=path, expected="UTF-8 text", found=found) from error


def _checked(path: Path, card: str) -> str:
    if problems := problems_of(card):
        raise DataError("The hub would refuse the card's front matter.", where=path, details=problems)
    return card


def _texts(folder: Path, found: Survey, known: Origin, card: str) -> tuple[dict[str, str], list[Finding]]:
    """What goes up in the place of the directory's own files: the card, and a configuration without our paths.

    Raises:
        CheckpointError: a file names paths of this machine, and cannot be changed.
    """
    texts, findings = {CARD_FILE: card}, []
    if found.kind == "adapter" and (new := adapter_config_for_others(folder / ADAPTER_CONFIG, known.base_model)):
        texts[ADAPTER_CONFIG] = new
        params = {"file": ADAPTER_CONFIG, "base": known.base_name}
        findings.append(Finding(code="push_path_rewritten", severity="info", params=params))
    telling = [f"{file.name}: {line}" for file in found.files if file.name not in texts for line in own_paths(file)]
    if telling:
        raise CheckpointError(
            "Files that would go up name paths of this machine.",
            where=folder,
            details=telling[:10],
            next_step="take these lines out; where there is a certificate, verify again, which writes it anew",
        )
    return texts, findings


def _files(
    found: Survey,
    texts: Mapping[str, str],
    proof: _Proof,
    *,
    progress: ProgressCallback,
    cancellation: Cancellation | None,
) -> tuple[PushFile, ...]:
    """Every file with its hash; of those that the certificate names it is known already."""
    going = [file for file in found.files if proof.answer is not None or file.role != "certificate"]
    going = going if found.kind != "adapter" else list(found.files)
    unknown = {file.name: file.path for file in going if file.name not in {*proof.hashes, *texts}}
    sizes = sum(path.stat().st_size for path in unknown.values())
    report = SharedProgress(
        "hash files", sizes, "bytes", progress=progress, cancellation=cancellation or Cancellation()
    )
    hashes = {**proof.hashes, **hash_files(unknown, tick=report.advance)}
    roles = {file.name: file.role for file in going} | {CARD_FILE: "card"}
    files = []
    for name, role in roles.items():
        content = texts[name].encode() if name in texts else None
        size = len(content) if content is not None else (found.path_of(name)).stat().st_size
        digest = hashlib.sha256(content).hexdigest() if content is not None else hashes[name]
        if name in proof.hashes and proof.hashes[name] != digest:
            raise CheckpointError(
                "The certificate names the card that is in the directory, and another one would go up.",
                where=found.path_of(name),
                next_step="move it away and verify again, which writes the certificate anew; then push",
            )
        files.append(PushFile(name=name, size_bytes=size, sha256=digest, role=role, text=texts.get(name)))
    return tuple(files)


def _warnings(address: str, found: Survey, known: Origin, licensed: Licence | None, repo_id: str) -> list[Finding]:
    """What the user should know before anything is sent."""
    base = known.base_name
    findings = []
    if licensed is None:
        findings.append(Finding(code="push_licence_unknown", severity="warning", params={"base": base}))
    elif licensed.restrictive:
        params = {"base": base, "licence": licensed.name, "source": licensed.source}
        findings.append(Finding(code="push_licence_restrictive", severity="warning", params=params))
    if licensed and re.match(r"llama(?!2)", licensed.name) and not repo_id.split("/")[1].lower().startswith("llama"):
        findings.append(Finding(code="push_llama_name", severity="warning", params={"name": repo_id}))
    if known.base_model is None:
        findings.append(Finding(code="push_base_unknown", severity="warning", params={"base": base}))
    if code := found.of_role("code"):
        params = {"files": ", ".join(file.name for file in code)}
        findings.append(Finding(code="push_code", severity="warning", params=params))
    if is_plain(address):
        findings.append(Finding(code="push_plain_http", severity="warning", params={"endpoint": address}))
    return findings


def _folder(path: Path) -> tuple[Path, str | None]:
    """The directory, and the one GGUF file of it that is meant."""
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    return path, None
