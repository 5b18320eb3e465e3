"""The table of cases: all that the engines must agree on. Drawn shapes are added in `test_parity.py`."""

from __future__ import annotations

from typing import Any

from tests.parity.case import Case


def _conv(name: str, shape: tuple[int, ...], out: int, kernel: Any, **options: Any) -> Case:
    return Case(name, "conv", shape, {"out_channels": out, "kernel_size": kernel, "bias": True, **options})


def _stage(name: str, shape: tuple[int, ...], model: str, stage: str, *, train: bool, **options: Any) -> Case:
    kept = {"model": model, "stage": stage, "in_channels": 3, **options}
    return Case(f"{name}-{'train' if train else 'eval'}", "stage", shape, kept, train)


def _network(
    name: str,
    shape: tuple[int, ...],
    model: str,
    *,
    train: bool = True,
    drop_path: float = 0.0,
    **options: Any,
) -> Case:
    return Case(name, "network", shape, {"model": model, **options}, train, drop_path=drop_path)


CONVOLUTIONS = [
    _conv("conv-7x7-stem", (2, 33, 47, 3), 8, 7, stride=2, padding=3, bias=False),
    _conv("conv-3x3", (3, 9, 6, 8), 8, 3, padding=1, bias=False),
    _conv("conv-3x3-bias-batch-1", (1, 9, 8, 8), 4, 3, padding=1),
    _conv("conv-3x3-stride-2-even", (2, 12, 12, 3), 5, 3, stride=2, padding=1, bias=False),
    _conv("conv-3x3-stride-2-odd", (2, 9, 11, 3), 5, 3, stride=2, padding=1),
    _conv("conv-3x3-one-pixel", (2, 1, 1, 8), 8, 3, padding=1),
    _conv("conv-3x3-two-pixels", (2, 2, 2, 8), 4, 3, padding=1, bias=False),
    _conv("conv-3x3-stride-2-two-pixels", (2, 2, 2, 8), 4, 3, stride=2, padding=1),
    _conv("conv-3x3-many-channels", (3, 8, 10, 64), 72, 3, padding=1, bias=False),
    _conv("conv-3x3-many-channels-odd", (4, 9, 7, 72), 64, 3, padding=1),
    _conv("conv-3x3-mostly-padding", (8, 3, 5, 4), 2, 3, padding=3),
    _conv("conv-3x3-eight-images", (8, 5, 7, 6), 4, 3, padding=1),  # NumPy computes these two row by row
    _conv("conv-3x3-stride-2-eight-images", (8, 6, 5, 3), 4, 3, stride=2, padding=1, bias=False),
    _conv("conv-1x1", (2, 5, 4, 8), 6, 1, bias=False),
    _conv("conv-1x1-stride-2", (2, 5, 4, 8), 6, 1, stride=2),
    _conv("conv-1x1-padding", (2, 3, 3, 4), 2, 1, padding=1),
    _conv("conv-2x4", (2, 10, 7, 3), 5, (2, 4), stride=(3, 1), padding=(0, 2)),
    _conv("conv-1x3", (2, 5, 6, 4), 2, (1, 3), stride=(2, 1), padding=(0, 2)),
    _conv("conv-5x2", (2, 5, 6, 4), 2, (5, 2), stride=(1, 3), padding=(2, 1)),
    _conv("conv-5x3-leftover-rows", (2, 11, 5, 3), 5, (5, 3), stride=(4, 2), padding=(2, 0), bias=False),
]

_NORMS: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("batch-norm", (4, 5, 3, 6), {}),
    ("batch-norm-options", (3, 4, 5, 6), {"eps": 0.1, "momentum": 0.3}),
    ("batch-norm-two-values", (2, 1, 1, 6), {"eps": 0.1}),  # with less, dx is what cancels
    ("batch-norm-rows", (7, 6), {}),
    ("batch-norm-128-channels", (16, 8, 8, 128), {}),
    ("batch-norm-1500-channels", (3, 1, 2, 1500), {"eps": 0.1}),
    ("batch-norm-groups", (6, 5, 3, 6), {"group": 2}),
    ("batch-norm-groups-options", (9, 3, 2, 40), {"group": 3, "eps": 0.1, "momentum": 0.3}),
]
BATCH_NORMS = [
    Case(f"{name}-{'train' if train else 'eval'}", "batch_norm", shape, options, train, values="shifted")
    for train in (True, False)
    for name, shape, options in _NORMS
]

