"""JAX engines of thin networks, batches for them, and the steps of any engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # processes of the tests need neither both engines nor PyTorch
    import torch

    from jax_resnet import Engine

# Another number of devices sums in another order: 1e-16 a step, and Adam in float64 keeps it at 1e-15 in 100.
FLOAT64_DEVICES = 1e-11
SHAPE = (16, 16, 3)
CLASSES = 5
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
THIN: dict[str, dict[str, Any]] = {
    "resnet18": {"width": 4, "stage_sizes": (1, 1)},
    # Without pooling: after it all values are positive, and the gradient of bn1.bias is 0 but for rounding,
    # which Adam makes a step of. Two layouts of PyTorch's own are then 1e-9 apart.
    "resnet50": {"width": 4, "stage_sizes": (1, 1), "small_images": True},
    "resnet8": {"width": 4},
    "resnet20": {"width": 4},
    "cnn": {"width": 4},
}
# What each optimizer has beside the parameters; those that are not {name: array} are scalars.
FIELDS = {
    "adam": {"count", "mu", "nu"},
    "adamw": {"count", "mu", "nu"},
    "amsgrad": {"count", "mu", "nu", "nu_max"},
    "adabound": {"count", "mu", "nu"},
    "amsbound": {"count", "mu", "nu", "nu_max"},
    "adaboundw": {"count", "mu", "nu"},
    "sgdbound": {"count", "mu"},
    "sgd": {"trace"},
}


def learning_rate(step: int) -> float:
    """Another one at every step, so that a step that is off by one is seen."""
    return 1e-3 / (1 + 0.3 * step)


def thin_options(model: str) -> dict[str, Any]:
    """The arguments that both engines have for a thin network in float64."""
    return {
        "model_options": THIN[model],
        "num_classes": CLASSES,
        "image_shape": SHAPE,
        "mean": MEAN,
        "std": STD,
        "optimizer_options": {"base_lr": 1e-3},
        "learning_rate": learning_rate,
        "precision": "float64",
    }


def make_engine(model: str = "resnet18", optimizer: str = "adam", **options: Any) -> Engine:
    from jax_resnet import Engine

    chunk = 1  # on a GPU too: tests/test_chunked.py has more
    return Engine(model=model, optimizer=optimizer, **{**thin_options(model), "chunk": chunk, **options})


def shared(model: str = "resnet18", optimizer: str = "adam") -> Engine:
    """An engine that several tests may use: it holds no state but its compiled programs, after `init`."""
    return _kept_engine(model, optimizer)


@cache
def _kept_engine(model: str, optimizer: str) -> Engine:
    return make_engine(model, optimizer)


def make_batches(count: int, size: int = 8, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.normal(size=(size, *SHAPE)),
            "label": rng.integers(CLASSES, size=size, dtype=np.int32),
        }
        for _ in range(count)
    ]


def train(engine: Any, state: Any, batches: Iterable[Mapping[str, np.ndarray]]) -> tuple[Any, list[dict]]:
    """All steps; the last state, and the metrics of each step as NumPy arrays."""
    metrics = []
    for latest in engine.train(state, batches):
        state = latest[0]
        metrics.append({name: np.asarray(value) for name, value in latest[1].items()})
    return state, metrics


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    leaves: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def nested(leaves: dict[str, np.ndarray]) -> dict:
    tree: dict[str, Any] = {}
    for path, value in leaves.items():
        *folders, name = path.split("/")
        inner = tree
        for folder in folders:
            inner = inner.setdefault(folder, {})
        inner[name] = value
    return tree


def assert_same_bits(actual: dict, expected: dict) -> None:
    found, wanted = flat(actual), flat(expected)
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


def oracle(model: str, tree: dict) -> torch.nn.Module:
    """The network in PyTorch with the parameters and statistics of a tree, in training mode."""
    import torch_oracle

    extra = {"image_size": SHAPE[:2]} if model == "cnn" else {}
    network = torch_oracle.MODELS[model](CLASSES, SHAPE[2], **THIN[model], **extra).double()
    torch_oracle.load_state_dict(network, {**tree["params"], **tree["batch_stats"]})
    return network.train()


def train_on_devices() -> dict[str, np.ndarray]:
    """20 steps and an evaluation of 5 images: the losses, the tree after step 10, and the logits; then
    losses, first gradient norms and averages of batches in two micro-batches, with all pieces of a recipe."""
    engine = shared()
    batches = make_batches(20)
    state, metrics = train(engine, engine.init(), batches[:10])
    tree = engine.to_tree(state)
    state, rest = train(engine, state, batches[10:])
    (logits,) = engine.evaluate(state, make_batches(1, size=5, seed=1))
    losses = np.array([step["loss"] for step in [*metrics, *rest]])
    accumulating = make_engine(
        accumulate=2,
        log_gradients=True,
        clip_grad_norm=0.5,
        ema_decay=0.7,
        optimizer_options={"weight_decay": 0.1, "norm_weight_decay": 0.0, "bias_weight_decay": 0.01},
        loss="bce",
        label_smoothing=0.1,
        class_weights=np.linspace(0.5, 2, CLASSES).tolist(),
    )
    rng = np.random.default_rng(3)
    factors = 1.5 * np.random.default_rng(2).integers(2, size=(16, accumulating.num_blocks))
    mixed = [
        {**batch, "drop_path": factors, "label2": np.roll(batch["label"], 1), "lam": rng.random(16)}
        for batch in make_batches(3, size=16)
    ]
    state, metrics = train(accumulating, accumulating.init(), mixed)
    average = flat(accumulating.to_tree(state)["ema"])
    averages = np.concatenate([array.reshape(-1) for _, array in sorted(average.items())])
    parts = np.array([step["loss"] for step in metrics])
    norms = np.array([value for name, value in sorted(metrics[0].items()) if name.startswith("grad_norm/")])
    results = {"losses": losses, "logits": logits, "parts": parts, "norms": norms, "averages": averages}
    return {**results, **flat(tree)}


# (images in a group, images of a batch, micro-batches). On 8 devices: a group on each; a group over each two;
# micro-batches that are one group, over all.
GROUPS = ((2, 16, 1), (4, 16, 1), (8, 16, 2))
GROUPED: dict[str, Any] = {"width": 2, "stage_sizes": (1, 1), "small_images": True}


def train_in_groups(
    make: Callable[..., Any],
    rows: Callable[[int], slice] = slice,
    cases: Iterable[tuple[int, int, int]] = GROUPS,
) -> dict[str, np.ndarray]:
    """Losses, logits and the tree after 4 steps with batch norm over groups, for each case.

    Args:
        make: `make_engine` of this module or of `numpy_engine`.
        rows: the part of a batch of N images that this process passes to the engine.
        cases: as `GROUPS`.
    """
    results: dict[str, np.ndarray] = {}
    for group, size, micro_batches in cases:
        accumulate = {"accumulate": micro_batches} if micro_batches > 1 else {}
        options = {**GROUPED, "batch_norm_group": group}
        engine = make(optimizer="sgd", model_options=options, **accumulate)
        batches = [{k: v[rows(size)] for k, v in batch.items()} for batch in make_batches(4, size)]
        state, metrics = train(engine, engine.init(), batches)
        arrays = {name: np.stack([step[name] for step in metrics]) for name in ("loss", "logits")}
        results |= {
            f"{group}/{name}": array for name, array in {**arrays, **flat(engine.to_tree(state))}.items()
        }
    return results
