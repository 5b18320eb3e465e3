"""Hooks of MkDocs for what the site has beyond `docs/`: pages of the tree's root, notebooks, equations.

The Markdown files are written for a reader of the tree, with links between files of the tree. Here a link to
a page or a file of the site leads there, and a link to any other file becomes the file's path. An equation
becomes MathML, which browsers draw themselves.
"""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "benchmarks/RESULTS.md": "benchmarks/RESULTS.md",
    "benchmarks/HISTORY.md": "benchmarks/HISTORY.md",
    "weights/README.md": "weights/README.md",
    **{
        f"docs/notebooks/{path.name}": f"notebooks/{path.stem}.md"
        for path in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
    },
}
"""Files of the tree that become pages, and the name of each on the site. A file `docs/X` is X there."""

# A block or span of code, which stays as it is, or a link or an image.
LINK = re.compile(
    r"^```.*?^```|`[^`\n]*`|(?P<text>\[[^\]]*\])\((?P<path>[^)\s#]+)(?P<anchor>[^)\s]*)\)", re.S | re.M
)
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are not in `docs/`."""
    for source, name in PAGES.items():
        text = (ROOT / source).read_text("utf-8")
        if source.endswith(".ipynb"):
            text, images = notebook_page(source, text)
            for image, content in images.items():
                files.append(File.generated(config, f"notebooks/{image}", content=content))
        files.append(File.generated(config, name, content=text))
    return files


def notebook_page(source: str, text: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its figures: {file name: PNG}."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in json.loads(text)["cells"]:
        content = "".join(cell["source"])
        parts.append(f"```python\n{content}\n```" if cell["cell_type"] == "code" else content)
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                name = f"{Path(source).stem}-{len(images)}.png"
                images[name] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![Output of the cell above]({name})")
    parts.insert(1, f"The notebook itself, to be run: `{source}`.")
    return "\n\n".join(parts), images


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Resolve links as in the tree, and let Markdown stand in the cells of HTML tables."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["toc"]  # two programs stand side by side
    source = next((path for path, name in PAGES.items() if name == here), f"docs/{here}")

    def resolved(link: re.Match[str]) -> str:
        path = link["path"]
        if path is None or ":" in path:
            return link[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        name = PAGES.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is None:
            return f"`{path}`"
        return f"{link['text']}({posixpath.relpath(name, posixpath.dirname(here) or '.')}{link['anchor']})"

    return re.sub(r"<(table|tr|td)>", r'<\1 markdown="block">', LINK.sub(resolved, markdown))


def on_page_content(content: str, **_: object) -> str:
    """Turn each equation, which MkDocs leaves in LaTeX, into MathML."""
    return EQUATION.sub(lambda match: mathml(html.unescape(match[2]), match[1] == "div"), content)


def mathml(latex: str, block: bool) -> str:
    """Return an equation as MathML. `align*` is the name by which latex2mathml knows `aligned`."""
    latex = re.sub(r"(\\(?:begin|end)){aligned}", r"\1{align*}", latex)
    result: str = convert(latex, display="block" if block else "inline")
    return result
