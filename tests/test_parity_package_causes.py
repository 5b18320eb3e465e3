"""Causes of departures: right hypothesis for each fault, none for an unrelated difference.

PyTorch is the truth: every form in NumPy equals its function, and faults are made with it where it can.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parity.causes import Departure
from parity.causes.search import find_cause, known_form
from parity.causes.stage import distance
from parity.trace import Value

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape)


def tensor(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def stage(
    operation: str, inputs: Any, parameters: Any = None, output: Any = None, theirs: Any = None, **more: Any
) -> Departure:
    """A departure of an output."""
    inputs = inputs if isinstance(inputs, (tuple, list)) else [inputs]
    output, theirs = (np.asarray(a, np.float64) for a in (output, theirs))
    values = {
        name: Value(name, operation, array, where="port.py:41")
        for name, array in (("a", output), ("b", theirs))
    }
    attributes = more.pop("attributes", {})
    reference = Value("a", operation, output, attributes=attributes)
    fields: dict[str, Any] = {
        "what": "output",
        "reference": reference,
        "candidate": values["b"],
        "segment": (values["b"],),
        "inputs": {f"x{i}": np.asarray(a) for i, a in enumerate(inputs)},
        "parameters": parameters or {},
        "state": {},
        "output": output,
        "candidate_output": theirs,
        "gradient": None,
        "result": output,
        "candidate_result": theirs,
        "result_name": "a",
        "noise": 1e-15,
        "train": False,
    }
    return Departure(**{**fields, **more})


X = normal(2, 6, 8, 8)
W, B = normal(6, 6, 3, 3), normal(6)


def conv(x: Any = X, w: Any = W, b: Any = B, **options: Any) -> np.ndarray:
    return F.conv2d(tensor(x), tensor(w), None if b is None else tensor(b), **options).numpy()


def padded(x: np.ndarray, before: int, behind: int, mode: str = "constant") -> np.ndarray:
    widths = ((0, 0), (0, 0), (before, behind), (before, behind))
    return np.pad(x, widths, mode=mode)  # type: ignore[call-overload, no-any-return]


CONV = {"conv.weight": W, "conv.bias": B}
STRIDED = {"stride": (2, 2), "padding": (1, 1)}
PLAIN = {"stride": 1, "padding": 1}
CONVOLUTIONS = {
    "same-padding": (STRIDED, conv(padded(X, 0, 1), stride=2)),
    "padding": (PLAIN, conv(padded(X, 2, 0))),
    "padding-mode": (PLAIN, conv(padded(X, 1, 1, "reflect"))),
    "dilation": (PLAIN, conv(dilation=2, padding=2)),
    "kernel-flipped": (PLAIN, conv(w=W[..., ::-1, ::-1], padding=1)),
    "kernel-transposed": (PLAIN, conv(w=W.swapaxes(2, 3), padding=1)),
    "kernel-transposed ": (PLAIN, conv(w=W.swapaxes(0, 1), padding=1)),
    "missing-bias": (PLAIN, conv(b=None, padding=1)),
    "bias-twice": (PLAIN, conv(b=2 * B, padding=1)),
    "channels-reversed": (PLAIN, conv(X[:, ::-1], padding=1)),
    "norm-activation-order": (PLAIN, conv(np.maximum(X, 0), padding=1)),
    "activation": (PLAIN, np.maximum(conv(padding=1), 0)),
    "residual-added": (PLAIN, conv(padding=1) + X),
    "constant-factor": (PLAIN, 0.125 * conv(padding=1)),
}


@pytest.mark.parametrize("id_", CONVOLUTIONS)
def test_convolution(id_: str) -> None:
    options, theirs = CONVOLUTIONS[id_]
    departure = stage("conv2d", X, CONV, conv(**options), theirs, attributes=options)  # type: ignore[arg-type]
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_.strip(), cause.sentence


def test_sentence_gives_the_line_and_what_to_write() -> None:
    cause = find_cause(
        stage("conv2d", X, CONV, conv(**STRIDED), conv(padded(X, 0, 1), stride=2), attributes=STRIDED)
    )
    assert cause is not None
    expected = (
        "port.py:41 pads 0 before and 1 behind (SAME), the reference 1 and 1: write padding=((1, 1), (1, 1))"
    )
    assert cause.sentence == expected


def test_two_faults_at_once() -> None:
    theirs = conv(padded(X, 0, 1), b=None, stride=2)
    cause = find_cause(stage("conv2d", X, CONV, conv(**STRIDED), theirs, attributes=STRIDED))
    assert cause is not None
    assert "SAME" in cause.sentence
    assert "bias" in cause.sentence


T = normal(3, 5, 8)
IMAGE = normal(2, 4, 9, 9)


def np_(array: torch.Tensor) -> np.ndarray:
    return array.detach().numpy()


def norm(x: np.ndarray = IMAGE, train: bool = False, **more: Any) -> dict[str, Any]:
    """Parameters and state of a batch norm of 4 channels."""
    rng = np.random.default_rng(1)
    names = ("weight", "bias", "running_mean", "running_var")
    arrays = dict(zip(names, rng.uniform(0.5, 1.5, (4, x.shape[1])), strict=True))
    return {
        "parameters": {f"bn.{n}": arrays[n] for n in names[:2]},
        "state": {f"bn.{n}": arrays[n] for n in names[2:]},
        "train": train,
    }


def batch_norm(
    x: np.ndarray = IMAGE, train: bool = False, eps: float = 1e-5, affine: bool = True
) -> np.ndarray:
    given = norm(x)
    weight, bias = (tensor(a) for a in given["parameters"].values())
    mean, var = (tensor(a.copy()) for a in given["state"].values())
    affine_ = (weight, bias) if affine else (None, None)
    return np_(F.batch_norm(tensor(x), mean, var, *affine_, training=train, eps=eps))  # type: ignore[misc]


def lstm(kind: str = "LSTM", **options: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(8, 6, dtype=torch.float64, **options)
    output, _ = module(tensor(T))
    return {f"rnn.{n}": np_(p) for n, p in module.named_parameters()}, np_(output)


HEADS = [normal(2, 3, 5, 4) for _ in range(3)]
MASK = np.where(np.arange(5) < 3, 0.0, -np.inf) + np.zeros((2, 3, 5, 5))
SQUARE = normal(8, 8)
SCALES = np.array([0.5, 2.0, 1.0, 3.0, -1.0, 0.2, 0.7, 1.3])


def torch_forms() -> dict[str, Departure]:
    """Operations of PyTorch with no departure: the form in NumPy must give the same numbers."""
    x, t, image = tensor(X), tensor(T), tensor(IMAGE)
    deep, shallow = normal(6, 1, 3, 3), normal(6, 2, 3, 3)
    narrow = normal(4, 3, 3, 3)
    q, k, v = map(tensor, HEADS)
    cases: dict[str, tuple[str, Any, Any, dict[str, Any], torch.Tensor | np.ndarray]] = {
        "conv2d": (
            "conv2d",
            X,
            CONV,
            {"padding": "same", "dilation": (2, 2)},
            conv(padding="same", dilation=2),
        ),
        "conv2d depthwise": (
            "conv2d",
            X,
            {"c.weight": deep},
            {"groups": 6, "stride": 2, "padding": 1},
            F.conv2d(x, tensor(deep), groups=6, stride=2, padding=1),
        ),
        "conv2d groups": (
            "conv2d",
            X,
            {"c.weight": shallow},
            {"groups": 3},
            F.conv2d(x, tensor(shallow), groups=3),
        ),
        "conv1d": ("conv1d", T, {"c.weight": W[:, :5, 0]}, {}, F.conv1d(t, tensor(W[:, :5, 0]))),
        "conv_transpose2d": (
            "conv_transpose2d",
            IMAGE,
            {"c.weight": narrow, "c.bias": B[:3]},
            {"stride": (2, 2), "padding": (1, 1), "output_padding": (1, 1)},
            F.conv_transpose2d(image, tensor(narrow), tensor(B[:3]), 2, 1, 1),
        ),
        "layer_norm": (
            "layer_norm",
            T,
            {"n.weight": SCALES, "n.bias": SCALES[::-1]},
            {"normalized_shape": (8,), "eps": 1e-5},
            F.layer_norm(t, (8,), tensor(SCALES), tensor(SCALES[::-1])),
        ),
        "group_norm": (
            "group_norm",
            IMAGE,
            {},
            {"num_groups": 2, "eps": 1e-4},
            F.group_norm(image, 2, eps=1e-4),
        ),
        "rms_norm": (
            "rms_norm",
            T,
            {"n.weight": SCALES},
            {"eps": 1e-6},
            F.rms_norm(t, (8,), tensor(SCALES), 1e-6),
        ),
        "max_pool2d": (
            "max_pool2d",
            IMAGE,
            {},
            {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
            F.max_pool2d(image, 3, 2, 1, ceil_mode=True),
        ),
        "avg_pool2d ceil": (
            "avg_pool2d",
            X,
            {},
            {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
            F.avg_pool2d(x, 3, 2, 1, ceil_mode=True),
        ),
        "avg_pool2d inside": (
            "avg_pool2d",
            X,
            {},
            {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
            F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        ),
        "adaptive": ("adaptive_avg_pool2d", X, {}, {"output_size": 1}, F.adaptive_avg_pool2d(x, 1)),
        "linear": (
            "linear",
            T,
            {"l.weight": SQUARE, "l.bias": SCALES},
            {},
            F.linear(t, tensor(SQUARE), tensor(SCALES)),
        ),
        "softmax": ("softmax", T, {}, {"dim": 1}, F.softmax(t, 1)),
        "log_softmax": ("log_softmax", T, {}, {"dim": -1}, F.log_softmax(t, -1)),
        "attention": ("scaled_dot_product_attention", HEADS, {}, {}, F.scaled_dot_product_attention(q, k, v)),
        "attention causal": (
            "scaled_dot_product_attention",
            HEADS,
            {},
            {"is_causal": True},
            F.scaled_dot_product_attention(q, k, v, is_causal=True),
        ),
        "attention mask": (
            "scaled_dot_product_attention",
            [*HEADS, MASK],
            {},
            {},
            F.scaled_dot_product_attention(q, k, v, tensor(MASK)),
        ),
        "pixel_shuffle": (
            "pixel_shuffle",
            IMAGE,
            {},
            {"upscale_factor": 2},
            F.pixel_shuffle(image, 2),
        ),
        "flatten": ("flatten", X, {}, {}, x.flatten(1)),
        "permute": ("permute", X, {}, {}, x.permute(0, 2, 3, 1)),
        "cat": ("cat", [X, X[:, :2]], {}, {"dim": 1}, torch.cat([x, x[:, :2]], 1)),
        "add": ("add", [X, X**2], {}, {"alpha": 2.0}, torch.add(x, x**2, alpha=2)),
        "masked_fill": ("masked_fill", T, {}, {}, t.masked_fill(t > 0.5, -torch.inf)),
        "lstm": ("lstm", T, lstm(num_layers=2)[0], {}, lstm(num_layers=2)[1]),
        "gru": ("GRU", T, lstm("GRU")[0], {}, lstm("GRU")[1]),
        "rnn": ("rnn_tanh", T, lstm("RNN")[0], {}, lstm("RNN")[1]),
    }
    for name in ("relu", "silu", "relu6", "leaky_relu", "elu", "selu", "celu", "hardswish", "hardsigmoid"):
        cases[name] = (name, T, {}, {}, getattr(F, name)(t))
    for name in ("hardtanh", "softplus", "mish", "sigmoid", "tanh", "softsign", "logsigmoid", "gelu"):
        cases[name] = (name, T, {}, {}, getattr(F, name)(t))
    cases["gelu tanh"] = ("gelu", T, {}, {"approximate": "tanh"}, F.gelu(t, approximate="tanh"))
    for name, options in {
        "nearest": {},
        "nearest-exact": {},
        "bilinear": {},
        "bilinear corners": {"align_corners": True},
        "bilinear antialias": {"antialias": True},
        "bicubic": {},
        "bicubic corners": {"align_corners": True},
        "bicubic antialias": {"antialias": True},
    }.items():
        mode = name.split()[0]
        for size in ((13, 11), (5, 4)):
            output = F.interpolate(image, size, mode=mode, **options)
            cases[f"{name} {size}"] = (
                "interpolate",
                IMAGE,
                {},
                {"mode": mode, "size": size, **options},
                output,
            )
    output = F.interpolate(image, scale_factor=1.7, mode="bilinear")
    cases["scale factor"] = ("interpolate", IMAGE, {}, {"mode": "bilinear", "scale_factor": 1.7}, output)
    departures = {
        name: stage(operation, x, parameters, out, out, attributes=attributes)
        for name, (operation, x, parameters, attributes, out) in cases.items()
    }
    for train in (True, False):
        normalized = batch_norm(train=train)
        departures[f"batch_norm {train}"] = stage(
            "batch_norm", IMAGE, output=normalized, theirs=normalized, **norm(train=train)
        )
    return departures


FORMS = torch_forms()


@pytest.mark.parametrize("name", FORMS)
def test_form_equals_torch(name: str) -> None:
    departure = FORMS[name]
    form = known_form(departure)
    assert form is not None
    assert distance(form.result(), form.view(departure.output)) < 1e-12


@pytest.mark.parametrize("name", FORMS)
def test_unrelated_difference_has_no_cause(name: str) -> None:
    departure = FORMS[name]
    noise = (
        np.random.default_rng(3).normal(size=departure.output.shape)
        * np.abs(departure.output[np.isfinite(departure.output)]).max()
    )
    for theirs in (departure.output + noise, departure.output + 1e-4 * noise):
        unlike = dataclasses.replace(departure, candidate_output=theirs, candidate_result=theirs)
        found = find_cause(unlike)
        assert found is None, found
