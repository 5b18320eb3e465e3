"""Causes of departures: right hypothesis for each fault, none for an unrelated difference.

PyTorch is the truth: every form in NumPy equals its function, and faults are made with it where it can.
"""

# mypy: disable-error-code="arg-type, call-arg, dict-item"
from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from parity.causes import Departure, activation, attention, precision, search
from parity.causes.search import find_cause, find_precision, known_form
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


def padded(x: np.ndarray, before: int, after: int, mode: str = "constant") -> np.ndarray:
    widths = ((0, 0), (0, 0), (before, after), (before, after))
    return np.pad(x, widths, mode=mode)  # type: ignore[call-overload]


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
    departure = stage("conv2d", X, CONV, conv(**options), theirs, attributes=options)
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_.strip(), cause.sentence


def test_sentence_gives_the_line_and_what_to_write() -> None:
    cause = find_cause(
        stage("conv2d", X, CONV, conv(**STRIDED), conv(padded(X, 0, 1), stride=2), attributes=STRIDED)
    )
    assert cause is not None
    expected = (
        "port.py:41 pads 0 before and 1 after (SAME), the reference 1 and 1: write padding=((1, 1), (1, 1))"
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


UNRELATED = [name for name in FORMS if "(13" not in name and "bicubic" not in name and name != "rnn"]


@pytest.mark.parametrize("name", UNRELATED)
def test_unrelated_difference_has_no_cause(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_PAIRS", 50)
    departure = FORMS[name]
    output = departure.output
    noise = np.random.default_rng(3).normal(size=output.shape) * np.abs(output[np.isfinite(output)]).max()
    theirs = output + 1e-3 * noise
    found = find_cause(dataclasses.replace(departure, candidate_output=theirs, candidate_result=theirs))
    assert found is None, found


def gelu(x: np.ndarray, **options: Any) -> np.ndarray:
    return np_(F.gelu(tensor(x), **options))


def pool(kind: str, x: np.ndarray = IMAGE, **options: Any) -> np.ndarray:
    return np_(getattr(F, f"{kind}_pool2d")(tensor(x), **options))


def attend(*arrays: np.ndarray, **options: Any) -> np.ndarray:
    return np_(F.scaled_dot_product_attention(*map(tensor, arrays), **options))


def of(name: str, theirs: Any) -> Departure:
    """The case of `FORMS` of that name with another result."""
    theirs = np_(theirs) if isinstance(theirs, torch.Tensor) else np.asarray(theirs)
    return dataclasses.replace(FORMS[name], candidate_output=theirs, candidate_result=theirs)


def reordered_lstm() -> np.ndarray:
    """An LSTM whose second and third gate are exchanged."""
    torch.manual_seed(0)
    module = torch.nn.LSTM(8, 6, num_layers=2, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            i, f, g, o = parameter.clone().chunk(4)
            parameter.copy_(torch.cat([i, g, f, o]))
    return np_(module(tensor(T))[0])


def gru(reset_first: bool, new: bool) -> np.ndarray:
    """A GRU step by step, with the reset gate before the product or the update gate the other way."""
    w_x, w_h, b_x, b_h = (tensor(a) for a in lstm("GRU")[0].values())
    h, states = torch.zeros(5, 6, dtype=torch.float64), []
    for x in tensor(T):
        (a_r, a_z, a_n), (b_r, b_z, b_n) = (x @ w_x.T + b_x).chunk(3, 1), (h @ w_h.T + b_h).chunk(3, 1)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        inner = (r * h) @ w_h[12:].T + b_h[12:] if reset_first else r * b_n
        n = torch.tanh(a_n + inner)
        h = z * n + (1 - z) * h if new else (1 - z) * n + z * h
        states.append(h)
    return np_(torch.stack(states))


def patches(operation: str) -> Departure:
    """A convolution of patches whose kernel has height and width exchanged, as the candidate's operation."""
    kernel = normal(4, 6, 2, 2)
    departure = stage(
        "conv2d",
        X,
        {"c.weight": kernel},
        conv(w=kernel, b=None, stride=2),
        conv(w=kernel.swapaxes(2, 3), b=None, stride=2),
        attributes={"stride": (2, 2)},
    )
    return dataclasses.replace(departure, segment=(Value("b", operation, departure.candidate_output),))


TABLE, TOKEN = normal(9, 8), np.broadcast_to(normal(8), (3, 1, 8))
LAYER = (tensor(SCALES), tensor(SCALES[::-1]))
RELU_IMAGE = np.maximum(IMAGE, 0)
OUTSIDE = np.triu(np.ones((5, 5), bool), 1)
FAULTS: list[tuple[str, Departure]] = [
    ("stride-placement", of("conv1d", F.conv1d(tensor(T), tensor(W[:, :5, 0]), stride=2))),
    (
        "groups",
        of(
            "conv2d groups",
            FORMS["conv2d groups"].output.reshape(2, 3, 2, 6, 6).swapaxes(1, 2).reshape(2, 6, 6, 6),
        ),
    ),
    ("epsilon", of("batch_norm False", batch_norm(eps=1e-3))),
    ("epsilon", of("batch_norm True", batch_norm(train=True, eps=1e-3))),
    ("batch-statistics-vs-running", of("batch_norm False", batch_norm(train=True))),
    ("batch-statistics-vs-running", of("batch_norm True", batch_norm())),
    ("affine-missing", of("batch_norm False", batch_norm(affine=False))),
    ("norm-activation-order", of("batch_norm True", batch_norm(RELU_IMAGE, train=True))),
    ("activation", of("batch_norm True", np.maximum(batch_norm(train=True), 0))),
    ("epsilon", of("layer_norm", F.layer_norm(tensor(T), (8,), *LAYER, eps=1e-6))),
    ("layer-norm-axes", of("layer_norm", F.layer_norm(tensor(T), (5, 8)) * LAYER[0] + LAYER[1])),
    ("scale-missing", of("layer_norm", F.layer_norm(tensor(T), (8,), None, LAYER[1]))),
    ("weights-swapped", of("layer_norm", F.layer_norm(tensor(T), (8,), *LAYER[::-1]))),
    ("mean-subtraction", of("layer_norm", F.rms_norm(tensor(T), (8,), LAYER[0], 1e-5) + LAYER[1])),
    ("groups", of("group_norm", F.group_norm(tensor(IMAGE), 4, eps=1e-4))),
    ("layer-norm-axes", of("group_norm", F.batch_norm(tensor(IMAGE), None, None, training=True, eps=1e-4))),
    ("pool-kind", of("avg_pool2d ceil", pool("max", X, kernel_size=3, stride=2, padding=1, ceil_mode=True))),
    ("count-include-pad", of("avg_pool2d inside", pool("avg", X, kernel_size=3, stride=2, padding=1))),
    ("pool-kind", of("adaptive", X.max((2, 3), keepdims=True))),
    ("mean-or-sum", of("adaptive", X.sum((2, 3), keepdims=True))),
    ("kernel-transposed", of("linear", T @ SQUARE + SCALES)),
    ("missing-bias", of("linear", T @ SQUARE.T)),
    (
        "flatten-order",
        of("linear", T.reshape(3, 5, 4, 2).swapaxes(2, 3).reshape(3, 5, 8) @ SQUARE.T + SCALES),
    ),
    ("flatten-order", of("flatten", X.transpose(0, 2, 3, 1).reshape(2, -1))),
    ("axis-order", of("permute", X.transpose(0, 3, 2, 1))),
    ("concat-order", of("cat", np.concatenate([X[:, :2], X], 1))),
    ("missing-shortcut", of("add", X)),
    ("operand-scaled", of("add", X + 0.3 * X**2)),
    ("norm-activation-order", of("add", np.maximum(X, 0) + 2 * X**2)),
    ("softmax-axis", of("softmax", F.softmax(tensor(T), 2))),
    ("attention-scale", of("softmax", F.softmax(tensor(T) / 2, 1))),
    ("log-softmax", of("log_softmax", F.softmax(tensor(T), -1))),
    ("gelu-tanh", of("gelu", gelu(T, approximate="tanh"))),
    ("gelu-tanh", of("gelu tanh", gelu(T))),
    ("activation", of("gelu", T / (1 + np.exp(-1.702 * T)))),
    ("activation", of("relu", F.silu(tensor(T)))),
    ("activation-slope", of("leaky_relu", F.leaky_relu(tensor(T), 0.17))),
    ("activation-slope", of("elu", F.elu(tensor(T), 0.4))),
    ("activation", of("hardswish", F.relu6(tensor(T)))),
    ("attention-scale", of("attention", attend(*HEADS, scale=1.0))),
    ("attention-scale", of("attention mask", attend(*HEADS, MASK, scale=12**-0.5))),
    ("causal-mask", of("attention", attend(*HEADS, is_causal=True))),
    ("mask-missing", of("attention mask", attend(*HEADS))),
    ("mask-inverted", of("attention mask", attend(*HEADS, np.where(np.isinf(MASK), 0.0, -np.inf)))),
    ("mask-value", of("attention mask", attend(*HEADS, np.maximum(MASK, -7.0)))),
    (
        "causal-mask",
        of("attention causal", attend(*HEADS, np.where(np.tril(np.ones((5, 5)), 1), 0.0, -np.inf))),
    ),
    ("mask-value", of("masked_fill", np.where(T > 0.5, -9.0, T))),
    ("mask-inverted", of("masked_fill", np.where(T > 0.5, T, -np.inf))),
    ("resize-half-pixel", of("nearest (13, 11)", FORMS["nearest-exact (13, 11)"].output)),
    ("resize-align-corners", of("bilinear (13, 11)", FORMS["bilinear corners (13, 11)"].output)),
    ("resize-antialias", of("bilinear (5, 4)", FORMS["bilinear antialias (5, 4)"].output)),
    ("resize-kernel", of("bilinear (13, 11)", FORMS["bicubic (13, 11)"].output)),
    ("gate-order", of("lstm", reordered_lstm())),
    ("reset-gate-placement", of("gru", gru(True, False))),
    ("update-gate-convention", of("gru", gru(False, True))),
    ("offset", of("rnn", FORMS["rnn"].output + 0.5)),
    ("output-flipped", of("conv2d", FORMS["conv2d"].output[:, :, ::-1])),
    ("position-offset", stage("add", T, {}, T + TABLE[:5], T + TABLE[1:6])),
    ("position-offset", stage("add", T, {"p": TABLE[None, :5]}, T + TABLE[:5], T + np.roll(TABLE[:5], 1, 0))),
    ("concat-order", stage("cat", T, {}, np.append(TOKEN, T, 1), np.append(T, TOKEN, 1))),
    ("flatten-order", stage("view", T, {}, T.reshape(3, 5, 2, 4), T.reshape(3, 5, 4, 2).swapaxes(2, 3))),
    ("flatten-order", patches("dot_general")),
    ("kernel-transposed", patches("conv_general_dilated")),
    (
        "embedding-scale",
        dataclasses.replace(stage("mul", T, {}, 4 * T, T / 4, attributes={"other": 4}), inputs={"embed": T}),
    ),
    ("activation", dataclasses.replace(of("add", X + 2 * gelu(X**2)), readers=("conv2d",))),
    ("norm-activation-order", dataclasses.replace(of("add", X + 2 * gelu(X**2)), readers=("gelu",))),
]


@pytest.mark.parametrize(("id_", "departure"), FAULTS, ids=[f"{i}-{f[0]}" for i, f in enumerate(FAULTS)])
def test_fault(id_: str, departure: Departure) -> None:
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_, cause.sentence
    assert cause.place == ("x1" if departure.readers == ("conv2d",) else "")


def test_masks_that_are_added_or_hide_queries() -> None:
    scores, hidden = normal(2, 5, 5), np.arange(5) > 2
    masked = np.where(hidden, -np.inf, scores)
    for words, theirs in (
        ("adds to hidden scores -1,", scores - hidden),
        ("fills hidden scores with -1,", np.where(hidden, -1.0, scores)),
        ("hides queries", np.where(hidden[:, None], -1e30, scores)),
    ):
        target = activation.softmax(theirs, -1)
        found = attention.softmax_variants(scores, masked, -1, target)
        assert next(does for _, array, does in found if distance(array, target) < 1e-12).startswith(words)


@pytest.mark.parametrize("value", [0.0, 1e-12, 3e-4, 0.05])
def test_epsilon_is_given_as_a_number(value: float) -> None:
    cause = find_cause(of("batch_norm False", batch_norm(eps=value)))
    assert cause is not None
    number = "no epsilon" if value < 1e-9 else f"epsilon {value:.6g}"
    assert f"uses {number}, the reference 1e-05: write " in cause.sentence


def test_a_form_that_is_not_the_operation_makes_no_claim() -> None:
    departure = stage("conv2d", X, CONV, conv(padding=1) + X, conv(padded(X, 2, 0)), attributes=PLAIN)
    assert known_form(departure) is None
    assert find_cause(departure) is None


def jax_stages() -> dict[str, tuple[Departure, str]]:
    """JAX's names, attributes and layouts as the reference."""
    x, w = np.moveaxis(X, 1, -1), W.transpose(2, 3, 1, 0)
    numbers = ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
    primitive = {"window_strides": (2, 2), "padding": ((1, 1), (1, 1)), "dimension_numbers": numbers}
    primitive |= {"rhs_dilation": (1, 1), "lhs_dilation": (1, 1), "feature_group_count": 1}
    outs = [np.moveaxis(o, 1, -1) for o in (conv(b=None, **STRIDED), conv(padded(X, 0, 1), b=None, stride=2))]
    module = {"strides": 2, "padding": "SAME", "kernel_size": (3, 3)}
    layer = np_(F.layer_norm(tensor(T), (8,), *LAYER, eps=1e-6))
    scale = {"norm.scale": SCALES, "norm.bias": SCALES[::-1]}
    window = {"window_dimensions": (1, 2, 2, 1), "window_strides": (1, 2, 2, 1), "padding": ((0, 0),) * 4}
    pooled = [np.moveaxis(pool(kind, X, kernel_size=2), 1, -1) for kind in ("max", "avg")]
    dot = {"dimension_numbers": (((2,), (0,)), ((), ()))}
    return {
        "conv": (stage("conv_general_dilated", x, {"k": w}, *outs, attributes=primitive), "same-padding"),
        "Conv": (stage("Conv", x, {"conv.kernel": w}, *outs[::-1], attributes=module), "padding"),
        "LayerNorm": (
            stage("LayerNorm", T, scale, layer, FORMS["layer_norm"].output, attributes={"epsilon": 1e-6}),
            "epsilon",
        ),
        "pool": (stage("reduce_window_max", x, {}, *pooled, attributes=window), "pool-kind"),
        "dot": (
            stage("dot_general", T, {"k": SQUARE}, T @ SQUARE, T @ SQUARE.T, attributes=dot),
            "kernel-transposed",
        ),
        "logistic": (stage("logistic", T, {}, 1 / (1 + np.exp(-T)), np.tanh(T)), "activation"),
        "scalar": (stage("mul", T, {}, 3 * T, 4 * T, attributes={"other": 3}), "operand-scaled"),
    }


@pytest.mark.parametrize("name", jax_stages())
def test_jax_as_reference(name: str) -> None:
    departure, id_ = jax_stages()[name]
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_, cause.sentence


def statistics(theirs: np.ndarray, name: str = "running_var") -> Departure:
    """The running statistics of a batch norm after a step of PyTorch, momentum 0.1."""
    given = norm(train=True)
    mean, var = (tensor(a.copy()) for a in given["state"].values())
    F.batch_norm(tensor(IMAGE), mean, var, training=True, momentum=0.1)
    truth = np_(var if name == "running_var" else mean)
    departure = stage("batch_norm", IMAGE, output=IMAGE, theirs=IMAGE, attributes={"momentum": 0.1}, **given)
    fields = {"what": "statistics", "result": truth, "candidate_result": theirs, "result_name": f"bn.{name}"}
    return dataclasses.replace(departure, **fields)


OLD = norm()["state"]["bn.running_var"]
OLD_MEAN = norm()["state"]["bn.running_mean"]
VAR, MEAN = IMAGE.var((0, 2, 3)), IMAGE.mean((0, 2, 3))
UNBIASED = VAR * 162 / 161


@pytest.mark.parametrize(
    ("id_", "departure"),
    [
        ("biased-running-variance", statistics(0.9 * OLD + 0.1 * VAR)),
        ("momentum-convention", statistics(0.1 * OLD + 0.9 * UNBIASED)),
        ("momentum-convention", statistics(0.1 * OLD_MEAN + 0.9 * MEAN, "running_mean")),
        ("momentum-convention", statistics(0.1 * OLD + 0.9 * VAR)),
        ("momentum", statistics(0.99 * OLD + 0.01 * UNBIASED)),
        ("statistics-not-updated", statistics(OLD)),
        ("statistics-updated-twice", statistics(0.81 * OLD + 0.19 * UNBIASED)),
        ("wrong-moment", statistics(0.9 * OLD + 0.1 * np.sqrt(VAR))),
    ],
)
def test_statistics(id_: str, departure: Departure) -> None:
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_, cause.sentence


def test_unrelated_statistics_have_no_cause() -> None:
    assert find_cause(statistics(OLD * np.array([1.1, 1.2, 1.3, 1.4]))) is None


def gradient_of(departure: Departure, f: Any, wrong: Any, what: str = "input gradient") -> Departure:
    """A departure of the gradient of f with respect to the first input, where autograd takes `wrong`."""
    x = next(iter(departure.inputs.values()))
    dy = np.random.default_rng(5).normal(size=departure.output.shape)
    results = []
    for function in (f, wrong):
        leaf = tensor(x).requires_grad_()
        function(leaf).backward(tensor(dy))
        results.append(np.zeros(x.shape) if leaf.grad is None else leaf.grad.numpy())
    return dataclasses.replace(
        departure, what=what, gradient=dy, result=results[0], candidate_result=results[1]
    )


def constant(norm_of: Any, mean: bool, var: bool) -> Any:
    """Batch or layer norm with statistics that take no part in the backward pass."""

    def f(x: torch.Tensor) -> torch.Tensor:
        axes, weight, bias, eps = norm_of
        m, v = x.mean(axes, keepdim=True), x.var(axes, keepdim=True, unbiased=False)
        m_ = m.detach() if mean else m
        v_ = v.detach() if var else ((x - m_) ** 2).mean(axes, keepdim=True) if not mean else v
        return (x - m_) / torch.sqrt(v_ + eps) * weight + bias

    return f


def lstm_steps(parameters: dict[str, np.ndarray], stop_h: bool = False, stop_c: bool = False) -> Any:
    """An LSTM step by step, in which a state may be a constant for the next step."""
    w_x, w_h, b_x, b_h = map(tensor, parameters.values())

    def f(x: torch.Tensor) -> torch.Tensor:
        h = c = torch.zeros(5, 6, dtype=torch.float64)
        states = []
        for step in x:
            h, c = (h.detach() if stop_h else h), (c.detach() if stop_c else c)
            i, f, g, o = (step @ w_x.T + b_x + h @ w_h.T + b_h).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            states.append(h)
        return torch.stack(states)

    return f


def gradients() -> dict[str, tuple[Departure, str, str]]:
    """Wrong backward passes: departure, cause, words of its sentence."""
    given = norm()["parameters"]
    weight, bias = (tensor(a[:, None, None]) for a in given.values())
    batch = ((0, 2, 3), weight, bias, 1e-5)
    layer = ((2,), *LAYER, 1e-5)
    relu = stage("relu", np.round(T), {}, np.maximum(np.round(T), 0), np.maximum(np.round(T), 0))
    cases: dict[str, tuple[Departure, str, str]] = {}
    for words, flags in (
        ("mean and variance", (True, True)),
        ("the variance", (False, True)),
        ("the mean", (True, False)),
    ):
        for name, norm_of in (("batch_norm True", batch), ("layer_norm", layer)):
            departure = gradient_of(FORMS[name], constant(norm_of, False, False), constant(norm_of, *flags))
            cases[f"{name} {words}"] = (
                departure,
                "batch-statistics-constant",
                f"takes {words} for constants",
            )
    cases["zero"] = (gradient_of(relu, F.relu, lambda x: 0 * x), "stop-gradient", "no gradient")
    straight = gradient_of(relu, F.relu, lambda x: x)
    cases["straight-through"] = (straight, "wrong-custom-derivative", "straight-through")
    at_zero = gradient_of(relu, F.relu, lambda x: torch.where(x >= 0, x, 0 * x))
    cases["at zero"] = (at_zero, "wrong-custom-derivative", "where the input is 0")
    cases["sign"] = (gradient_of(relu, F.relu, lambda x: -F.relu(x)), "wrong-custom-derivative", "-1 times")
    cases["scale"] = (
        gradient_of(FORMS["silu"], F.silu, lambda x: 0.5 * F.silu(x)),
        "wrong-custom-derivative",
        "0.5 times",
    )
    cases["other"] = (
        gradient_of(FORMS["silu"], F.silu, F.gelu),
        "wrong-custom-derivative",
        "is not that of silu",
    )
    one_side = gradient_of(FORMS["leaky_relu"], F.leaky_relu, F.relu)
    cases["one side"] = (one_side, "stop-gradient", "at some places only")
    custom = {"candidate": Value("b", "f", T, attributes={"custom_derivative": True})}
    departure = dataclasses.replace(cases["layer_norm the variance"][0], **custom)
    cases["custom"] = (departure, "wrong-custom-derivative", "takes the variance for constants")
    parameters, output = lstm()
    once = stage("lstm", T, parameters, output, output)
    for words, stopped in (("the hidden state", (True, False)), ("the cell state", (False, True))):
        departure = gradient_of(once, lstm_steps(parameters), lstm_steps(parameters, *stopped))
        cases[words] = (departure, "stop-gradient", words)
    branch = gradient_of(FORMS["add"], lambda x: x + 2 * x**2, lambda x: x)
    cases["branch"] = (branch, "stop-gradient", "only the direct part")
    return cases


@pytest.mark.parametrize("name", gradients())
def test_gradient(name: str) -> None:
    departure, id_, words = gradients()[name]
    cause = find_cause(departure)
    assert cause is not None
    assert cause.id == id_, cause.sentence
    assert words in cause.sentence


def test_unrelated_gradient_has_no_cause() -> None:
    departure, _, _ = gradients()["layer_norm the mean"]
    theirs = departure.result + 1e-3 * normal(*departure.result.shape)
    assert find_cause(dataclasses.replace(departure, candidate_result=theirs)) is None


def rounded(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return tensor(array).to(dtype).to(torch.float32)


def test_precision_of_operands_and_results() -> None:
    linear = FORMS["linear"]
    full = [tensor(a).float() for a in (T, SQUARE, SCALES)]
    tf32 = [tensor(precision.ROUNDINGS["TF32"](a)).float() for a in (T, SQUARE)]
    for id_, native in {
        "bfloat16-cast": F.linear(*(rounded(a, torch.bfloat16) for a in (T, SQUARE)), full[2]),
        "float16-cast": F.linear(*full).half(),
        "tf32": F.linear(*tf32, full[2]),
        "float16-cast ": F.linear(full[0], rounded(SQUARE, torch.float16), full[2]),
    }.items():
        cause = find_precision(linear, np_(native).astype(np.float64))
        assert cause is not None
        assert cause.id == id_.strip(), cause.sentence
    mean = tensor(IMAGE).mean((0, 2, 3))
    centered = (tensor(IMAGE) - mean[:, None, None]).bfloat16()
    var = (centered * centered).double().mean((0, 2, 3)).bfloat16().double()
    native = F.batch_norm(tensor(IMAGE), mean, var, *map(tensor, norm()["parameters"].values()))
    cause = find_precision(FORMS["batch_norm True"], np_(native))
    assert cause is not None
    assert "rounds its variance to bfloat16" in cause.sentence
    whole = F.linear(*(tensor(a).bfloat16() for a in (T, SQUARE, SCALES))).float()
    cause = find_precision(linear, np_(whole).astype(np.float64))
    assert cause is not None
    assert cause.id == "bfloat16-cast"


def test_precision_makes_no_claim_of_an_unrelated_error() -> None:
    theirs = FORMS["linear"].output + 1e-3 * normal(*FORMS["linear"].output.shape)
    assert find_precision(FORMS["linear"], theirs) is None


def test_roundings_are_those_of_torch() -> None:
    x = normal(1000) * 10.0 ** RNG.integers(-4, 4, 1000)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        np.testing.assert_array_equal(precision.ROUNDINGS[name](x), np_(tensor(x).to(dtype).double()))
