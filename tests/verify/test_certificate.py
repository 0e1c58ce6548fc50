"""The certificate beside the weights: what it says, when it is written, and whether a directory still is that."""

from __future__ import annotations

import getpass
import hashlib
import importlib.metadata
import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tunesmith as ts
from tests.sabotage.workshop import Workshop, make_workshop
from tests.tiny_models import edit_json
from tunesmith.errors import Cancelled, CheckpointError
from tunesmith.progress import Cancellation
from tunesmith.record import Finding
from tunesmith.verify import CERTIFICATE_FILE, Certificate, Level, read_certificate, tool_versions
from tunesmith.verify.certificate.write import a_loader_reads, name_and_revision, verdict_of, without_paths
from tunesmith.verify.run import Verification

WEIGHTS = "model.safetensors"
LEVELS = ("structure", "assets", "weights")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A tiny run and its base."""
    return make_workshop(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def fresh(shop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge by the public API, not verified."""
    out = tmp_path_factory.mktemp("fresh") / "merged"
    ts.merge(ts.plan_merge(shop.run, out, base=str(shop.base), seed=7, shard_size="60KB"))
    return out


@pytest.fixture(scope="module")
def proven(shop: Workshop, fresh: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, verified."""
    out = Path(shutil.copytree(fresh, tmp_path_factory.mktemp("proven") / "merged"))
    assert prove(shop, out).answer == "equal_within_rounding"
    return out


@pytest.fixture
def mine(proven: Path, tmp_path: Path) -> Path:
    """A copy of the verified one that a test may damage."""
    return Path(shutil.copytree(proven, tmp_path / "mine"))


def prove(shop: Workshop, merged: Path, **options: Any) -> ts.Verdict:
    """The verdict of all levels but behaviour."""
    return ts.verify(shop.run, merged, **{"base": str(shop.base), "levels": LEVELS, **options})


def on_disk(folder: Path, *names: str) -> dict[str, str]:
    """The hashes of the named files, or of all but the certificate."""
    files = [folder / name for name in names] or [path for path in folder.rglob("*") if path.is_file()]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
        if path.name != CERTIFICATE_FILE
    }


def certificate_of(folder: Path) -> Certificate:
    """The certificate of a directory."""
    return read_certificate(folder / CERTIFICATE_FILE)


def test_a_certificate_is_an_in_toto_statement_of_every_file(proven: Path) -> None:
    """As the specification spells it, with nothing beside it that a consumer would not know."""
    document = json.loads((proven / CERTIFICATE_FILE).read_text())
    assert list(document) == ["_type", "subject", "predicateType", "predicate"]
    assert document["_type"] == "https://in-toto.io/Statement/v1"
    assert document["predicateType"] == "https://github.com/tunesmith/tunesmith/certificate/v1"
    assert {subject["name"]: subject["digest"] for subject in document["subject"]} == {
        name: {"sha256": digest} for name, digest in on_disk(proven).items()
    }
    names = [subject["name"] for subject in document["subject"]]
    assert names == sorted(names)
    assert len(names) > 6
    assert "config.json" in names


def test_a_certificate_says_what_the_model_is_made_of(shop: Workshop, proven: Path) -> None:
    """The base's and the adapter's files by their hashes, and how they were merged."""
    predicate = certificate_of(proven).predicate
    assert (predicate.base.name, predicate.base.revision, predicate.base.view) == ("base", None, None)
    base = {file.name: file.digest.sha256 for file in predicate.base.files}
    assert base == on_disk(shop.base, *base)
    assert {WEIGHTS, "config.json", "tokenizer.json", "tokenizer_config.json"} <= base.keys()
    (adapter,) = predicate.adapters
    assert (adapter.run, adapter.checkpoint, adapter.weight) == ("run", "final", 1.0)
    files = {file.name: file.digest.sha256 for file in adapter.files}
    assert files == on_disk(shop.run, "adapter_config.json", "adapter_model.safetensors")
    assert predicate.merge is not None
    assert (predicate.merge.dtype, predicate.merge.rounding, predicate.merge.seed) == ("BF16", "faithful", 7)
    assert predicate.merge.shard_bytes == 60_000
    assert 0.5 < predicate.merge.kept.gain < 1.5
    assert predicate.merge.tools == tool_versions()
    assert predicate.merge.tools["torch"] == importlib.metadata.version("torch")


def test_a_certificate_says_what_was_proved(shop: Workshop, fresh: Path, proven: Path) -> None:
    """Nothing after the merge; after the verification the answer, with the figures that it rests on."""
    assert certificate_of(fresh).predicate.verdict is None
    assert certificate_of(fresh).predicate.merge == certificate_of(proven).predicate.merge
    verdict, found = prove(shop, proven), certificate_of(proven).predicate.verdict
    assert found is not None
    assert found.answer == verdict.answer
    assert [(level.name, level.status, level.findings) for level in found.levels] == [
        (level.name, level.status, level.findings) for level in verdict.levels
    ]
    assert found.counts.elements == sum(tensor.elements for tensor in verdict.tensors) > 100_000
    assert found.counts.faithful == sum(tensor.faithful for tensor in verdict.tensors) > 1000
    assert (found.counts.tensors, found.counts.outside) == (len(verdict.tensors), 0)
    assert (found.behaviour, found.tools) == (None, tool_versions())
    assert verdict.certificate == Finding(
        code="certificate_written",
        severity="ok",
        params={"file": CERTIFICATE_FILE, "files": len(certificate_of(proven).subject), "proved": True},
    )


def test_how_it_was_merged_is_kept_whichever_copy_of_the_base_proves_it(
    shop: Workshop, mine: Path, tmp_path: Path
) -> None:
    """Another copy of its weights may lack a small file that says how to sample."""
    before = certificate_of(mine).predicate.merge
    copy = Path(shutil.copytree(shop.base, tmp_path / "copy"))
    (copy / "generation_config.json").unlink()
    prove(shop, mine, base=str(copy))
    found = certificate_of(mine).predicate
    assert "generation_config.json" not in {file.name for file in found.base.files}
    assert found.merge == before
    assert found.merge is not None


def test_a_certificate_sums_up_the_behaviour(shop: Workshop, mine: Path) -> None:
    """Weighted by tokens, as the level's own findings are."""
    verdict = ts.verify(shop.run, mine, base=str(shop.base))
    found = certificate_of(mine).predicate.verdict
    assert found is not None
    assert found.behaviour is not None
    tokens = sum(row.tokens for row in verdict.behaviour)
    assert (found.behaviour.prompts, found.behaviour.tokens) == (len(verdict.behaviour), tokens)
    assert found.behaviour.mean_kl == pytest.approx(sum(row.mean_kl * row.tokens for row in verdict.behaviour) / tokens)
    assert (found.behaviour.dtype, found.behaviour.ties) == ("float32", sum(row.tie for row in verdict.behaviour))


def test_a_certificate_names_no_place_no_user_and_no_time(
    shop: Workshop, fresh: Path, proven: Path, tmp_path: Path
) -> None:
    """What is published must not tell where, by whom and when it was made; paths in findings are cut short."""
    own_run = Path(shutil.copytree(shop.run, tmp_path / "run"))
    edit_json(own_run / "adapter_config.json", base_model_name_or_path=str(shop.base))
    own = tmp_path / "merged"
    ts.merge(ts.plan_merge(own_run, own))
    ts.verify(own_run, own)  # all levels
    secrets = [os.getcwd(), tempfile.gettempdir(), str(Path.home()), "/home", "/tmp", "/work", "/root", "pytest"]  # noqa: PTH109, S108
    secrets += [getpass.getuser(), socket.gethostname(), str(tmp_path)]
    for folder in (fresh, proven, own):
        document = (folder / CERTIFICATE_FILE).read_text()
        assert [secret for secret in secrets if secret in document] == []
        assert "seconds" not in document
    lost = Finding(code="weights_unreadable", severity="error", params={"what": f"{tmp_path}/a.json", "count": 1})
    level = Level(name="weights", status="fail", findings=(lost,), seconds=1.0)
    (certified,) = verdict_of("different", [level], ()).levels
    assert certified.findings[0].params == {"what": "a.json", "count": 1}
    assert without_paths("no file at /home/me/x/model.safetensors: 'C:\\Users\\me\\a.json', ~/b/c, and/or 1/2") == (
        "no file at model.safetensors: 'a.json', c, and/or 1/2"
    )
    assert without_paths("https://example.org/a/b and model.layers.0") == "https://example.org/a/b and model.layers.0"


def test_the_same_proof_gives_the_same_bytes_and_leaves_the_file_alone(shop: Workshop, mine: Path) -> None:
    """So that a signature of it stays good."""
    path = mine / CERTIFICATE_FILE
    before = path.read_bytes(), path.stat().st_mtime_ns
    prove(shop, mine)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    path.unlink()
    prove(shop, mine)
    again = json.loads(path.read_bytes())
    assert again["predicate"].pop("merge") is None  # nobody knows it any more
    former = json.loads(before[0])
    del former["predicate"]["merge"]
    assert again == former


def test_hashes_are_worked_out_once(shop: Workshop, mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are hashed beside the level that reads them; what is left for the end is small."""
    read: list[str] = []
    opening = Path.open

    def told(path: Path, *args: Any, **options: Any) -> Any:
        read.append(path.name)
        return opening(path, *args, **options)

    from tunesmith.verify.certificate import write

    real = write.hash_files

    def small(files: dict[str, Path], **options: Any) -> dict[str, str]:
        read.extend(path.name for path in files.values())
        return real(files, **options)

    monkeypatch.setattr(write, "hash_files", small)
    monkeypatch.setattr(Path, "open", told)
    prove(shop, mine)
    assert "config.json" in read
    assert [name for name in read if name.startswith("model") and name.endswith(".safetensors")] == []


def test_another_merge_takes_the_place_of_the_plan(shop: Workshop, mine: Path, tmp_path: Path) -> None:
    """What an earlier certificate says of the merge is kept for the same weights, and for no others."""
    other = tmp_path / "nearest"
    ts.merge(ts.plan_merge(shop.run, other, base=str(shop.base), rounding="nearest", shard_size="60KB"))
    shutil.copy(mine / CERTIFICATE_FILE, other)
    assert prove(shop, other).answer == "identical"
    assert certificate_of(other).predicate.merge is None
    assert certificate_of(other).hashes == on_disk(other)


def test_a_base_of_the_hub_is_named_with_its_commit(tmp_path: Path) -> None:
    """From where it lies in the hub's cache; a local directory by its last name."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--org--some--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    assert name_and_revision("org/some--model@main", snapshot) == ("org/some--model", commit)
    assert name_and_revision(str(tmp_path / "hub"), tmp_path / "hub") == ("hub", None)
    assert name_and_revision("demo", tmp_path / "0.1-abc") == ("demo", None)
    assert name_and_revision(".", tmp_path / "hub") == ("hub", None)


def test_no_certificate_is_written_where_none_is_wanted(shop: Workshop, tmp_path: Path) -> None:
    """Not by merge, and not by verify."""
    merged = ts.merge(ts.plan_merge(shop.run, tmp_path / "out", base=str(shop.base)), certificate=False)
    assert {receipt.sha256 for receipt in merged.receipts} == {None}
    assert prove(shop, tmp_path / "out", certificate=False).certificate is None
    assert not (tmp_path / "out" / CERTIFICATE_FILE).exists()
    assert prove(shop, tmp_path / "out").certificate is not None
    assert (tmp_path / "out" / CERTIFICATE_FILE).exists()


@pytest.mark.parametrize("spoil", ["weights", "config", "levels"])
def test_any_other_answer_leaves_the_directory_alone(shop: Workshop, mine: Path, spoil: str) -> None:
    """A certificate of what it once was stays there, and tells."""
    options: dict[str, Any] = {}
    if spoil == "weights":
        flip(next(mine.glob("*.safetensors")))
    elif spoil == "config":
        edit_json(mine / "config.json", rms_norm_eps=0.1)
    else:
        options["levels"] = ("structure", "assets")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in mine.iterdir()}
    verdict = prove(shop, mine, **options)
    assert verdict.answer == ("not_verified" if spoil == "levels" else "different")
    assert verdict.certificate is None
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in mine.iterdir()} == before


