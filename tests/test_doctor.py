"""What ``doctor`` says of this machine and of what is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util

import pytest

import tunesmith as ts


def test_versions_are_those_of_the_installed_packages() -> None:
    """Every core package with its version, and figures that can be true."""
    health = ts.doctor(dtype="fp32")
    assert health.versions["numpy"] == importlib.metadata.version("numpy")
    assert health.compute.dtype == "float32"
    assert health.cores >= 1
    assert 0 < health.free_memory_bytes <= health.memory_bytes
    assert ts.Health.model_validate_json(health.to_json()) == health


def test_missing_extra_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there is named, and what to type."""
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "trl" else real(name, *rest))
    extra = next(extra for extra in ts.doctor(dtype="fp32").extras if extra.name == "train")
    assert extra.missing == ("trl",)
    assert extra.install == 'pip install "tunesmith[train]"'


def test_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, not an exception."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "accelerate":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert ts.doctor(dtype="fp32").versions["accelerate"] is None
