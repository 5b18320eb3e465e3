"""The report of a run, from the files of its folder alone: report/index.html, and its figures as PNG."""

from collections.abc import Mapping
from pathlib import Path

from experiment.files.run_folder import write_file
from experiment.report.figures import ReportFigure, draw
from experiment.report.page import render_report
from experiment.report.reading import read_run

FOLDER = "report"


def write_report(run_dir: Path) -> tuple[Path, dict[str, ReportFigure]]:
    """Write the report of a run, finished or not; returns the page and the figures in it.

    Raises:
        UserError: `run_dir` is not the folder of a run.
        OSError: the report cannot be written.
    """
    run = read_run(run_dir)
    figures = draw(run)
    return write_page(run_dir / FOLDER, render_report(run, figures), figures), figures


def write_page(folder: Path, page: str, figures: Mapping[str, ReportFigure]) -> Path:
    """Write a page and its figures as PNG; remove figures of an earlier page that this one does not have.

    The folder above `folder` must exist: that of a run, which is not made again where it was removed.
    """
    folder.mkdir(exist_ok=True)
    for figure in figures.values():
        write_file(folder / f"{figure.name}.png", figure.png)
    for path in folder.glob("*.png"):
        if path.stem not in figures:
            path.unlink()
    index = folder / "index.html"
    write_file(index, page.encode())
    return index