def flip(path: Path, offset: int = -100) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


@pytest.fixture
def unwritable(mine: Path) -> Iterator[Path]:
    """The directory, with something in the certificate's place that no file can replace."""
    (mine / CERTIFICATE_FILE).unlink()
    (mine / CERTIFICATE_FILE).mkdir()
    (mine / CERTIFICATE_FILE / "x").touch()
    yield mine
    shutil.rmtree(mine / CERTIFICATE_FILE)


def test_a_place_that_cannot_be_written_is_a_warning_and_no_failure(shop: Workshop, unwritable: Path) -> None:
    """The model is what it is."""
    verdict = prove(shop, unwritable)
    assert verdict.good
    assert verdict.certificate is not None
    assert (verdict.certificate.code, verdict.certificate.severity) == ("certificate_not_written", "warning")
    assert "directory" in str(verdict.certificate.params["reason"]).lower()
    assert ts.finding_text(verdict.certificate)
    assert not [path.name for path in unwritable.iterdir() if path.name.startswith(".")]


def test_a_merge_warns_where_its_certificate_cannot_be_written(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is whole all the same."""
    from tunesmith.verify.certificate import write

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_write", full)
    merged = ts.merge(ts.plan_merge(shop.run, tmp_path / "out", base=str(shop.base)))
    assert [finding.params["reason"] for finding in merged.findings if finding.code == "certificate_not_written"] == [
        "No space left on device"
    ]
    assert prove(shop, tmp_path / "out", certificate=False).good


def test_what_cannot_be_certified_is_a_warning(shop: Workshop, mine: Path) -> None:
    """A linked folder may hold anything, and change at any time."""
    (mine / "elsewhere").symlink_to(shop.base)
    verdict = prove(shop, mine)
    assert verdict.good
    assert verdict.certificate is not None
    assert str(verdict.certificate.params["reason"]).startswith("elsewhere: ")


def test_a_file_that_changes_meanwhile_is_not_certified(
    shop: Workshop, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The levels may have read another file than the one that was hashed."""
    certify = Verification.certify

    def late(work: Verification, *args: Any) -> Any:
        (mine / "config.json").write_bytes((mine / "config.json").read_bytes() + b"\n")
        return certify(work, *args)

    monkeypatch.setattr(Verification, "certify", late)
    verdict = prove(shop, mine)
    assert verdict.certificate is not None
    assert verdict.certificate.params["reason"] == "A file was changed while it was verified."


def test_a_cancelled_verification_leaves_the_certificate_as_it_was(shop: Workshop, mine: Path) -> None:
    """And no thread that hashes on."""
    before = (mine / CERTIFICATE_FILE).read_bytes()
    flag = Cancellation()

    def stop(event: ts.Progress) -> None:
        if event.stage == "verify weights":
            flag.cancel()

    with pytest.raises(Cancelled):
        prove(shop, mine, progress=stop, cancellation=flag)
    assert (mine / CERTIFICATE_FILE).read_bytes() == before


def test_another_tools_merge_gets_a_certificate_without_a_plan(shop: Workshop, tmp_path: Path) -> None:
    """Nobody told how it was made; what it is was proved."""
    out = Path(shutil.copytree(shop.nearest, tmp_path / "other"))
    (out / "README.md").write_text("a model")
    (out / ".gitattributes").write_text("x")
    (out / "images").mkdir()
    (out / "images" / "a.png").write_bytes(b"png")
    verdict = prove(shop, out)
    assert verdict.answer == "identical"
    certificate = certificate_of(out)
    assert certificate.predicate.merge is None
    assert {"README.md", "images/a.png"} <= certificate.hashes.keys()
    assert ".gitattributes" not in certificate.hashes
    assert ts.recheck(out).answer == "identical"


def test_a_sum_of_adapters_is_certified_with_its_weights(shop: Workshop, tmp_path: Path) -> None:
    """By merge and by verify alike, so that the plan is kept."""
    out, other = tmp_path / "sum", shop.run / "checkpoint-10"
    plan = ts.plan_merge(shop.run, out, base=str(shop.base), weight=0.5, adapters=[(other, -0.25)])
    ts.merge(plan)
    before = certificate_of(out).predicate
    assert prove(shop, out, weight=0.5, adapters=[(other, -0.25)]).good
    after = certificate_of(out).predicate
    assert [(one.run, one.weight) for one in after.adapters] == [("run", 0.5), ("checkpoint-10", -0.25)]
    assert (after.adapters, after.merge, after.base) == (before.adapters, before.merge, before.base)
    assert after.merge is not None


def test_a_new_file_has_the_mode_that_the_umask_gives(proven: Path) -> None:
    """Not that of a private temporary file."""
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((proven / CERTIFICATE_FILE).stat().st_mode) == 0o666 & ~mask


def test_recheck_says_what_the_certificate_says(proven: Path, fresh: Path) -> None:
    """Without base and run; a merge that nobody verified is not verified by its hashes."""
    found = ts.recheck(proven)
    assert (found.answer, found.certified, found.good) == ("equal_within_rounding", "equal_within_rounding", True)
    assert (found.directory, found.base_model, found.adapters[0].run) == ("merged", "base", "run")
    assert (found.changed, found.missing, found.added, found.beside) == ((), (), (), ())
    assert found.files == len(certificate_of(proven).subject)
    assert found.size_bytes == sum((proven / name).stat().st_size for name in certificate_of(proven).hashes)
    assert found.levels == {"structure": "pass", "assets": "pass", "weights": "pass", "behaviour": "skipped"}
    assert ts.Recheck.model_validate_json(found.to_json()) == found
    unproved = ts.recheck(fresh)
    assert (unproved.answer, unproved.certified, unproved.good, unproved.levels) == ("not_verified", None, False, {})


def test_recheck_names_every_file_that_is_not_as_it_was(mine: Path) -> None:
    """One bit, one file gone, and files that came since: those that a loader reads, and those that none does."""
    shard, gone = sorted(path.name for path in mine.glob("*.safetensors"))[:2]
    flip(mine / shard)
    (mine / gone).unlink()
    (mine / "additional_chat_templates").mkdir()
    for name in ("pytorch_model.bin", "adapter_config.json", "additional_chat_templates/tool.jinja", "modeling.py"):
        (mine / name).write_text("{}")
    for name in (
        "README.md",
        "LICENSE",
        "LICENSE.txt",
        "model-Q4.gguf",
        "tunesmith-certificate.sigstore.json",
        ".x.json",
    ):
        (mine / name).write_text("")
    found = ts.recheck(mine)
    assert (found.answer, found.certified) == ("different", "equal_within_rounding")
    assert (found.changed, found.missing) == ((shard,), (gone,))
    assert found.added == (
        "adapter_config.json",
        "additional_chat_templates/tool.jinja",
        "modeling.py",
        "pytorch_model.bin",
    )
    assert found.beside == (
        "LICENSE",
        "LICENSE.txt",
        "README.md",
        "model-Q4.gguf",
        "tunesmith-certificate.sigstore.json",
    )


@pytest.mark.parametrize("how", ["changed", "missing", "added"])
def test_one_file_is_enough(mine: Path, how: str) -> None:
    """Whichever way it is not as it was."""
    if how == "added":
        (mine / "vocab.txt").write_text("x")
    elif how == "missing":
        (mine / "tokenizer_config.json").unlink()
    else:
        flip(mine / "tokenizer_config.json")
    found = ts.recheck(mine)
    assert found.answer == "different"
    assert [name for name in ("changed", "missing", "added") if getattr(found, name)] == [how]


@pytest.mark.parametrize("name", ["README.md", "weights.gguf", "picture.png"])
def test_files_that_no_loader_reads_may_come(mine: Path, name: str) -> None:
    """They are named, and the answer stays."""
    (mine / name).write_text("x")
    found = ts.recheck(mine)
    assert (found.answer, found.beside) == ("equal_within_rounding", (name,))


def test_a_link_to_a_folder_that_came_is_no_trifle(mine: Path, shop: Workshop) -> None:
    """A loader follows it, and nothing says what lies there."""
    (mine / "additional_chat_templates").symlink_to(shop.base)
    found = ts.recheck(mine)
    assert (found.answer, found.added) == ("different", ("additional_chat_templates",))


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("model.SafeTensors", True), ("a/b.json", True), ("merges.txt", True), ("tokenizer.model", True),
        ("configuration.py", True), ("README.txt", False), ("licenses.txt", False), ("x.sigstore.json", False),
        ("x.gguf", False), ("notes", False),
    ],
)  # fmt: skip
def test_what_a_loader_may_read_goes_by_the_name(name: str, read: bool) -> None:
    """Whatever the case of its letters."""
    assert a_loader_reads(name) is read


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    """A change of the certificate's document."""

    def text(before: str) -> str:
        document = json.loads(before)
        change(document)
        return json.dumps(document)

    return text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-20],
        lambda _: "[]",
        lambda _: "",
        spoilt(lambda document: document.update(predicateType="https://slsa.dev/provenance/v1")),
        spoilt(lambda document: document.update(_type="https://in-toto.io/Statement/v0.1")),
        spoilt(lambda document: document.update(subject=[])),
        spoilt(lambda document: document["subject"].append(document["subject"][0])),
        spoilt(lambda document: document["subject"][0].update(name="../secret")),
        spoilt(lambda document: document["subject"][0].update(name="/etc/passwd")),
        spoilt(lambda document: document["subject"][0].update(digest={"sha256": "abc"})),
        spoilt(lambda document: document["subject"][0].update(digest={"sha512": "0" * 128})),
        spoilt(lambda document: document["predicate"].pop("base")),
        spoilt(lambda document: document["predicate"]["verdict"].update(answer="perfect")),
    ],
)
def test_a_foreign_or_broken_certificate_is_an_error(mine: Path, change: Callable[[str], str]) -> None:
    """That says which file, and that a verification writes it anew, whatever lies there."""
    path = mine / CERTIFICATE_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(CheckpointError) as caught:
        ts.recheck(mine)
    assert caught.value.exit_code == 2
    assert caught.value.where == str(path)


