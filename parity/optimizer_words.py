"""Sentences for the cause of a difference between two optimizers, and what to write in place of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from parity.optimizer_causes import Fit, Update, changed, relation
from parity.trace import Array

PHRASES: dict[str, dict[Any, str]] = {
    "eps_place": {
        "outside": "adds eps beside the root, sqrt(v) + eps",
        "inside": "adds eps inside the root, sqrt(v + eps)",
        "uncorrected": "adds eps beside the uncorrected root, (sqrt(v) + eps) / sqrt(1 - b2^t)",
    },
    "decay": {
        "none": "has no weight decay",
        "decoupled": "has decoupled weight decay, p -= lr wd p (AdamW)",
        "coupled": "adds weight decay to the gradient, g + wd p (L2)",
        "unscaled": "has weight decay without the learning rate, p -= wd p",
    },
    "mask": {
        "all": "decays every parameter, norms and biases too",
        "matrices": "decays only parameters of two axes and more, not norms and biases",
    },
    "maximum": {
        "none": "takes no maximum of v (no AMSGrad)",
        "raw": "takes AMSGrad's maximum of v before its bias is corrected and corrects the maximum",
        "corrected": "takes AMSGrad's maximum of v after its bias is corrected",
        "uncorrected": "takes AMSGrad's maximum of v without bias correction (as published)",
    },
    "nesterov": {
        "none": "has no Nesterov momentum",
        "plain": "has Nesterov momentum with a constant b1",
        "scheduled": "has NAdam's b1 that grows with t, b1 (1 - 0.96^(0.004 t) / 2)",
    },
    "first": {
        "none": "has no momentum",
        "sum": "sums gradients, m = b1 m + g",
        "ema": "averages gradients, m = b1 m + (1 - b1) g",
        "dampened": "dampens momentum, m = b1 m + (1 - dampening) g after the first step",
    },
    "correct1": {True: "corrects the bias of m, by 1 - b1^t", False: "does not correct the bias of m"},
    "correct2": {True: "corrects the bias of v, by 1 - b2^t", False: "does not correct the bias of v"},
    "clip": {
        "none": "does not clip gradients",
        "norm": "clips the norm of all gradients to {max_norm:g}",
        "value": "clips each gradient to {max_norm:g}",
    },
    "centered": {True: "subtracts the squared average of g from v (centered)", False: "is not centered"},
    "second": {
        "none": "does not divide by a root of squared gradients",
        "ema": "averages squared gradients, v = b2 v + (1 - b2) g^2",
        "sum": "sums squared gradients, v = v + g^2",
    },
    "after": {True: "averages g / root (RMSprop)", False: "averages g and divides afterwards (Adam)"},
    "rate_inside": {
        True: "takes the learning rate into the momentum, m = b1 m + lr d",
        False: "multiplies the momentum by the learning rate, p -= lr m",
    },
}


def phrase(name: str, update: Update) -> str:
    """Describe one field of an update: "has no momentum"."""
    if name in PHRASES:
        return PHRASES[name][getattr(update, name)].format(**vars(update))
    label = {"initial": "begins v at", "eps_root": "adds under the root eps_root ="}.get(
        name, f"has {name} ="
    )
    return f"{label} {getattr(update, name):g}"


def torch_argument(name: str, r: Update) -> str | None:
    """PyTorch's argument for the field `name` of the update `r`; None if no argument does it."""
    adam = r.first == r.second == "ema"
    betas = f"betas=({r.b1:g}, {r.b2:g})"
    decoupled = "torch.optim.AdamW" if adam else None
    decay = {"none": "weight_decay=0", "decoupled": decoupled, "coupled": f"weight_decay={r.weight_decay:g}"}
    arguments = {
        "b1": betas if adam else f"momentum={r.b1:g}",
        "b2": betas if adam else f"alpha={r.b2:g}",
        "eps": f"eps={r.eps:g}",
        "weight_decay": f"weight_decay={r.weight_decay:g}",
        "dampening": f"dampening={r.dampening:g}",
        "decay": f"{decoupled}(..., weight_decay={r.weight_decay:g})"
        if r.decay == "decoupled" and adam
        else decay.get(r.decay),
        "maximum": f"amsgrad={r.maximum == 'raw'}" if adam and r.maximum in ("none", "raw") else None,
        "initial": f"initial_accumulator_value={r.initial:g}" if r.second == "sum" else None,
        "centered": f"centered={r.centered}",
        "nesterov": None if adam else f"nesterov={r.nesterov == 'plain'}",
        "first": {"none": "momentum=0", "sum": f"momentum={r.b1:g}, dampening=0"}.get(r.first),
        "clip": "torch.nn.utils.clip_grad_norm_ before each step" if r.clip == "norm" else None,
    }
    if adam and r.decay == "coupled":
        arguments["decay"] = f"torch.optim.Adam(..., weight_decay={r.weight_decay:g})"
    if adam and name == "first":
        return None
    return arguments.get(name)


