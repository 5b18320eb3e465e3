"""A report and a comparison in a real browser: every image loads, nothing logs an error or overflows."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import numpy_ref
from experiment.__main__ import main
from numpy_ref.layers import im2col
from tests.helpers import made_run

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parents[1]
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


def numbers_of(page: Any, name: str, cols: int) -> Any:
    """Return the numbers in a grid of docs/convolution.html."""
    return np.array([int(cell) for cell in page.locator(f"#{name} span").all_inner_texts()]).reshape(-1, cols)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_of_convolution_computes_as_numpy_ref_does(browser: Any, size: str, scheme: str) -> None:
    """By key, by click and by touch; forward, and backward with two overlapping patches."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=True
    )
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((ROOT / "docs" / "convolution.html").as_uri())
    x, w = numbers_of(page, "image", 8), numbers_of(page, "kernel", 3)
    layer = numpy_ref.Conv2d(1, 1, 3, rng=None, dtype=np.float64)
    layer.weight.value = w.reshape(3, 3, 1, 1).astype(float)
    y = layer.forward(x.reshape(1, 8, 8, 1).astype(float))[0, :, :, 0]
    patches = im2col(x.reshape(1, 8, 8, 1), (3, 3), (1, 1), (0, 0)).reshape(36, 9)
    np.testing.assert_array_equal(numbers_of(page, "y", 6), y)
    np.testing.assert_array_equal(numbers_of(page, "patches", 9), patches)
    page.keyboard.press("ArrowRight")
    assert page.locator("#sum").inner_text().startswith("y[2,3] = ")
    assert page.locator("#sum").inner_text().endswith(f" = {y[2, 3]:.0f}")
    page.locator("#y span").nth(1 * 6 + 4).tap()
    assert page.locator("#sum").inner_text().endswith(f" = {y[1, 4]:.0f}")
    lit = page.locator("#patches .lit").all_inner_texts()
    assert [int(number) for number in lit] == patches[1 * 6 + 4].tolist()
    page.locator("#backward").click()
    page.locator("#y span").nth(2 * 6 + 3).click()
    page.locator("#y span").nth(2 * 6 + 3).click()
    dy = np.zeros((6, 6))
    dy[1, 4], dy[2, 3] = 1, 2
    np.testing.assert_array_equal(numbers_of(page, "dy", 6), dy)
    dx = layer.backward(dy.reshape(1, 6, 6, 1))[0, :, :, 0]
    np.testing.assert_array_equal(numbers_of(page, "dx", 8), dx)
    np.testing.assert_array_equal(numbers_of(page, "dw", 3), layer.weight.grad[:, :, 0, 0])
    np.testing.assert_array_equal(numbers_of(page, "patches", 9), dy.reshape(36, 1) * w.reshape(1, 9))
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert errors == []
    context.close()


def test_the_image_of_a_report_in_the_documents_can_be_taken(tmp_path: Path) -> None:
    docs = Path(__file__).parents[1] / "docs"
    run = made_run.write(tmp_path / "run", bounds=True, optimizer="adabound")
    # In a process of its own: two of Playwright's loops cannot run in one
    command = [sys.executable, str(docs / "draw_report.py"), str(tmp_path / "report.png"), str(run)]
    subprocess.run(command, check=True, cwd=docs.parent, timeout=120)
    with Image.open(tmp_path / "report.png") as made, Image.open(docs / "report.png") as committed:
        assert made.width == committed.width
    assert (docs / "report.png").stat().st_size < 150_000
