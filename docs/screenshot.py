"""Take the READMEs' picture of a report: ``python docs/screenshot.py demo/report.html docs/report.png``.

Needs the extra ``dev`` and the system's chromium.
"""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def main() -> None:
    """Open the report in a small light window, and keep its first screens."""
    report, picture, *rest = sys.argv[1:]
    locale = rest[0] if rest else "en-US"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1120, "height": 1180}, locale=locale, color_scheme="light")
        page.goto(Path(report).resolve().as_uri())
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    main()
