"""A push through a hub over HTTP and back: one commit, the same bytes, gone on with where it broke."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

import tunesmith as ts
from tests.export.push.fake_hub import TOKEN, Entry, FakeHub
from tunesmith.errors import CheckpointError, OutputError

REPO = "me/tuned"


def plan_of(directory: Path, hub: FakeHub, **how: object) -> ts.PushPlan:
    """A plan for the fake hub."""
    return ts.plan_push(directory, REPO, endpoint=hub.url, **how)  # type: ignore[arg-type]


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of every visible file."""
    files = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def puts(hub: FakeHub) -> dict[str, int]:
    """How often each stored object was put."""
    return {key: count for key, count in hub.seen.items() if key.startswith("PUT /store/")}


@pytest.mark.parametrize("part_bytes", [None, 100_000], ids=["in one part", "in parts"])
def test_a_push_by_lfs_comes_back_the_same_and_verified(
    merged: Path, tmp_path: Path, hub: FakeHub, part_bytes: int | None
) -> None:
    """Up, down again with the hub's own client, and the certificate holds of the download."""
    hub.part_bytes = part_bytes
    plan = plan_of(merged, hub)
    pushed = ts.push(plan)
    down = Path(snapshot_download(REPO, endpoint=hub.url, local_dir=tmp_path / "down", token=TOKEN))
    found = hashes(down)
    found.pop(".gitattributes")
    assert found == {file.name: file.sha256 for file in plan.files}
    assert found == {**hashes(merged), "README.md": hashlib.sha256(plan.card.encode()).hexdigest()}
    assert ts.recheck(down).answer == "identical"
    assert pushed.commit == hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2  # the first one is of the hub's own making
    assert len(puts(hub)) == (1 if part_bytes is None else 4)


def test_a_push_by_xet_comes_back_the_same(merged: Path, tmp_path: Path) -> None:
    """The client's default way: its storage holds the bytes, the commit their SHA-256, and no LFS is asked for."""
    hf_xet = pytest.importorskip("hf_xet")
    (tmp_path / "storage").mkdir()
    hub = FakeHub(xet=tmp_path / "storage")
    try:
        ts.push(plan_of(merged, hub))
        entry = hub.files(REPO)["model.safetensors"]
        weights = merged / "model.safetensors"
        assert entry.oid == hashlib.sha256(weights.read_bytes()).hexdigest()
        hub.xet_hashes[entry.oid] = hf_xet.hash_files([str(weights)])[0].hash
        assert hub.content(entry) == weights.read_bytes()
        assert not hub.store
        assert not puts(hub)
    finally:
        hub.close()


def test_pushed_again_nothing_is_sent_and_nothing_committed(merged: Path, hub: FakeHub) -> None:
    """The hub has it all: one answer, no second commit, no second upload."""
    plan = plan_of(merged, hub)
    first, second = ts.push(plan), ts.push(plan)
    assert (second.commit, second.unchanged, first.unchanged) == (first.commit, True, False)
    assert set(puts(hub).values()) == {1}
    assert len(hub.repos[REPO].commits) == 2


