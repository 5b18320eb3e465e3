"""The documentation site: built without a warning, every link leads somewhere, nothing is on another host."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.site

ROOT = Path(__file__).parents[1]


class Reader(HTMLParser):
    """Collects from a page its `links` (of anchors), `resources` (what a browser loads), `ids` and `text`."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.resources: list[str] = []
        self.ids: set[str] = set()
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.add(value or "")
            elif name == "href" and tag == "a":
                self.links.append(value or "")
            elif name in ("href", "src", "data", "poster"):
                self.resources.append(value or "")
            elif name == "srcset":
                self.resources += [part.split()[0] for part in (value or "").split(",")]
            elif name == "style":
                self.resources += addresses(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def addresses(sheet: str) -> list[str]:
    """Return what a style sheet loads."""
    sheet = re.sub(r"/\*.*?\*/", "", sheet, flags=re.S)
    return re.findall(r"""url\(\s*["']?([^"')]+)""", sheet) + re.findall(r"""@import\s*["']([^"']+)""", sheet)


def is_elsewhere(address: str) -> bool:
    """True for an address on another host; `data:` addresses hold their content."""
    return bool(urlsplit(address).netloc)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, as `mkdocs build --strict` makes it; with `--quiet` warnings would not count."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Reader]:
    return {path: Reader(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def test_the_site_has_every_page(site: Path, pages: dict[Path, Reader]) -> None:
    """Documents of `docs/` and of the root, notebooks with their figures, the interactive page, the API."""
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    sources += [path.relative_to(ROOT / "docs") for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")]
    sources += [
        Path("index"),
        Path("CONTRIBUTING"),
        Path("CHANGELOG"),
        Path("benchmarks/RESULTS"),
        Path("convolution"),
    ]
    expected = {site / source.with_suffix(".html") for source in sources}
    assert expected <= pages.keys()
    home = pages[site / "index.html"]
    for path in expected - {site / "weights" / "index.html"}:  # by the navigation
        assert path.relative_to(site).as_posix() in home.links or path.name == "index.html"
    for notebook in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        reader = pages[site / "notebooks" / f"{notebook.stem}.html"]
        assert f"{notebook.stem}-0.png" in reader.resources
    assert {"numpy_ref.layers.Conv2d.backward", "jax_resnet.layers.Conv2d"} <= pages[
        site / "api/layers.html"
    ].ids
    assert "Raises" in pages[site / "api/gradients.html"].text


def test_links_of_the_site_lead_to_a_page_and_a_heading(site: Path, pages: dict[Path, Reader]) -> None:
    errors = []
    for page, reader in pages.items():
        if page.name == "404.html":  # its links start at the root of a server
            continue
        for address in reader.links + reader.resources:
            path, anchor = unquote(urlsplit(address).path), urlsplit(address).fragment
            if urlsplit(address).scheme or is_elsewhere(address):
                continue
            target = (page.parent / path).resolve() if path else page
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].ids):
                errors.append(f"{page.relative_to(site)}: {address}")
    assert not errors, "\n".join(errors)


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Reader]) -> None:
    loaded = [(page, address) for page, reader in pages.items() for address in reader.resources]
    sheets = {path: addresses(path.read_text("utf-8")) for path in site.rglob("*.css")}
    assert len(sheets) >= 3
    loaded += [(sheet, address) for sheet, found in sheets.items() for address in found]
    loaded += [(page, address) for page in pages for address in styles(page.read_text("utf-8"))]
    assert len(loaded) > 100
    assert [f"{path.relative_to(site)}: {address}" for path, address in loaded if is_elsewhere(address)] == []
    for page in pages:  # the theme loads this library where a page has its diagrams
        assert 'class="mermaid"' not in page.read_text("utf-8")


def styles(page: str) -> list[str]:
    """Return what the <style> elements of a page load."""
    return [
        address
        for sheet in re.findall(r"<style[^>]*>(.*?)</style>", page, re.S)
        for address in addresses(sheet)
    ]


def test_an_address_on_another_host_would_be_noticed() -> None:
    reader = Reader(
        '<script src="//a.org/a.js"></script><link href="https://b.org/b.css">'
        '<img src="data:image/png;base64,//8="><img srcset="c.png 1x, http://d.org/d.png 2x">'
        '<i style="background: url(https://e.org/e.png)"></i>'
    )
    hosts = [urlsplit(address).netloc for address in reader.resources if is_elsewhere(address)]
    assert hosts == ["a.org", "b.org", "d.org", "e.org"]
    sheet = "@import 'https://f.org/f.css'; a { src: url(\"https://g.org/g.woff\") } /* url(https://h.org) */"
    hosts = [urlsplit(address).netloc for address in styles(f"<style>{sheet}</style>")]
    assert sorted(hosts) == ["f.org", "g.org"]


def test_equations_are_drawn_and_code_is_left_alone(site: Path, pages: dict[Path, Reader]) -> None:
    for path, reader in pages.items():
        page = path.read_text("utf-8")
        assert "arithmatex" not in page, path
        assert "```" not in reader.text, path
        assert "<blockquote" not in page, path  # ">>>" outside a section Examples
        assert "<mi>&</mi>" not in page, path  # how an unknown environment, such as `aligned`, comes out
    source = (ROOT / "docs" / "adabound.md").read_text("utf-8")
    page = (site / "adabound.html").read_text("utf-8")
    assert page.count('display="block"') == source.count("\n\n$$") == 3
    assert not re.search(r"[$\\]", pages[site / "adabound.html"].text.partition("__config")[0])
    blocks = (ROOT / "docs" / "tour.md").read_text("utf-8").count("\n```python\n")
    assert (site / "tour.html").read_text("utf-8").count('class="language-python highlight"') == blocks


def test_examples_of_docstrings_are_code(site: Path) -> None:
    """In a section that is not named `Examples:`, `>>>` becomes a quotation."""
    for page in (site / "api").glob("*.html"):
        assert "<blockquote>" not in page.read_text("utf-8"), page.name
