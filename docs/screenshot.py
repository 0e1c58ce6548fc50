"""Take the READMEs' pictures; needs the extra ``dev`` and the system's chromium.

    python docs/screenshot.py report demo/report.html docs/report.png [zh-CN]
    python docs/screenshot.py page demo/run docs/page.png [zh-CN]

The first is the top of a report, the second the page with base and tuned model side by side.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

CHROMIUM = "/usr/bin/chromium"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
QUESTION = "I always rush when the metronome is switched off."
MINUTES = 300_000  # milliseconds


def take_report(browser: Browser, report: str, picture: str, locale: str) -> None:
    """Open the report in a small light window, and keep its first screens."""
    page = browser.new_page(viewport={"width": 1120, "height": 1180}, locale=locale, color_scheme="light")
    page.goto(Path(report).resolve().as_uri())
    page.screenshot(path=picture)


def take_page(browser: Browser, run: str, picture: str, locale: str) -> None:
    """Serve the run, let both answer one question, and keep what is seen then."""
    place = Path(run).resolve()
    command = [sys.executable, "-m", "tunesmith", "web", str(place), "--root", str(place.parent), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:  # noqa: S603 - our own program
        try:
            address = server.stdout.readline().strip() if server.stdout else ""
            page = browser.new_page(viewport={"width": 1280, "height": 860}, locale=locale, color_scheme="light")
            page.goto(f"{address}#/compare?run={place.name}&variants=base,final")
            page.get_by_test_id("set-greedy").check(force=True)
            page.get_by_test_id("compare-input").fill(QUESTION)
            page.get_by_test_id("compare-run").click()
            page.get_by_test_id("compare-stop").wait_for()
            page.get_by_test_id("compare-run").wait_for(timeout=MINUTES)
            page.get_by_test_id("compare-cell").first.scroll_into_view_if_needed()
            page.screenshot(path=picture)
        finally:
            server.terminate()


def main() -> None:
    """Read the command line."""
    what, source, picture, *rest = sys.argv[1:]
    take = {"report": take_report, "page": take_page}[what]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        take(browser, source, picture, rest[0] if rest else "en-US")
        browser.close()


if __name__ == "__main__":
    main()
