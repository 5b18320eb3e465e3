"""Write docs/studies/NAME.md, the tables of a study.

python docs/fill_adabound.py runs/study-NAME ...   # copy the results of studies, then write their pages
python docs/fill_adabound.py                       # write every page again, from docs/studies/*.json

Figures of results and rates are drawn from the JSON. Curves need the runs, and are copied with the results.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from experiment.study.curves import draw_numbers
from experiment.study.tables import head, in_markdown, tables

FOLDER = Path(__file__).parent / "studies"
FIGURES = {
    "Test results": "results.png",
    "Validation accuracy against the learning rate": "rates.png",
    "Curves": "curves*.png",
}


def copy_results(study_folder: Path) -> str:
    """Copy a study's JSON and curves into docs/studies, and return the study's name."""
    name = json.loads((study_folder / "study.json").read_text(encoding="utf-8"))["name"]
    FOLDER.mkdir(exist_ok=True)
    shutil.copy(study_folder / "study.json", FOLDER / f"{name}.json")
    for path in sorted(study_folder.glob("curves*.png")):
        shutil.copy(path, FOLDER / f"{name}-{path.name}")
    return str(name)


def page(name: str) -> str:
    """Return the page of a study, made from its JSON and curves in docs/studies."""
    study = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    parts = [
        f"# Study: {name}",
        f"`python docs/fill_adabound.py` writes this page. What the study asks: `studies/{name}.toml`. "
        "Answers: [adabound.md](../adabound.md#results); "
        "of `recipe-pieces`: [training.md](../training.md#recipes).",
        f"{head(study)} All numbers: [{name}.json]({name}.json).",
        *(
            f"![{words} of the study {name}]({path.name})"
            for words, pattern in FIGURES.items()
            for path in sorted(FOLDER.glob(f"{name}-{pattern}"))
        ),
        *(in_markdown(table, "##") for table in tables(study)),
    ]
    return "\n\n".join(parts) + "\n"


def main(study_folders: Sequence[str]) -> None:
    """Write the pages of these studies; without any, those of all studies in docs/studies."""
    names = [copy_results(Path(folder)) for folder in study_folders]
    for name in names or sorted(path.stem for path in FOLDER.glob("*.json")):
        draw_numbers(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")), FOLDER, f"{name}-")
        (FOLDER / f"{name}.md").write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