def test_an_adapter_goes_up_without_what_training_left(tiny_adapter: Path, tmp_path: Path, hub: FakeHub) -> None:
    """The base by its hub id in what goes up; here the file stays as it is."""
    (tiny_adapter / "optimizer.pt").write_bytes(b"x")
    (tiny_adapter / ".env").write_text("KEY=1")
    before = hashes(tiny_adapter)
    plan = plan_of(tiny_adapter, hub, base_model="org/base")
    ts.push(plan)
    there = hub.files(REPO)
    assert set(there) >= {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    assert not {"optimizer.pt", ".env"} & set(there)
    assert b'"base_model_name_or_path": "org/base"' in hub.content(there["adapter_config.json"])
    assert str(tmp_path).encode() not in b"".join(hub.content(entry) for entry in there.values())
    assert hashes(tiny_adapter) == before
    assert plan.relation == "adapter"


def test_a_broken_connection_is_tried_again_within_a_push(merged: Path, hub: FakeHub, waits: list[float]) -> None:
    """A cut body, a busy hub, one that asks for patience: the same push, whole in the end."""
    hub.fail("PUT /store/", cut_after=1000)
    hub.fail("POST /api/models/.*/preupload/", 500)
    hub.fail("POST /api/models/.*/commit/", 503)
    hub.fail("POST /api/repos/create", 429, headers={"Retry-After": "7"})
    pushed = ts.push(plan_of(merged, hub))
    assert hub.repos[REPO].branches["main"] == pushed.commit
    assert waits == [7.0, 1.0]


def test_a_commit_whose_answer_is_lost_is_found(merged: Path, hub: FakeHub) -> None:
    """The hub committed, then its answer broke: asked again it calls that a conflict, which it is not."""
    hub.lose("POST /api/models/.*/commit/")
    pushed = ts.push(plan_of(merged, hub))
    assert pushed.commit == hub.repos[REPO].branches["main"]
    assert len(hub.repos[REPO].commits) == 2


KILLED = """
import sys
from tunesmith.export.push import PushPlan, push_to_hub
from tunesmith.progress import Cancellation, no_progress
push_to_hub(PushPlan.read(sys.argv[1]), progress=no_progress, cancellation=Cancellation())
"""


def test_a_push_that_was_killed_goes_on_and_showed_nothing_half(merged: Path, tmp_path: Path, hub: FakeHub) -> None:
    """Killed by -9 while the second large file is on its way: no commit; again, and only what was missing is sent."""
    big = merged / "more.safetensors"
    big.write_bytes(os.urandom(3 << 20))
    (merged / "model.safetensors").rename(merged / "first.safetensors")
    plan = two_files(merged, hub)
    plan.write(tmp_path / "plan.json")
    hub.rate = 1 << 20
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "plan.json")], env=environment)
    try:
        until = time.monotonic() + 60
        while not (hub.store and hub.arrived > 1 << 20) and time.monotonic() < until:
            time.sleep(0.02)
        assert hub.arrived > 1 << 20
        child.send_signal(signal.SIGKILL)
        child.wait()
    finally:
        child.kill()
    hub.rate = None
    assert len(hub.repos[REPO].commits) == 1
    stored = set(hub.store)
    assert len(stored) == 1
    ts.push(plan)
    first = next(iter(stored))
    assert hub.seen[f"PUT /store/{first}"] == 1
    assert {file.name for file in plan.files} <= set(hub.files(REPO))


