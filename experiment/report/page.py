"""Fill in the templates of this folder. Every value is escaped, and images are part of the page."""

import base64
import dataclasses
import io
import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiment.data.augmentation import image_of
from experiment.data.types import Pixels
from experiment.files.predictions import Predictions
from experiment.files.run_folder import short_commit
from experiment.options.resolving import resolve
from experiment.program import command
from experiment.reading import read_bytes
from experiment.report.figures import SHEETS, ReportFigure, caption, chosen
from experiment.report.reading import RunFiles
from experiment.report.tables import class_table, most_confused

LOG_BYTES = 30_000
CLASSES_IN_ORDER = 20
"""Most classes for which a table keeps their order; of more, the worst come first."""
SHARP = 64
"""Longer side, in pixels, up to which an image is shown without smoothing and stored without loss."""


def render(template: str, **values: Any) -> str:
    """Return the page of a template of this folder, filled in with `values`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (percent, ratio, duration, millions, value_words, data_uri, thumbnail_uri, short_commit)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(template).render(values)


def percent(value: float) -> str:
    """A ratio as percent."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def ratio(value: float | None) -> str:
    """A number with four digits, or a dash for what is not there or not finite."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"


def data_uri(content: bytes, kind: str) -> str:
    """An image of a kind such as "png" as the address that contains it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail_uri(pixels: Pixels) -> str:
    """An image [h, w, C] as the address that contains it: small ones as they are, others compressed."""
    file = io.BytesIO()
    image_of(pixels).save(file, "WEBP", lossless=max(pixels.shape) <= SHARP, quality=85)
    return data_uri(file.getvalue(), "webp")


def render_report(run: RunFiles, figures: Mapping[str, ReportFigure]) -> str:
    """The report of a run."""
    predictions = run.predictions
    log, log_cut = _log(run.folder / "log.txt")
    options, usual = dataclasses.asdict(run.config), dataclasses.asdict(resolve({}))
    return render(
        "report.html",
        title=f"{run.title}: {run.name}",
        run=run,
        state=state(run),
        summary=run.summary or {},
        commit=str(run.newest_session.get("git_commit") or ""),
        curves=[figures[name] for name in figures if name not in ("filters", "confusion", *SHEETS)],
        figures=figures,
        predictions=predictions,
        sessions=[(session, command_line(session)) for session in run.sessions],
        changed=[(name, value, usual[name]) for name, value in options.items() if value != usual[name]],
        options=[*options.items(), *run.resolved.items()],
        log=log,
        last_line=log.rstrip().rpartition("\n")[2] if not run.finished else "",
        log_cut=log_cut,
        **(_classes(predictions) if predictions is not None else {}),
    )


def state(run: RunFiles) -> str:
    """How far the run is, in words."""
    steps = f"step {run.step:,}"
    if run.step == 0:
        return "finished without a step: the network as it was initialized" if run.finished else "no step yet"
    if run.finished:
        return f"finished at {steps}"
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    return f"not finished: {steps}{total} is the last that is recorded"


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def millions(count: int) -> str:
    """A number of parameters, short."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def command_line(session: Mapping[str, Any]) -> str:
    """Return the command of a start or resume, as a shell takes it."""
    words = session.get("command")
    flags = shlex.join(map(str, words if isinstance(words, list) else ()))
    return f"{command('train')} {flags}".rstrip()


def value_words(value: Any) -> str:
    """An option's value as a person reads it."""
    if value is None or value in ((), []):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) if len(value) <= 20 else f"{' '.join(map(str, value[:20]))} ..."
    return json.dumps(value) if isinstance(value, dict) else str(value)


def _classes(predictions: Predictions) -> dict[str, Any]:
    """Return the part of the page that needs predictions."""
    table = class_table(predictions)
    many = len(table) > CLASSES_IN_ORDER
    if many:
        table.sort(key=lambda row: (math.isnan(row.f1), row.f1, row.name))
    samples, mistakes = chosen(predictions)
    return {
        "classes": table,
        "sorted": many,
        "confused": most_confused(predictions),
        "sheets": {"The most confident mistakes": mistakes, "Samples": samples},
        "caption": caption,
        "sharp": SHARP,
    }


def _log(path: Path) -> tuple[str, bool]:
    """The end of log.txt, and whether there is more of it."""
    try:
        content = read_bytes(path)
    except OSError:
        return "", False
    cut = len(content) > LOG_BYTES
    text = content[-LOG_BYTES:].decode(errors="replace")
    return (text.split("\n", 1)[-1] if cut else text), cut