def optax_argument(name: str, r: Update) -> str | None:
    """optax's argument for the field `name` of the update `r`; None if no argument does it."""
    adam, rms = r.first == r.second == "ema", r.second == "ema" and r.first != "ema"
    chain = "optax.chain({}, ...)".format
    function = (
        "optax.adam"
        if adam
        else "optax.rmsprop"
        if rms
        else "optax.adagrad"
        if r.second == "sum"
        else "optax.sgd"
    )
    arguments = {
        "b1": f"b1={r.b1:g}" if adam else f"{function}(..., momentum={r.b1:g})",
        "b2": f"b2={r.b2:g}" if adam else f"{function}(..., decay={r.b2:g})",
        "eps": f"eps={r.eps:g}",
        "weight_decay": f"weight_decay={r.weight_decay:g}",
        "eps_root": f"eps_root={r.eps_root:g}" if adam else None,
        "nesterov": None if r.nesterov == "scheduled" else f"nesterov={r.nesterov == 'plain'}",
        "centered": f"{function}(..., centered={r.centered})" if rms else None,
        "mask": "mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)"
        if r.mask == "matrices"
        else "mask=None",
        "clip": chain(f"optax.clip_by_global_norm({r.max_norm:g})") if r.clip == "norm" else None,
    }
    if name == "eps_place" and rms:
        return f"optax.rmsprop(..., eps_in_sqrt={r.eps_place == 'inside'})"
    if name == "eps_place" and adam and r.eps_place == "inside":
        return f"eps=0, eps_root={r.eps:g}"
    if name == "initial" and r.second != "none" and not adam:
        return f"{function}(..., {'initial_scale' if rms else 'initial_accumulator_value'}={r.initial:g})"
    if name == "maximum":
        uncorrected = "optax.amsgrad(..., bias_correction_nu=False)"
        return {"none": "optax.adam", "corrected": "optax.amsgrad", "uncorrected": uncorrected}.get(r.maximum)
    if name == "decay":
        decoupled = f"optax.adamw(..., weight_decay={r.weight_decay:g})" if adam else None
        coupled = chain(f"optax.add_decayed_weights({r.weight_decay:g})")
        return {"none": "weight_decay=0", "decoupled": decoupled, "coupled": coupled}.get(r.decay)
    if name == "first" and not adam and r.first in ("none", "sum"):
        return f"{function}(..., momentum={'None' if r.first == 'none' else format(r.b1, 'g')})"
    if name == "correct2" and rms:
        return f"optax.rmsprop(..., bias_correction={r.correct2})"
    return arguments.get(name)


def rate_sentence(reference: Array, candidate: Array) -> str | None:
    """How the candidate's learning rates differ from the reference's; None if they do not."""
    kind, ratio = relation(reference, candidate)
    if kind == "same":
        return None
    if kind == "scaled":
        if np.isclose(ratio, -1):
            return "The candidate steps in the opposite direction (it maximizes)."
        return (
            f"The candidate's learning rate is {ratio:.6g} times the reference's: "
            f"{candidate[0]:.6g} against {reference[0]:.6g} at the first step."
        )
    if kind in ("later", "earlier"):
        side = "behind" if kind == "later" else "ahead of"
        return f"The candidate's schedule is one step {side} the reference's: off by one."
    step = int(np.flatnonzero(~np.isclose(reference, candidate, rtol=1e-7, atol=0))[0])
    return (
        f"The learning rates differ from step {step + 1} on: the candidate's is {candidate[step]:.6g}, "
        f"the reference's {reference[step]:.6g}."
    )


def sentence(reference: Fit, candidate: Fit, rates: tuple[Array, Array], kind: str) -> str | None:
    """The cause, and what to write on the candidate's side; `kind` is its framework."""
    argument = optax_argument if kind == "optax" else torch_argument
    framework = "optax" if kind == "optax" else "PyTorch"
    sentences = []
    for name in changed(reference.update, candidate.update):
        if (
            name in ("weight_decay", "max_norm", "dampening", "b1", "b2")
            and name not in candidate.update.numbers()
        ):
            continue  # part of what the candidate leaves out
        write = argument(name, reference.update)
        if name == "clip" and reference.update.clip == "none":
            write = "no clipping"
        advice = f"write `{write}`" if write else f"{framework} has no argument for it"
        ours, theirs = phrase(name, reference.update), phrase(name, candidate.update)
        sentences.append(f"The candidate {theirs}, the reference {ours}: {advice}.")
    rate = rate_sentence(*rates)
    return " ".join([*sentences, *([rate] if rate else [])]) or None
