"""Tests of paths from requests: what lies within is found, and everything else is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import tunesmith as ts
from tunesmith.web.answers import NotThereError
from tunesmith.web.places import Places


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a run, and something secret beside it."""
    made = tmp_path / "root"
    (made / "out" / "run").mkdir(parents=True)
    (made / "out" / "run" / "adapter_config.json").write_text("{}")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.txt").write_text("key")
    return made


@pytest.mark.parametrize("path", ["out/run", "./out//run", "out/../out/run", "{root}/out/run"])
def test_a_path_within_is_found(root: Path, path: str) -> None:
    """Relative to the root, absolute, and with detours that stay within."""
    assert Places(root).resolve(path.format(root=root)) == root / "out" / "run"


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../secret",
        "out/../../secret/key.txt",
        "/etc/passwd",
        "{root}/../secret",
        "{root}-other",
        "/proc/self/root",
    ],
)
def test_a_path_outside_is_refused_and_root_is_named(root: Path, path: str) -> None:
    """Whether there is something or not, the answer is the same, and says how the page could use it."""
    with pytest.raises(ts.TunesmithError, match="outside") as refused:
        Places(root).resolve(path.format(root=root))
    assert "--root" in str(refused.value)
    assert "key" not in str(refused.value.expected)


def test_a_link_is_followed_before_it_is_judged(root: Path) -> None:
    """A link that leads out is refused, as a folder on the way and at the end; one that stays within is fine."""
    (root / "out" / "away").symlink_to(root.parent / "secret")
    (root / "out" / "key").symlink_to(root.parent / "secret" / "key.txt")
    (root / "inner").symlink_to(root / "out" / "run")
    for path in ("out/away", "out/away/key.txt", "out/key", "out/away/new.html"):
        with pytest.raises(ts.TunesmithError, match="outside"):
            Places(root).resolve(path, must_exist=False)
    assert Places(root).resolve("inner") == root / "out" / "run"


@pytest.mark.parametrize("path", ["s3://bucket/merged", "hf://me/model", "file:///etc"])
def test_an_address_is_no_folder_within(root: Path, path: str) -> None:
    """A folder ``s3:`` would be made of it."""
    with pytest.raises(ts.TunesmithError, match="outside") as refused:
        Places(root).resolve(path, must_exist=False)
    assert refused.value.where == path
    assert "command line" in str(refused.value.next_step)


def test_a_chain_of_links_that_has_no_end_is_refused(root: Path) -> None:
    """A link to itself is an answer, not a crash."""
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(ts.TunesmithError):
        Places(root).resolve("loop")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a\0b", "control"),
        ("a\nb", "control"),
        ("a\x1b[31mb", "control"),
        ("\udc80", "control"),
        ("x" * 5000, "characters"),
        ("x" * 300, None),
        ("..\\secret", "slashes"),
        ("C:/secret", "slashes"),
        ("C:secret", "slashes"),
        ("~/secret", "~"),
        ("~root", "~"),
        ("", "spaces"),
        (" out", "spaces"),
    ],
)
def test_what_is_no_path_here_is_refused(root: Path, path: str, reason: str | None) -> None:
    """Bytes, lengths and separators that are no part of a path are told as such."""
    with pytest.raises(ts.TunesmithError) as refused:
        Places(root).resolve(path)
    assert reason is None or reason in str(refused.value.expected)


def test_what_is_not_there_is_told_only_within(root: Path) -> None:
    """Within the root absence has an error of its own; it need not be there where something will be written."""
    with pytest.raises(NotThereError):
        Places(root).resolve("out/none")
    assert Places(root).resolve("out/none", must_exist=False) == root / "out" / "none"


def test_a_run_of_the_command_line_is_allowed_wherever_it_lies(root: Path, tmp_path: Path) -> None:
    """That very path and what is in it; nothing beside it."""
    run = tmp_path / "elsewhere" / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    places = Places(root, allowed=(str(run), None))
    assert places.run(str(run)) == str(run)
    assert places.resolve(str(run / "checkpoint-1")) == run / "checkpoint-1"
    with pytest.raises(ts.TunesmithError, match="outside"):
        places.run(str(run.parent))
    with pytest.raises(ts.TunesmithError, match="outside"):
        places.run(str(run) + "-other")


