"""Take the image of a report in docs/reports.md, in Chromium: its results and first four curves.

    python docs/draw_report.py docs/report.png runs/RUN

Needs playwright of the extra `test`, and `apt-get install chromium`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from experiment.report import write_report
from experiment.report.style import save_reduced

WIDTH, SCALE = 1000, 1.5  # pixels of the page, and dots for each
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def draw(output: Path, run: Path) -> None:
    """Write the report of a run again, and the image of its top."""
    from playwright.sync_api import sync_playwright

    page_file, _ = write_report(run)
    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, PROGRAMS)))
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 800}, device_scale_factor=SCALE)
        page.goto(page_file.resolve().as_uri())
        end = page.evaluate("document.querySelectorAll('.plots figure')[3].getBoundingClientRect().bottom")
        clip: Any = {"x": 0, "y": 0, "width": WIDTH, "height": end + 10}
        content = page.screenshot(full_page=True, clip=clip)
        browser.close()
    save_reduced(content, output)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