def test_a_broken_certificate_is_written_anew(shop: Workshop, mine: Path) -> None:
    """By the proof itself."""
    (mine / CERTIFICATE_FILE).write_text("{")
    assert prove(shop, mine).good
    assert ts.recheck(mine).good


def test_what_a_later_version_adds_is_passed_over(mine: Path) -> None:
    """As in-toto asks of who reads a statement."""
    path = mine / CERTIFICATE_FILE
    document = json.loads(path.read_text())
    document["predicate"]["quantized"] = {"bits": 4}
    document["subject"][0]["annotations"] = {"a": 1}
    document["subject"][0]["digest"]["sha512"] = "0" * 128
    path.write_text(json.dumps(document))
    assert ts.recheck(mine).good


def test_a_directory_without_certificate_says_what_to_type(shop: Workshop, tmp_path: Path) -> None:
    """So does a place where nothing is."""
    with pytest.raises(CheckpointError, match="no certificate") as caught:
        ts.recheck(shop.merged)
    assert caught.value.next_step == f"tunesmith verify RUN {shop.merged}"
    with pytest.raises(CheckpointError, match="not there"):
        ts.recheck(tmp_path / "nowhere")


def test_recheck_stops_when_asked(proven: Path) -> None:
    """Between chunks."""
    flag = Cancellation()
    flag.cancel()
    with pytest.raises(Cancelled):
        ts.recheck(proven, cancellation=flag)


