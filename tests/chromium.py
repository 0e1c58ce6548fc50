"""The system's chromium, and what is asked of every page that it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")
CJK = re.compile(r"[\u2e80-\u9fff\uf900-\ufaff\uff00-\uffef]")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OWN_TEXT = """() => {
  const parts = [];
  const walk = (node) => {
    if (node.nodeType === Node.TEXT_NODE) { parts.push(node.textContent); return; }
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    if (node.matches('.model-text, .verbatim, [data-switch=lang], [data-testid=lang], script, style')) return;
    if (getComputedStyle(node).display === 'none') return;
    node.childNodes.forEach(walk);
  };
  walk(document.body);
  return parts.join('\\n');
}"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

NEEDS_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs the system's chromium at /usr/bin/chromium"),
]
