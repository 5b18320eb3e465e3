"""Write the results of studies into docs/adabound.md: python docs/fill_adabound.py runs/study-NAME ..."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.study.tables import head, in_markdown, tables

FOLDER = Path(__file__).parent


def section(folder: Path) -> tuple[str, str]:
    """The name of a study and its part of the document; its JSON and pictures are copied beside that."""
    study = json.loads((folder / "study.json").read_text(encoding="utf-8"))
    name = study["name"]
    kept = FOLDER / "studies"
    kept.mkdir(exist_ok=True)
    shutil.copy(folder / "study.json", kept / f"{name}.json")
    parts = [f"### {name}", f"{head(study)} All numbers: [{name}.json](studies/{name}.json)."]
    for path in sorted(folder.glob("curves*.png")):
        shutil.copy(path, kept / f"{name}-{path.name}")
        parts.append(f"![Curves of the study {name}](studies/{name}-{path.name})")
    return name, "\n\n".join([*parts, *(in_markdown(table, "####") for table in tables(study))])


def main(folders: Sequence[str]) -> None:
    """Fill in the parts of these studies; the others stay as they are."""
    document = FOLDER / "adabound.md"
    text = document.read_text(encoding="utf-8")
    for folder in folders:
        name, part = section(Path(folder))
        mark = f"<!-- study {name} -->"
        if mark not in text:
            sys.exit(f"{document} has no place for {name}: write {mark} and <!-- end --> where it is to be")
        before, _, rest = text.partition(mark)
        inside, end, after = rest.partition("<!-- end -->")
        if not end or "<!-- study" in inside:
            sys.exit(f"{document}: after {mark} there is no <!-- end -->; write it")
        text = f"{before}{mark}\n\n{part}\n\n{end}{after}"
    document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
