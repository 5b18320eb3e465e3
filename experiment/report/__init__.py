"""The report of a run, from the files of its folder alone: report/index.html, and its figures as PNG."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from experiment.files.run_folder import write_file
from experiment.report.figures import ALT, ReportFigure, draw
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
    return write_page(run_dir / FOLDER, render_report(run, figures), figures, ALT), figures


def write_page(folder: Path, page: str, figures: Mapping[str, ReportFigure], names: Iterable[str]) -> Path:
    """Write a page and its figures as PNG; remove figures of an earlier page that this one does not have.

    Args:
        folder: where; the folder above it must exist: that of a run is not made again where it was removed.
        page: HTML.
        figures: those of the page, by name.
        names: those that a page of this kind may have; other files in the folder are left alone.
    """
    folder.mkdir(exist_ok=True)
    for figure in figures.values():
        write_file(folder / f"{figure.name}.png", figure.png)
    for name in set(names) - figures.keys():
        (folder / f"{name}.png").unlink(missing_ok=True)
    index = folder / "index.html"
    write_file(index, page.encode())
    return index