def test_recheck_tells_how_far_it_is(proven: Path) -> None:
    """In bytes, up to all of them."""
    seen: list[ts.Progress] = []
    found = ts.recheck(proven, progress=seen.append)
    assert (seen[-1].done, seen[-1].total, seen[-1].unit) == (found.size_bytes, found.size_bytes, "bytes")


def test_a_certificate_survives_the_way_through_json(proven: Path) -> None:
    """Every field, byte for byte."""
    path = proven / CERTIFICATE_FILE
    assert read_certificate(path).to_json() == path.read_text()


def test_a_sample_proves_nothing_and_certifies_nothing(shop: Workshop, fresh: Path, tmp_path: Path) -> None:
    """However good it looks; what it does see is told."""
    out = Path(shutil.copytree(fresh, tmp_path / "sampled"))
    before = (out / CERTIFICATE_FILE).read_bytes()
    verdict = prove(shop, out, sample=True)
    assert (verdict.answer, verdict.certificate) == ("not_verified", None)
    codes = {finding.code: finding for level in verdict.levels for finding in level.findings}
    assert "weights_proven" not in codes
    total = sum(tensor.elements for tensor in prove(shop, out, certificate=False).tensors)
    assert codes["weights_sampled"].params["total"] == total
    assert codes["weights_sampled"].params["elements"] == sum(tensor.elements for tensor in verdict.tensors) <= total
    assert "not a proof" in ts.finding_text(codes["weights_sampled"])
    assert (out / CERTIFICATE_FILE).read_bytes() == before
    for shard in out.glob("*.safetensors"):
        flip(shard, -1)  # the last number of all is in the last tile
    assert prove(shop, out, sample=True).answer == "different"