def two_files(folder: Path, hub: FakeHub) -> ts.PushPlan:
    """A plan of two files of weights, of which the first is quickly sent."""
    names = ("first.safetensors", "more.safetensors")
    files = [
        {"name": name, "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "role": "weights"}
        for name in names
        for data in [(folder / name).read_bytes()]
    ]
    facts = {"directory": str(folder), "repo_id": REPO, "to": "huggingface", "endpoint": hub.url, "kind": "model"}
    more = {"files": files, "left_out": (), "size_bytes": 0, "card": "", "card_from": "records"}
    return ts.PushPlan.model_validate({**facts, **more})


def test_a_cancelled_push_commits_nothing(merged: Path, hub: FakeHub) -> None:
    """Stopped while bytes go up."""
    cancellation = ts.Cancellation()

    def stop(event: ts.Progress) -> None:
        if event.done:
            cancellation.cancel()

    with pytest.raises(ts.Cancelled):
        ts.push(plan_of(merged, hub), progress=stop, cancellation=cancellation)
    assert len(hub.repos[REPO].commits) == 1


def test_progress_ends_at_the_whole(merged: Path, hub: FakeHub) -> None:
    """Bytes never go back, and all of them are told."""
    seen: list[ts.Progress] = []
    plan = plan_of(merged, hub)
    ts.push(plan, progress=seen.append)
    done = [event.done for event in seen if event.stage == "push"]
    assert done == sorted(done)
    assert done[-1] == plan.size_bytes


FAILURES = [
    ("POST /api/repos/create", 401, "does not accept the token"),
    ("POST /api/repos/create", 403, "may not write"),
    ("POST /api/repos/create", 404, "takes no uploads"),
    ("POST /api/repos/create", 429, "too many requests"),
    ("POST /api/models/.*/preupload/", 403, "may not write"),
    ("POST .*/info/lfs/objects/batch", 413, "larger than the hub takes"),
    ("PUT /store/", 403, "may not write"),
    ("PUT /store/", 500, "The hub failed"),
    ("POST /api/models/.*/commit/", 409, "changed by another"),
    ("POST /api/models/.*/commit/", 412, "changed by another"),
    ("POST /api/models/.*/commit/", 500, "The hub failed"),
    ("POST /api/validate-yaml", 400, "front matter"),
]


@pytest.mark.parametrize(("match", "status", "said"), FAILURES)
def test_a_failure_is_one_sentence_without_the_token(
    merged: Path, hub: FakeHub, match: str, status: int, said: str
) -> None:
    """Also where the hub's answer repeats the token, or an address is signed; and nothing was committed."""
    body = f"no: Bearer {TOKEN} https://storage/x?X-Amz-Signature=abcdef"
    hub.fail(match, status, times=99, message=body, headers={"X-Error-Message": body})
    with pytest.raises(OutputError, match=said) as caught:
        ts.push(plan_of(merged, hub))
    told = "".join(traceback.format_exception(caught.value)) + str(caught.value.as_dict())
    assert TOKEN not in told
    assert "X-Amz-Signature" not in told
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert caught.value.next_step
    assert len(hub.repos[REPO].commits if REPO in hub.repos else [0]) == 1


def test_a_full_quota_is_told_from_a_forbidden_write(merged: Path, hub: FakeHub) -> None:
    """Both come as 403; the words tell."""
    hub.fail("POST .*/objects/batch", 403, message="You have exceeded your private storage limit")
    with pytest.raises(OutputError, match="storage on the hub is full"):
        ts.push(plan_of(merged, hub))


def test_no_network_no_hub_offline_and_nobody_logged_in(
    merged: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What fails before the hub can answer."""
    plan = plan_of(merged, hub)
    with pytest.raises(OutputError, match="cannot be reached"):
        ts.push(plan.model_copy(update={"endpoint": "http://127.0.0.1:9"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OutputError, match="HF_HUB_OFFLINE"):
        ts.push(plan)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(OutputError, match="Nobody is logged in"):
        ts.push(plan)
    assert not hub.repos


def test_the_token_is_in_no_record_and_no_log(
    merged: Path, hub: FakeHub, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """It went to the hub, and nowhere else; not to where the storage is, either."""
    hub.fail("PUT /store/", 500)
    plan = plan_of(merged, hub)
    pushed = ts.push(plan)
    shown = capsys.readouterr()
    assert TOKEN not in plan.to_json() + pushed.to_json() + caplog.text + shown.out + shown.err
    assert "store" not in caplog.text
    assert hub.authorized == {f"Bearer {TOKEN}"}
    assert not hub.authorized_store


def test_a_branch_that_is_not_there_is_said_first(merged: Path, hub: FakeHub) -> None:
    """Before anything is sent; one that is there is written, and main is not."""
    hub.add_repo(REPO)
    with pytest.raises(OutputError, match="no such revision") as caught:
        ts.push(plan_of(merged, hub, revision="v2"))
    assert "branch create me/tuned v2" in str(caught.value.next_step)
    assert not puts(hub)
    hub.repos[REPO].branches["v2"] = hub.repos[REPO].branches["main"]
    ts.push(plan_of(merged, hub, revision="v2"))
    assert "config.json" in hub.files(REPO, "v2")
    assert "config.json" not in hub.files(REPO)


def test_private_is_kept(merged: Path, hub: FakeHub) -> None:
    """A new repository is private; one that is public already is no place for it."""
    ts.push(plan_of(merged, hub, private=True))
    assert hub.repos[REPO].private
    hub.repos[REPO] = type(hub.repos[REPO])(private=False)
    hub.repos[REPO].commit("main", {".gitattributes": Entry(b"")})
    with pytest.raises(OutputError, match="public"):
        ts.push(plan_of(merged, hub, private=True))
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_what_an_earlier_model_left_is_named_or_replaced(merged: Path, hub: FakeHub) -> None:
    """A loader would read old shards beside the new model; pictures and prose stay."""
    there = {name: Entry(name.encode()) for name in ("model-00001-of-00002.safetensors", "vocab.json", "logo.png")}
    hub.add_repo(REPO).commit("main", there)
    with pytest.raises(OutputError, match="would read together") as caught:
        ts.push(plan_of(merged, hub))
    assert caught.value.details == ("model-00001-of-00002.safetensors", "vocab.json")
    pushed = ts.push(plan_of(merged, hub, replace=True))
    assert pushed.removed == caught.value.details
    assert "logo.png" in hub.files(REPO)
    assert not {*pushed.removed} & set(hub.files(REPO))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "README.md"])
def test_another_hash_in_the_repository_is_an_error(merged: Path, hub: FakeHub, name: str) -> None:
    """Of a large file by its SHA-256, of a small one by git's hash; of the card, too."""
    hub.tamper = lambda file, digest: digest[::-1] if file == name else digest
    with pytest.raises(OutputError, match="not what was sent") as caught:
        ts.push(plan_of(merged, hub))
    assert [line.split(":")[0] for line in caught.value.details] == [name]


def test_a_file_that_changed_after_the_plan_is_not_committed(merged: Path, hub: FakeHub) -> None:
    """The certificate held when it was planned; what goes up must still be that."""
    plan = plan_of(merged, hub)
    with (merged / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    with pytest.raises(OutputError, match="changed while they were sent"):
        ts.push(plan)
    assert len(hub.repos[REPO].commits) == 1
    with pytest.raises(CheckpointError, match="not what its certificate says"):
        plan_of(merged, hub)
