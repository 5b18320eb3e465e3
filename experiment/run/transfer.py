"""Transfer learning: start from the weights of another network, trained elsewhere or on other data.

    python train.py --dataset fashion_mnist --model resnet18 --init-from weights.safetensors --freeze-backbone
    python train.py --dataset cifar10 --model resnet101 --init-from hf://timm/resnet101.a1_in1k

The head `fc` is kept if it has as many classes, else it is a new one, from the seed. Everything is done here
in NumPy, on the engine-neutral tree, so that both engines begin from the same bits.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment.engines import Engine
from experiment.errors import UserError, first_of
from experiment.files import hub, weights
from experiment.files.identify import Shapes, identify, summary, torchvision_name
from experiment.files.run_folder import file_sha256
from experiment.options.config import Config
from experiment.options.paths import HUB

HEAD = "fc."
STEMS = ("conv1.weight", "conv.weight")  # the first convolution: of the ResNets, of the CNN
NAMES = 4  # at most so many shape mismatches are listed in an error message


def initial_tree(
    engine: Engine, config: Config, resolved: Mapping[str, Any], report: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return the engine's initial tree {params, batch_stats, optimizer, step}, with tensors of --init-from.

    Args:
        engine: what is to be trained.
        config: its `init_from` is a safetensors file of torchvision's names, under any prefix
            (`weights.network_names`), or hf://OWNER/NAME (`files/hub.py`); `linear.*` is read as `fc.*`, and
            `num_batches_tracked` is passed over. If it is None, the result is None.
        resolved: its `init_from_sha256` is that of the file, `init_from_commit` that of hf://.
        report: called with a line about each of these: tensors beside the network, a new head, a stem whose
            channels were adapted, the numbers of trained and frozen parameters.

    Raises:
        UserError: the file is another than it was or no safetensors file; tensors are missing, unexpected or
            of another shape; values are not finite or are integers.
    """
    if config.init_from is None:
        return None
    path, found = _located(config.init_from, resolved.get("init_from_commit"))
    if found["init_from_sha256"] != resolved["init_from_sha256"]:
        name = config.init_from
        raise UserError(f"--init-from: {name} was changed since the run began; restore it, or start afresh")
    tree = engine.to_tree(engine.init())
    try:
        tensors, rest = weights.load_network(path)
        weights.check(path, tensors)
    except UserError as error:
        raise UserError(f"--init-from: {error}") from None
    counted = {name: array for name, array in tensors.items() if not name.endswith("num_batches_tracked")}
    given = {torchvision_name(name): array for name, array in counted.items()}
    expected = weights.from_tree(tree)
    shapes = {name: array.shape for name, array in given.items()}
    if rest:
        report(f"left out of {path}, as it lies beside the network: {summary(rest)}")
    _adapt(expected, given, report)
    if problems := _problems(expected, given):
        what_to_do = remedy({name: array.shape for name, array in expected.items()}, shapes)
        raise UserError(f"--init-from: {path} does not fit the network: {problems}; {what_to_do}")
    for part in ("params", "batch_stats"):
        tree[part] = {name: given[name].astype(array.dtype) for name, array in tree[part].items()}
    if "ema" in tree:
        tree["ema"] = {part: tree[part] for part in ("params", "batch_stats")}
    trained, frozen = count_parameters(tree["params"], freeze_backbone=config.freeze_backbone)
    report(f"begun from {config.init_from}: {trained:,} parameters are trained, {frozen:,} are frozen")
    return tree


def identity(init_from: str | None) -> dict[str, str | None]:
    """Return what config.json keeps of --init-from: the file's SHA-256; of one on the Hub, also the commit.

    Raises UserError if it cannot be read.
    """
    return {"init_from_sha256": None} if init_from is None else _located(init_from)[1]


def recorded(resolved: Mapping[str, Any]) -> dict[str, str | None]:
    """Return what `identity` returned when the run began."""
    commit = {name: resolved[name] for name in ("init_from_commit",) if name in resolved}
    return {"init_from_sha256": resolved.get("init_from_sha256"), **commit}


def _located(init_from: str, commit: str | None = None) -> tuple[Path, dict[str, str | None]]:
    """Return the file of --init-from, of the Hub at that commit, and its identity."""
    if not init_from.startswith(HUB):
        return Path(init_from), {"init_from_sha256": sha256(init_from)}
    try:
        file = hub.fetch(init_from, commit)
    except UserError as error:
        raise UserError(f"--init-from: {error}") from None
    return file.path, {"init_from_sha256": file.sha256, "init_from_commit": file.commit}