def test_a_base_may_be_a_hubs_or_the_embedded_one(root: Path) -> None:
    """Names are passed on, directories are held to the root."""
    places = Places(root)
    assert [places.base(name) for name in (None, "demo", "org/name", "org/name@main")] == [
        None, "demo", "org/name", "org/name@main",
    ]  # fmt: skip
    assert places.base("out/run") == str(root / "out" / "run")
    for name in ("../secret", "/etc", "../../x", "org/../../secret"):
        with pytest.raises(ts.TunesmithError):
            places.base(name)


def test_a_hubs_name_that_is_a_folder_of_the_working_directory_is_held_to_the_root(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library looks for a folder first, and so must we."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ts.TunesmithError):
        Places(root).base("org/name")


def test_a_base_beside_its_run_is_held_to_the_root(root: Path) -> None:
    """The library looks there too; a link there leads out as little as elsewhere."""
    places, run = Places(root), str(root / "out" / "run")
    (root / "out" / "models" / "one").mkdir(parents=True)
    assert places.base("models/one", run=run) == str(root / "out" / "models" / "one")
    (root / "out" / "models" / "two").symlink_to(root.parent / "secret")
    with pytest.raises(ts.TunesmithError, match="outside"):
        places.base("models/two", run=run)


def test_variants_are_names_or_directories_within(root: Path) -> None:
    """The run's own by name, others by their place, with a name of their own where they have one."""
    places = Places(root)
    assert [places.variant(name) for name in ("base", "final", "checkpoint-10", "10")] == [
        "base", "final", "checkpoint-10", "10",
    ]  # fmt: skip
    assert places.variant("mine=out/run") == f"mine={root / 'out' / 'run'}"
    for name in ("../secret", "mine=../secret", "mine=/etc"):
        with pytest.raises(ts.TunesmithError, match="outside"):
            places.variant(name)


def test_folders_are_listed_without_hidden_ones_and_links(root: Path) -> None:
    """A listing never shows a way out."""
    (root / ".git").mkdir()
    (root / "away").symlink_to(root.parent / "secret")
    (root / "file.txt").write_text("")
    folder, listed, truncated = Places(root).folders(".")
    assert folder == root
    assert [(one.name, one.is_run) for one in listed] == [("out", False)]
    assert not truncated
    assert [(one.name, one.is_run) for one in Places(root).folders("out")[1]] == [("run", True)]
    with pytest.raises(ts.TunesmithError, match="file"):
        Places(root).folders("file.txt")


def test_runs_are_found_within_bounds(root: Path) -> None:
    """Runs are not looked into, links are not followed, depth and number have an end that is told."""
    (root / "deep" / "a" / "b" / "c" / "run").mkdir(parents=True)
    (root / "deep" / "a" / "b" / "c" / "run" / "adapter_config.json").write_text("{}")
    (root / "out" / "run" / "checkpoint-1").mkdir()
    (root / "out" / "run" / "checkpoint-1" / "adapter_config.json").write_text("{}")
    (root / "again").symlink_to(root / "out")
    assert Places(root).find_runs() == ([root / "out" / "run"], True)
    assert Places(root).find_runs(depth=9) == ([root / "out" / "run", root / "deep/a/b/c/run"], False)
    assert Places(root).find_runs(depth=9, most=1) == ([root / "out" / "run"], True)


def test_a_path_is_shown_as_it_would_be_typed(root: Path) -> None:
    """Relative to the root where it lies within; a name stays a name."""
    places = Places(root)
    assert places.shown(root / "out" / "run") == "out/run"
    assert places.shown("/elsewhere/run") == "/elsewhere/run"
    assert places.shown("org/name") == "org/name"
