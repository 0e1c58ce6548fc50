"""What is kept of memory."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tunesmith.allocator import keep_few_kernels

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# Products of 200 lengths, each a kernel of its own; the second time, one that was let go is compiled anew.
PRODUCTS = """
import torch
from tunesmith.allocator import keep_few_kernels
keep_few_kernels()
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for _ in range(2):
    for length in range(1, 201):
        torch.ones(length, 64, dtype=torch.bfloat16) @ weight
"""


def test_user_says_how_many_kernels_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number that is set stays."""
    monkeypatch.setenv(CAPACITY, "7")
    keep_few_kernels()
    assert os.environ[CAPACITY] == "7"


@pytest.mark.parametrize("asked", [None, "1024"])
def test_few_kernels_are_kept(asked: str | None) -> None:
    """oneDNN, asked by torch, compiles again what it let go; with its own number it keeps all."""
    environment = {key: value for key, value in os.environ.items() if key != CAPACITY}
    environment |= {"ONEDNN_VERBOSE": "profile_create"} | ({} if asked is None else {CAPACITY: asked})
    command = [sys.executable, "-c", PRODUCTS]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    if "matmul" not in told:
        pytest.skip("on this processor torch asks oneDNN for no product")
    compiled = told.count("create:cache_miss")
    assert compiled >= 350 if asked is None else compiled <= 210
