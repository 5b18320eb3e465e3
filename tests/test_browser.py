"""A report and a comparison in a real browser: every image loads, nothing logs an error or overflows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from experiment.__main__ import main
from tests.helpers import made_run

pytestmark = pytest.mark.browser

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
HOSTILE = "<script>alert(1)</script>"
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The Chromium of this machine."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip(f"needs one of {', '.join(PROGRAMS)}: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Reports of a whole run, of one that was killed, of one with many classes; a comparison of the three."""
    folder = tmp_path_factory.mktemp("runs")
    many = tuple(f"A Maker And A Long Model Name {n} Convertible 2012" for n in range(195))
    runs = [
        made_run.write(folder / "whole", resumes=(30,), bounds=True, optimizer="adabound"),
        made_run.write(folder / "killed", finished=False),
        made_run.write(folder / "many", class_names=(HOSTILE, *many), shape=(64, 96, 3), seed=1),
    ]
    assert main(["report", *map(str, runs)]) == 0
    assert main(["compare", *map(str, runs), "--out", str(folder / "comparison")]) == 0
    found = {run.name: run / "report" / "index.html" for run in runs}
    return {**found, "comparison": folder / "comparison" / "index.html"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["whole", "killed", "many", "comparison"])
def test_a_page(browser: Any, pages: dict[str, Path], name: str, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    messages: list[str] = []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("dialog", lambda dialog: messages.append("a dialog"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(pages[name].as_uri())
    assert messages == []
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    images = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth > 0])")
    assert len(images) >= 5
    assert [alt for alt, loaded in images if not loaded] == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
    context.close()


def test_a_curve_has_the_colours_of_light_and_of_dark(browser: Any, pages: dict[str, Path]) -> None:
    """The images, too: one file, drawn in the reader's colors."""
    drawn = {}
    for scheme in ("light", "dark"):
        context = browser.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(pages["whole"].as_uri())
        drawn[scheme] = page.locator("img").first.screenshot()
        context.close()
    assert drawn["light"] != drawn["dark"]


def test_the_image_of_a_report_in_the_documents_can_be_taken(tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    run = made_run.write(tmp_path / "run", bounds=True, optimizer="adabound")
    # In a process of its own: two of Playwright's loops cannot run in one
    command = [sys.executable, str(docs / "draw_report.py"), str(tmp_path / "report.png"), str(run)]
    subprocess.run(command, check=True, cwd=docs.parent, timeout=120)
    with Image.open(tmp_path / "report.png") as made, Image.open(docs / "report.png") as committed:
        assert made.width == committed.width
    assert (docs / "report.png").stat().st_size < 150_000
