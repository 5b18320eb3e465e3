"""Guess an optimizer's equation from its settings. A guess counts only if it reproduces the steps."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from parity.optimizer_causes import Update


def torch_hint(optimizer: Any) -> list[Update]:
    """A guess from the param groups of a PyTorch optimizer; empty if its settings are of another kind."""
    groups = getattr(optimizer, "param_groups", None)
    if not groups:
        return []
    settings = {**optimizer.defaults, **groups[0]}
    decays = [float(group.get("weight_decay", 0.0)) for group in groups]
    decay = "none"
    if any(decays):
        adamw = type(optimizer).__name__ == "AdamW"
        decay = "decoupled" if settings.get("decoupled_weight_decay", adamw) else "coupled"
    u = Update(decay=decay, mask="all" if all(decays) else "matrices", eps=settings.get("eps", 1e-8))
    u = replace(u, weight_decay=max(decays) or u.weight_decay, mask=u.mask if any(decays) else "all")
    if "betas" in settings:
        b1, b2 = settings["betas"]
        maximum = "raw" if settings.get("amsgrad") else "none"
        nesterov = "scheduled" if "momentum_decay" in settings else "none"
        u = replace(u, first="ema", second="ema", correct1=True, correct2=True, b1=b1, b2=b2)
        return [replace(u, maximum=maximum, nesterov=nesterov)]
    momentum = settings.get("momentum", 0.0)
    if momentum:
        nesterov = "plain" if settings.get("nesterov") else "none"
        dampening = settings.get("dampening", 0.0)
        first = "dampened" if dampening else "sum"
        u = replace(u, first=first, b1=momentum, nesterov=nesterov, dampening=dampening or u.dampening)
    if "alpha" in settings:
        centered = bool(settings.get("centered"))
        return [replace(u, second="ema", b2=settings["alpha"], centered=centered, after=bool(momentum))]
    if "initial_accumulator_value" in settings:
        return [replace(u, second="sum", initial=settings["initial_accumulator_value"])]
    return [u] if "dampening" in settings else []


def pieces(transformation: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Name and settings of each transformation in a chain of optax: "scale_by_adam", {"b1": 0.9, ...}."""
    update = getattr(transformation, "update", transformation)
    if not inspect.isfunction(update):
        return
    settings = inspect.getclosurevars(update).nonlocals
    init = getattr(transformation, "init", None)
    initial = inspect.getclosurevars(init).nonlocals if inspect.isfunction(init) else {}
    yield update.__qualname__.split(".")[0], {**initial, **settings}
    for value in settings.values():
        parts = value if isinstance(value, (tuple, list)) and not hasattr(value, "update") else [value]
        for part in parts:
            yield from pieces(part)


def optax_hint(transformation: Any) -> list[Update]:
    """A guess from the closures of an optax transformation; empty if none of its parts is known."""
    u, rate_applied, known = Update(), False, False
    for name, s in pieces(transformation):
        known = True
        match name:
            case "scale_by_adam" | "scale_by_amsgrad":
                correct1, correct2 = (
                    bool(s.get("bias_correction_mu", True)),
                    bool(s.get("bias_correction_nu", True)),
                )
                u = replace(u, first="ema", second="ema")
                u = replace(u, correct1=correct1, correct2=correct2, b1=s["b1"], b2=s["b2"])
                u = replace(
                    u, eps=s["eps"], eps_root=s["eps_root"], nesterov="plain" if s.get("nesterov") else "none"
                )
                if name == "scale_by_amsgrad":
                    u = replace(u, maximum="corrected" if correct2 else "uncorrected")
            case "scale_by_rms" | "scale_by_stddev":
                place = "inside" if s["eps_in_sqrt"] else "outside"
                u = replace(u, second="ema", b2=s["decay"], eps=s["eps"], eps_place=place)
                u = replace(
                    u,
                    initial=s["initial_scale"],
                    correct2=bool(s["bias_correction"]),
                    centered=name == "scale_by_stddev",
                )
            case "scale_by_rss":
                u = replace(u, second="sum", eps=s["eps"], eps_place="inside")
                u = replace(u, initial=s["initial_accumulator_value"])
            case "trace":
                nesterov = "plain" if s["nesterov"] else "none"
                u = replace(u, first="sum", b1=s["decay"], nesterov=nesterov)
                u = replace(u, after=u.second != "none", rate_inside=rate_applied)
            case "ema":
                u = replace(u, first="ema", b1=s["decay"], correct1=bool(s["debias"]))
            case "add_decayed_weights" if not callable(s["weight_decay"]) and s["weight_decay"]:
                decay = "coupled" if u.first == u.second == "none" else "decoupled"
                u = replace(u, decay=decay, weight_decay=s["weight_decay"])
                if rate_applied:  # p += u
                    u = replace(u, decay="unscaled", weight_decay=-u.weight_decay)
            case "masked":
                u = replace(u, mask="matrices")
            case "clip_by_global_norm":
                u = replace(u, clip="norm", max_norm=s["max_norm"])
            case "clip":
                u = replace(u, clip="value", max_norm=s["max_delta"])
            case "scale_by_learning_rate" | "scale_by_schedule" | "scale":
                rate_applied = True
            case _:
                pass
    names = ("b1", "b2", "eps", "eps_root", "initial", "weight_decay", "max_norm")
    numbers: dict[str, Any] = {name: float(getattr(u, name)) for name in names}
    return [replace(u, **numbers)] if known else []
