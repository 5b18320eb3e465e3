"""A training run of an engine, through the engines' interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.parity.case import CLASSES, Case, Inputs, Results, group

TRAINING = ("optimizer", "optimizer_options", "learning_rate", "steps", "engine_options")


def run_engine(make: Callable[..., Any], case: Case, inputs: Inputs, **options: Any) -> Results:
    """Losses and logits of every step; parameters, moments and statistics after the last."""
    model_options = {k: v for k, v in case.options.items() if k not in ("model", *TRAINING)}
    rates = inputs["rates"]
    engine = make(
        model=case.options["model"],
        model_options=model_options,
        num_classes=CLASSES,
        image_shape=case.shape[1:],
        mean=(0.0,) * case.shape[-1],
        std=(1.0,) * case.shape[-1],
        optimizer=case.options["optimizer"],
        optimizer_options={"base_lr": case.options["learning_rate"], **case.options["optimizer_options"]},
        learning_rate=lambda step: float(rates[step]),
        precision="float64",
        **case.options.get("engine_options", {}),
        **options,
    )
    tree = engine.to_tree(engine.init())
    weights = group(inputs, "state")
    for part in ("params", "batch_stats"):
        tree[part] = {name: weights[name] for name in tree[part]}

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for step in range(len(rates)):
            index = step % len(inputs["images"])
            batch = {"image": inputs["images"][index], "label": inputs["labels"][index]}
            yield {**batch, "drop_path": inputs["keep"][step]} if "keep" in inputs else batch

    losses, logits = [], []
    for after, metrics in engine.train(engine.from_tree(tree), batches()):
        state = after
        losses.append(float(metrics["loss"]))
        logits.append(np.array(metrics["logits"]))
    return {"loss": np.array(losses), "logits": np.stack(logits), **_flat(engine.to_tree(state))}


def _flat(tree: dict[str, Any]) -> Results:
    """The tree under the names of `torch_side.after_training`, but for the counts of steps."""
    results = {f"value.{name}": array for name, array in tree["params"].items()}
    for field, arrays in tree["optimizer"].items():
        if isinstance(arrays, dict):
            results |= {f"{field}.{name}": array for name, array in arrays.items()}
    for part in tree.get("ema", {}).values():
        results |= {f"average.{name}": array for name, array in part.items()}
    return results | {f"after.{name}": array for name, array in tree["batch_stats"].items()}