_POOLINGS: list[tuple[str, tuple[int, ...], str, dict[str, Any]]] = [
    ("3x3-stride-2", (2, 9, 8, 3), "normal", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("ties", (2, 9, 10, 3), "ties", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("all-equal", (1, 5, 5, 1), "equal", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("below-zero", (2, 8, 7, 3), "negative", {"kernel_size": 3, "stride": 1, "padding": 1}),
    ("2x2-odd", (2, 9, 7, 3), "normal", {"kernel_size": 2, "stride": 2, "padding": 0}),
    ("one-pixel", (2, 1, 1, 4), "normal", {"kernel_size": 3, "stride": 2, "padding": 1}),
    ("2x3", (2, 9, 8, 3), "ties", {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}),
]
OTHERS = [
    Case("linear", "linear", (4, 5), {"out_features": 3}),
    Case("linear-batch-1", "linear", (1, 300), {"out_features": 7}),
    *(
        Case(f"max-pool-{name}", "max_pool", shape, options, values=v)
        for name, shape, v, options in _POOLINGS
    ),
    Case("avg-pool", "avg_pool", (2, 9, 8, 3), {"kernel_size": 3, "stride": 2, "padding": 1}),
    Case(
        "avg-pool-2x3", "avg_pool", (2, 9, 8, 3), {"kernel_size": (2, 3), "stride": (1, 2), "padding": (1, 0)}
    ),
    Case("global-avg-pool", "global_avg_pool", (2, 3, 5, 4)),
    Case("global-avg-pool-one-pixel", "global_avg_pool", (1, 1, 1, 4)),
    *(
        Case(
            f"option-A-{i}-to-{o}-stride-{stride}",
            "option_a",
            (2, 7, 8, i),
            {"out_channels": o, "stride": stride},
        )
        for i, o, stride in [(2, 4, 2), (2, 5, 2), (3, 3, 2), (3, 4, 1), (2, 7, 3)]
    ),
    *(Case(kind, kind, (3, 5, 4, 2), values="with zeros") for kind in ("relu", "sigmoid", "flatten")),
    Case("loss", "loss", (6, 10)),
    Case("loss-large-logits", "loss", (6, 4), values="large"),
    Case("loss-batch-1", "loss", (1, 3)),
]

LAYERS = [*CONVOLUTIONS, *BATCH_NORMS, *OTHERS]

SINGLE_VALUES = [Case(f"batch-norm-{shape}", "batch_norm", shape) for shape in [(1, 1, 1, 4), (1, 4)]]

_BLOCKS: list[tuple[str, tuple[int, ...], str, str, dict[str, Any]]] = [  # with every kind of shortcut
    ("basic", (4, 7, 6, 4), "resnet18", "layer1", {"stage_sizes": (1,)}),
    ("basic-stride-2", (4, 9, 8, 4), "resnet18", "layer2", {"stage_sizes": (1, 2)}),
    ("basic-no-batch-norm", (1, 9, 8, 4), "resnet18", "layer2", {"stage_sizes": (1, 1), "batch_norm": False}),
    ("bottleneck", (4, 7, 6, 4), "resnet50", "layer1", {"stage_sizes": (2,)}),
    ("bottleneck-stride-2", (4, 9, 8, 16), "resnet50", "layer2", {"stage_sizes": (1, 1)}),
    ("bottleneck-v1", (4, 9, 8, 16), "resnet50", "layer2", {"stage_sizes": (1, 1), "stride_in_1x1": True}),
    ("bottleneck-bare", (1, 9, 8, 16), "resnet50", "layer2", {"stage_sizes": (1, 1), "batch_norm": False}),
    ("option-A", (4, 9, 8, 4), "resnet_cifar", "layer2", {"n": 1}),
    ("option-A-eight-images", (8, 9, 8, 4), "resnet_cifar", "layer2", {"n": 1}),
]
STAGES = [
    _stage(name, shape, model, stage, train=train, width=4, **options)
    for train in (True, False)
    for name, shape, model, stage, options in _BLOCKS
]

_DROPPED: dict[str, Any] = {"width": 4, "stage_sizes": (1, 2), "drop_path": 0.6}
_SMALL: dict[str, Any] = {"width": 4, "small_images": True}
NETWORKS = [  # thin; images so large that batch norm never divides by the deviation of few values
    _network("resnet-basic", (4, 47, 66, 3), "resnet18", width=4, stage_sizes=(1, 1, 1, 1)),
    _network("resnet-bottleneck", (4, 40, 33, 3), "resnet50", width=4, stage_sizes=(1, 2)),
    _network(
        "resnet-stride-in-1x1", (4, 16, 17, 1), "resnet101", **_SMALL, stage_sizes=(1, 1), stride_in_1x1=True
    ),
    _network("resnet-small-images", (4, 33, 35, 5), "resnet34", **_SMALL, stage_sizes=(1, 2)),
    _network(
        "resnet-no-batch-norm", (4, 32, 45, 3), "resnet50", width=4, stage_sizes=(1, 2), batch_norm=False
    ),
    _network("resnet-option-A", (4, 32, 33, 3), "resnet_cifar", n=1, width=3),
    _network("resnet-option-A-no-batch-norm", (4, 32, 32, 1), "resnet_cifar", n=1, width=4, batch_norm=False),
    _network(  # 17 x 17 pixels of an example do not fill NumPy's wide rows
        "resnet-basic-drop-path", (4, 33, 34, 3), "resnet18", width=4, stage_sizes=(1, 1), drop_path=0.5
    ),
    _network("resnet-bottleneck-drop-path", (4, 40, 33, 3), "resnet50", **_DROPPED),
    _network("resnet-option-A-drop-path", (8, 32, 33, 3), "resnet_cifar", n=1, width=3, drop_path=0.5),
    _network("resnet-groups", (4, 33, 34, 3), "resnet18", width=4, stage_sizes=(1, 1), batch_norm_group=2),
    _network("resnet-bottleneck-groups", (6, 40, 33, 3), "resnet50", **_DROPPED, batch_norm_group=3),
    _network(
        "resnet-option-A-groups",
        (8, 32, 33, 3),
        "resnet_cifar",
        n=1,
        width=3,
        drop_path=0.5,
        batch_norm_group=4,
    ),
    _network("resnet-drop-path-no-batch-norm", (4, 32, 33, 3), "resnet50", **_DROPPED, batch_norm=False),
    _network("cnn", (4, 33, 40, 3), "cnn", image_size=(33, 40), width=3),
    _network("resnet-basic-eval", (4, 47, 66, 3), "resnet18", train=False, width=4, stage_sizes=(1, 1, 1, 1)),
    _network("resnet-bottleneck-eval", (1, 40, 33, 3), "resnet50", train=False, width=4, stage_sizes=(1, 2)),
    _network("resnet-option-A-eval", (4, 32, 33, 3), "resnet_cifar", train=False, n=1, width=3),
]

SINGLE_PRECISION = [case for case in NETWORKS if case.name in ("resnet-bottleneck", "resnet-option-A")]

FULL = [  # slow
    _network("resnet101", (4, 64, 64, 3), "resnet101"),
    _network("resnet101-eval", (2, 64, 64, 3), "resnet101", train=False),
    _network("resnet32", (8, 32, 32, 3), "resnet32"),
]

SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {"name": "constant"},
    "cosine": {"name": "cosine", "warmup_steps": 50},
    "multistep": {"name": "multistep", "milestones": (300, 700), "factor": 0.1, "warmup_steps": 100},
}
_SUFFIX = {
    ("norm_weight_decay",): ["norms-apart"],
    ("norm_weight_decay", "bias_weight_decay"): ["norms-and-biases-apart"],
}
OPTIMIZERS = [
    Case(
        "-".join(
            [
                optimizer,
                schedule,
                "default" if decay is None else str(decay),
                *_SUFFIX.get(tuple(options), []),
            ]
        ),
        "optimizer",
        (1000,),
        {
            "optimizer": optimizer,
            "learning_rate": 0.05 if optimizer == "sgd" else 1e-2,
            "schedule": SCHEDULES[schedule],
            "optimizer_options": {"weight_decay": decay, **options},
        },
    )
    for optimizer in ("adam", "adabound", "amsbound", "adaboundw", "sgdbound", "amsgrad", "adamw", "sgd")
    for schedule, decay, options in [
        ("constant", None, {}),
        ("cosine", 0.03, {}),
        ("multistep", 0.0, {}),
        (
            "cosine",
            0.0,
            {
                "base_lr": 0.02,
                "final_lr": 0.3,
                "gamma": 3e-3,
                "b1": 0.8,
                "b2": 0.99,
                "eps": 1e-6,
                "momentum": 0.7,
            },
        ),
        ("cosine", 0.03, {"norm_weight_decay": 0.0}),
        ("cosine", 0.03, {"norm_weight_decay": 0.1, "bias_weight_decay": 0.01}),
    ]
]
OPTIMIZERS += [
    Case(
        f"sgd-nesterov-{decay}",
        "optimizer",
        (1000,),
        {
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "schedule": SCHEDULES["cosine"],
            "optimizer_options": {"nesterov": True, "momentum": 0.8, "weight_decay": decay},
        },
    )
    for decay in (0.0, 0.03)
]

TRAJECTORIES = [
    Case(
        f"trajectory-{optimizer}",
        "trajectory",
        (8, 16, 16, 3),
        {
            "model": "resnet18",
            "width": 4,
            "stage_sizes": (1, 1),
            "small_images": True,
            "optimizer": optimizer,
            "optimizer_options": options,
            "learning_rate": rate,
            "steps": 100,
        },
    )
    for optimizer, rate, options in [
        ("adam", 1e-3, {}),
        ("adabound", 1e-3, {"final_lr": 0.1, "weight_decay": 1e-3}),
        ("sgd", 0.1, {"weight_decay": 1e-3}),
    ]
]

# Everything at once; the tests of the pieces are in tests/test_training_pieces.py. Few steps: SGD with a
# large rate soon magnifies rounding.
TRAJECTORIES.append(
    Case(
        "trajectory-all-pieces",
        "trajectory",
        (8, 16, 16, 3),
        {
            "model": "resnet18",
            "width": 4,
            "stage_sizes": (1, 1),
            "small_images": True,
            "batch_norm_group": 4,
            "optimizer": "sgd",
            "optimizer_options": {
                "weight_decay": 1e-2,
                "norm_weight_decay": 0.0,
                "bias_weight_decay": 1e-3,
                "nesterov": True,
            },
            "learning_rate": 0.05,
            "steps": 24,
            "engine_options": {"clip_grad_norm": 1.0, "ema_decay": 0.8},
        },
        drop_path=0.5,
    )
)
