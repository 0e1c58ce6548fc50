"""The records of a push: what would go up and what would not, and what lies there in the end."""

from __future__ import annotations

from typing import Literal

from tunesmith.record import Finding, Part, Record

Kind = Literal["model", "quantized", "adapter", "gguf"]
Place = Literal["huggingface", "modelscope"]
Role = Literal["weights", "config", "tokenizer", "certificate", "card", "licence", "code", "modelfile"]
Reason = Literal["hidden", "link_out", "pickle", "training", "folder", "gguf", "certificate", "card", "unknown"]
CardFrom = Literal["records", "directory", "file"]


class PushFile(Part):
    """One file that goes up.

    Attributes:
        name: its POSIX name in the repository, the same as below the directory.
        size_bytes: its size there.
        sha256: the hash of its bytes there, hexadecimal.
        role: what it is for.
        text: what goes up in the place of the directory's own file, such as the card; None for the file as it is.
    """

    name: str
    size_bytes: int
    sha256: str
    role: Role
    text: str | None = None


class LeftOut(Part):
    """One file, or a folder with all in it, that stays here.

    Attributes:
        name: its POSIX name below the directory; a folder's ends in a slash.
        size_bytes: its size; of a folder, 0.
        reason: why it stays.
    """

    name: str
    size_bytes: int
    reason: Reason


class PushPlan(Record):
    """All that a push will do, found out before anything is sent.

    Attributes:
        directory: absolute directory of the files.
        repo_id: ``owner/name``.
        to: which hub.
        endpoint: its address.
        revision: the branch that is written; None for the main one.
        private: whether a repository that is not there yet is made private.
        replace: whether what an earlier model left in the repository, and a loader would read beside this one, is
            removed in the same commit.
        kind: what the directory holds.
        files: what goes up, weights first, then by name.
        left_out: what stays here.
        size_bytes: the files' sizes together.
        card: the text of the model card, README.md there.
        card_from: who wrote it: ``records`` (this plan), ``directory`` (a README.md that a person wrote), or ``file``.
        base_model: the hub id that the card names as base; None where none is known.
        relation: what the model is to its base, in the hub's word; None where the base is not known.
        licence: the hub's word for the base's licence; None where it is not known.
        verified: the certificate's verdict, where it holds, or that of GGUF files against their model; None where there
            is none, or it does not hold.
        findings: what the user should know before anything is sent, the gravest first.
    """

    directory: str
    repo_id: str
    to: Place
    endpoint: str
    revision: str | None = None
    private: bool = False
    replace: bool = False
    kind: Kind
    files: tuple[PushFile, ...]
    left_out: tuple[LeftOut, ...]
    size_bytes: int
    card: str
    card_from: CardFrom
    base_model: str | None = None
    relation: str | None = None
    licence: str | None = None
    verified: str | None = None
    findings: tuple[Finding, ...] = ()


class Pushed(Record):
    """What lies in the repository after a push; every file's hash there was compared with the plan's.

    Attributes:
        repo_id: ``owner/name``.
        to: which hub.
        url: the page that shows it.
        commit: the commit that holds it.
        unchanged: whether all of it lay there already, so that no commit was made.
        files: how many files went up or lay there already.
        size_bytes: their size.
        removed: files of an earlier model that the commit removed.
        seconds: wall time.
    """

    repo_id: str
    to: Place
    url: str
    commit: str
    unchanged: bool = False
    files: int
    size_bytes: int
    removed: tuple[str, ...] = ()
    seconds: float = 0.0
