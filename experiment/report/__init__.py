"""The report of a run, from the files of its folder alone: report/index.html, and its pictures as PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from experiment.files.run_folder import write_file
from experiment.report.page import render_report
from experiment.report.pictures import Picture, draw
from experiment.report.reading import read_run

FOLDER = "report"


def write_report(run_dir: Path) -> tuple[Path, dict[str, Picture]]:
    """Write the report of a run, finished or not; returns the page and the pictures in it.

    Raises:
        UserError: `run_dir` is not the folder of a run.
        OSError: the report cannot be written.
    """
    run = read_run(run_dir)
    pictures = draw(run)
    return write_page(run_dir / FOLDER, render_report(run, pictures), pictures), pictures


def write_page(folder: Path, page: str, pictures: Mapping[str, Picture]) -> Path:
    """Write a page and its figures as PNG; remove figures of an earlier page that this one does not have.

    The folder above `folder` must exist: that of a run, which is not made again where it was removed.
    """
    folder.mkdir(exist_ok=True)
    for picture in pictures.values():
        write_file(folder / f"{picture.name}.png", picture.png)
    for path in folder.glob("*.png"):
        if path.stem not in pictures:
            path.unlink()
    index = folder / "index.html"
    write_file(index, page.encode())
    return index