def sha256(path: str | None) -> str | None:
    """Return the SHA-256 of the file of --init-from, in hexadecimal. Raises UserError if it is unreadable."""
    if path is None:
        return None
    try:
        return file_sha256(Path(path))
    except OSError as error:
        raise UserError(f"--init-from: {path} cannot be read ({error.strerror}); name another file") from None


def count_parameters(params: Mapping[str, np.ndarray], *, freeze_backbone: bool) -> tuple[int, int]:
    """Return how many numbers of {name: array} are trained, and how many are frozen."""
    total = sum(array.size for array in params.values())
    head = sum(array.size for name, array in params.items() if name.startswith(HEAD))
    return (head, total - head) if freeze_backbone else (total, 0)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first convolution's kernel [O, I, KH, KW] for images of other channels: 3 to 1, or 1 to 3.

    3 to 1: the sum over the input channels. The output for a gray image is that of the given kernel for the
    image repeated in three channels. 1 to 3: a third of the kernel for each channel. The output for an image
    is that of the given kernel for the mean of its channels.
    Any other change leaves the kernel as it is.
    """
    wide: np.ndarray = kernel.astype(np.float64)
    if (kernel.shape[1], channels) == (3, 1):
        return np.asarray(wide.sum(1, keepdims=True))
    if (kernel.shape[1], channels) == (1, 3):
        return np.repeat(wide / 3, 3, axis=1)
    return kernel


def _adapt(
    expected: Mapping[str, np.ndarray], given: dict[str, np.ndarray], report: Callable[[str], None]
) -> None:
    """Give `given` the head and the stem that `expected` needs."""
    head, new_head = given.get("fc.weight"), expected["fc.weight"]
    if head is not None and head.shape[1:] == new_head.shape[1:] and len(head) != len(new_head):
        report(f"the head is new: {len(new_head)} classes, where the file has {len(head)}")
        given |= {name: array for name, array in expected.items() if name.startswith(HEAD)}
    for name in STEMS:
        if name in expected and given.get(name, np.empty(0)).ndim == 4:
            channels, before = expected[name].shape[1], given[name].shape[1]
            given[name] = adapt_channels(given[name], channels)
            if channels != before == 3:
                report(f"{name}: summed over its 3 input channels, for images of 1")
            elif channels != before == 1:
                report(f"{name}: a third of it for each of the 3 channels of the images")


def _problems(expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> str:
    """Return what is missing, unexpected and of another shape; empty if nothing is."""
    both = [name for name in expected if name in given and given[name].shape != expected[name].shape]
    shapes = [f"{name} {list(given[name].shape)}, not {list(expected[name].shape)}" for name in both]
    kinds = {
        "missing": summary(name for name in expected if name not in given),
        "unexpected": summary(name for name in given if name not in expected),
        "shape mismatch": first_of(shapes, NAMES, ", "),
    }
    return "; ".join(f"{kind} {words}" for kind, words in kinds.items() if words)


def remedy(expected: Shapes, given: Shapes) -> str:
    """Return which network a file that does not fit holds, and what to do: the flags to set, if any.

    Args:
        expected: {name: shape} of the network that the flags choose.
        given: those of the file.
    """
    try:
        network, chosen = identify(given), identify(expected)
    except UserError as error:
        # Where names differ, the list of names has shown which tensors no network here has
        return "name another file" if expected.keys() != given.keys() else f"{error}; name another file"
    fixed = []
    if network.options.get("stage_sizes") not in (None, chosen.options.get("stage_sizes")):
        fixed.append("stage_sizes")
    if network.options["width"] not in (network.usual_width, chosen.options["width"]):
        fixed.append("width")
    if fixed:
        return f"the file is of {network}; no flag sets its {' and '.join(fixed)}: name another file"
    steps = [f"choose --model {network.model}"] if network.model != chosen.model else []
    for option, usual, flag in (
        ("batch_norm", True, "--no-batch-norm"),
        ("small_images", False, "--small-images"),
    ):
        value = network.options.get(option, usual)
        if value != chosen.options.get(option, usual):
            steps.append(f"leave {flag} out" if value == usual else f"add {flag}")
    if network.model == "cnn" and network.image_size != chosen.image_size:
        steps.append("add --image-size {}x{}".format(*network.image_size))
    return f"the file is of {network}: {', '.join(steps)}" if steps else "name another file"
