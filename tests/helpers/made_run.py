"""Writes the folder of a run that never was: what a report may meet, without the time to train."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiment.files.predictions import Collector
from experiment.options.resolving import resolve

VERSIONS = {"jax": "0.0.1", "numpy": "0.0.2"}


def write(
    folder: Path,
    *,
    steps: int = 60,
    per_epoch: int = 20,
    class_names: tuple[str, ...] = tuple("0123456789"),
    shape: tuple[int, int, int] = (8, 8, 1),
    resumes: tuple[int, ...] = (),
    finished: bool = True,
    bounds: bool = False,
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write config.json, metrics.jsonl, log.txt; if it has `finished`, summary.json and predictions.npz."""
    rng = np.random.default_rng(seed)
    config = resolve({"model": "cnn", "seed": seed, **options})
    resolved = {
        "total_steps": steps if finished else 2 * steps,
        "schedule_steps": steps,
        "steps_per_epoch": per_epoch,
        "num_classes": len(class_names),
        "class_names": list(class_names),
        "image_shape": list(shape),
        "train_size": 640,
        "val_size": 64,
        "test_size": 8 * len(class_names),
    }
    sessions = [
        {
            "step": step,
            "time": "2026-01-02T03:04:05+0000",
            "command": ["--model", "cnn", *(["--resume"] if step else [])],
            "device": "1 x made",
            "cpu_count": 2,
            "python": "3.11.0",
            "platform": "Linux",
            "versions": VERSIONS,
            "git_commit": "0123456789abcdef0123456789abcdef01234567-dirty",
        }
        for step in (0, *resumes)
    ]
    lines = [line for step in range(1, steps + 1) for line in _lines(step, per_epoch, bounds, rng)]
    folder.mkdir(parents=True)
    if finished:
        test = _metrics(steps + 1, rng)
        lines.append(
            {"split": "test", "scope": "epoch", "step": steps, "epoch": -(-steps // per_epoch), **test}
        )
        summary = {"steps": steps, "test": test, "images_per_second": 120.0 + seed, "wall_seconds": 61.5}
        (folder / "summary.json").write_text(
            json.dumps({**summary, "compile_seconds": 1.5, "parameters": 82010})
        )
        collect(class_names, shape, rng).finish(steps, class_names).save(folder / "predictions.npz")
    record = {"config": dataclasses.asdict(config), "resolved": resolved, "sessions": sessions}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text(f"2026-01-02 03:04:05 {config.model}: <made>\n")
    return folder


def collect(class_names: tuple[str, ...], shape: tuple[int, int, int], rng: np.random.Generator) -> Collector:
    """Eight images of each class, of which about a tenth are mistaken."""
    k = len(class_names)
    labels = np.repeat(np.arange(k, dtype=np.int32), 8)
    logits = rng.normal(size=(len(labels), k)) + np.where(labels % 3, 6, 3)[:, None] * np.eye(k)[labels]
    images = rng.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    collector = Collector(len(labels))
    for start in range(0, len(labels), 30):
        part = slice(start, start + 30)
        collector.update(images[part], logits[part], labels[part])
    return collector


def _metrics(step: int, rng: np.random.Generator) -> dict[str, float]:
    loss = 2.3 / (1 + step / 10) * float(rng.uniform(0.8, 1.2))
    accuracy = 1 - loss / 3
    return {"loss": loss, "accuracy": accuracy, "f1": accuracy - 0.02, "top5": 1 - loss / 20}


def _lines(step: int, per_epoch: int, bounds: bool, rng: np.random.Generator) -> list[dict[str, Any]]:
    at = {"step": step, "epoch": -(-step // per_epoch)}
    norms = {"lr": 1e-3, "grad_norm": 9 / step, "update_norm": 0.1 / step}
    if bounds:
        norms |= {"lower_bound": 0.1 * step / (step + 1000), "upper_bound": 0.1 + 100 / step}
        norms |= {"at_lower": min(step / 100, 0.5), "at_upper": 0.3 / step}
    lines = [{"split": "train", "scope": "step", **at, **_metrics(step, rng), **norms}]
    if step % per_epoch == 0:
        lines += [
            {"split": split, "scope": "epoch", **at, **_metrics(step, rng)} for split in ("train", "val")
        ]
    return lines
