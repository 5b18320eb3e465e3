"""Fill in the templates of this folder. Every value is escaped, and images are part of the page."""

from __future__ import annotations

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
from experiment.options.config import Config
from experiment.options.resolving import resolve
from experiment.report.figures import SHEETS, ReportFigure, caption, chosen
from experiment.report.reading import RunFiles
from experiment.report.tables import class_table, most_confused

LOG_BYTES = 30_000
CLASSES_IN_ORDER = 20
"""Classes up to which their table keeps their order; of more, the worst come first."""
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
    filters = {"percent": percent, "ratio": ratio, "svg_uri": svg_uri, "png_uri": png_uri}
    environment.filters |= {**filters, "commit": short_commit}
    return environment.get_template(template).render(values)


def percent(value: float) -> str:
    """A ratio as percent."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def ratio(value: float | None) -> str:
    """A number with four digits, or a dash for what is not there or not finite."""
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "–"


def svg_uri(content: bytes) -> str:
    """An SVG figure as the address that contains it."""
    return "data:image/svg+xml;base64," + base64.b64encode(content).decode()


def png_uri(content: bytes) -> str:
    """A PNG image as the address that contains it."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def thumbnail_uri(pixels: Pixels) -> str:
    """An image [h, w, C] as the address that contains it: small ones as they are, others compressed."""
    file = io.BytesIO()
    image_of(pixels).save(file, "WEBP", lossless=max(pixels.shape) <= SHARP, quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def render_report(run: RunFiles, figures: Mapping[str, ReportFigure]) -> str:
    """The report of a run."""
    predictions = run.predictions
    newest = run.sessions[-1] if run.sessions else {}
    commit = str(newest.get("git_commit") or "")
    log, log_cut = _log(run.folder / "log.txt")
    return render(
        "report.html",
        title=f"{run.title}: {run.name}",
        run=run,
        state=state(run),
        sizes=_sizes(run),
        tiles=_tiles(run),
        commit=commit.removesuffix("-dirty"),
        dirty=commit.endswith("-dirty"),
        curves=[figures[name] for name in figures if name not in ("filters", "confusion", *SHEETS)],
        figures=figures,
        predictions=predictions,
        stale=predictions is not None and predictions.step != run.step,
        versions=newest.get("versions") or {},
        sessions=[_session(session) for session in run.sessions],
        changed=_changed(run.config),
        options=[(name, value_words(value)) for name, value in _options(run)],
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


def _tiles(run: RunFiles) -> list[dict[str, str]]:
    """The numbers at the top."""
    tiles: list[dict[str, str]] = []

    def add(name: str, value: str, note: str = "") -> None:
        tiles.append({"name": name, "value": value, "note": note})

    test, best, train = run.last("test"), run.best, run.last("train")
    if test:
        for name, key in (("test accuracy", "accuracy"), ("test macro F1", "f1"), ("test top-5", "top5")):
            add(name, ratio(test.get(key)))
        add("test loss", ratio(test.get("loss")))
    if best:
        note = f"step {best['step']:,}, loss {ratio(best.get('loss'))}"
        add("best validation", ratio(best.get("accuracy")), note)
    if train and not test:
        add("training accuracy", ratio(train.get("accuracy")), f"epoch {train.get('epoch')}")
    summary = run.summary or {}
    if isinstance(speed := summary.get("images_per_second"), float) and speed:
        add("speed", f"{speed:,.0f}", "training images a second")
    if isinstance(seconds := summary.get("wall_seconds"), float):
        before = summary.get("compile_seconds")
        note = f"{duration(before)} before the first step" if isinstance(before, float) else ""
        add("time", duration(seconds), note)
    if isinstance(count := summary.get("parameters"), int):
        frozen = summary.get("frozen_parameters")
        add("parameters", millions(count), f"{frozen:,} frozen" if frozen else "")
    return tiles


def _sizes(run: RunFiles) -> str:
    train, val, test = (run.resolved.get(f"{part}_size") for part in ("train", "val", "test"))
    shape = "x".join(map(str, run.resolved.get("image_shape") or ()))
    return f"{train} training, {val} validation and {test} test images of {shape}."


def duration(seconds: float) -> str:
    """Seconds in the unit that fits."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def millions(count: int) -> str:
    """A number of parameters, short."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _session(session: Mapping[str, Any]) -> dict[str, Any]:
    names = ("step", "time", "device", "cpu_count", "python", "platform", "git_commit")
    command = session.get("command")
    words = map(str, command) if isinstance(command, list) else ()
    return {
        **{name: session.get(name) for name in names},
        "command_line": shlex.join(["python", "train.py", *words]),
    }


def _changed(config: Config) -> list[dict[str, str]]:
    """Return the options that are not at their defaults."""
    usual = dataclasses.asdict(resolve({}))
    return [
        {"name": name, "value": value_words(value), "default": value_words(usual[name])}
        for name, value in dataclasses.asdict(config).items()
        if value != usual[name]
    ]


def _options(run: RunFiles) -> list[tuple[str, Any]]:
    return [*dataclasses.asdict(run.config).items(), *run.resolved.items()]


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
    _, height, width, _ = predictions.images.shape
    return {
        "classes": table,
        "sorted": many,
        "confused": most_confused(predictions),
        "sheets": [
            ("The most confident mistakes", [_thumbnail(predictions, k) for k in mistakes]),
            ("Samples", [_thumbnail(predictions, k) for k in samples]),
        ],
        "pixels": max(height, width) <= SHARP,
        "width": width,
        "height": height,
    }


def _thumbnail(predictions: Predictions, k: int) -> dict[str, Any]:
    true, predicted, confidence = caption(predictions, k)
    return {
        "uri": thumbnail_uri(predictions.images[k]),
        "index": int(predictions.shown[k]),
        "true": true,
        "predicted": predicted,
        "right": true == predicted,
        "confidence": confidence,
    }


def _log(path: Path) -> tuple[str, bool]:
    """The end of log.txt, and whether there is more of it."""
    try:
        content = path.read_bytes()
    except OSError:
        return "", False
    cut = len(content) > LOG_BYTES
    text = content[-LOG_BYTES:].decode(errors="replace")
    return (text.split("\n", 1)[-1] if cut else text), cut
