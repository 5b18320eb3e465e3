"""Transfer learning: a network that begins from the weights of another, trained elsewhere or on other data.

    python train.py --dataset fashion_mnist --model resnet18 --init-from weights.safetensors --freeze-backbone

The head `fc` is kept if it has as many classes, else it is a new one, from the seed. Everything is done here
in NumPy, on the engine-neutral tree, so that both engines begin from the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from experiment import weights
from experiment.config import Config
from experiment.engines import Engine
from experiment.errors import UserError
from experiment.identify import identify

HEAD = "fc."
STEMS = ("conv1.weight", "conv.weight")  # the first convolution: of the ResNets, of the CNN
NAMES = 4  # how many tensors of a kind a refusal names


def initial_tree(
    engine: Engine, config: Config, resolved: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any] | None:
    """The engine's initial tree {params, batch_stats, optimizer, step} with the tensors of --init-from.

    Args:
        engine: what is to be trained.
        config: its `init_from` is a safetensors file of torchvision's names; `linear.*` is read as `fc.*`,
            and `num_batches_tracked` is passed over. Without one there is no such tree.
        resolved: its `init_from_sha256` is that of the file.
        say: is told, in a line each, of a new head, of a stem whose channels were adapted, and of the numbers
            of trained and frozen parameters.

    Raises:
        UserError: the file is another than it was or no safetensors file, or tensors are missing, surplus or
            misshapen.
    """
    if config.init_from is None:
        return None
    path = Path(config.init_from)
    if sha256(config.init_from) != resolved["init_from_sha256"]:
        raise UserError(f"--init-from: {path} was changed since the run began; restore it, or start afresh")
    tree = engine.to_tree(engine.init())
    try:
        tensors = weights.load(path)
    except UserError as error:
        raise UserError(f"--init-from: {error}") from None
    given = {}
    for name, array in tensors.items():
        if not name.endswith("num_batches_tracked"):
            given["fc." + name.removeprefix("linear.") if name.startswith("linear.") else name] = array
    own = weights.from_tree(tree)
    shapes = {name: array.shape for name, array in given.items()}
    _adapt(own, given, say)
    if problems := _problems(own, given):
        found = ""
        with suppress(UserError):
            found = f"; the file is of {identify(shapes)}"
        raise UserError(
            f"--init-from: {path} does not fit the network: {problems}{found}; choose its --model"
        )
    for part in ("params", "batch_stats"):
        tree[part] = {name: given[name].astype(array.dtype) for name, array in tree[part].items()}
    trained, frozen = count_parameters(tree["params"], freeze_backbone=config.freeze_backbone)
    say(f"begun from {path}: {trained:,} parameters are trained, {frozen:,} are frozen")
    return tree


def sha256(path: str | None) -> str | None:
    """The SHA-256 of the file of --init-from, in hexadecimal. Raises UserError if it cannot be read."""
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"--init-from: {path} cannot be read ({error.strerror}); name another file") from None


def count_parameters(params: Mapping[str, np.ndarray], *, freeze_backbone: bool) -> tuple[int, int]:
    """How many numbers of {name: array} are trained, and how many are frozen."""
    total = sum(array.size for array in params.values())
    head = sum(array.size for name, array in params.items() if name.startswith(HEAD))
    return (head, total - head) if freeze_backbone else (total, 0)


def adapt_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
    """The first convolution's kernel [O, I, KH, KW] for pictures of other channels: 3 to 1, or 1 to 3.

    With the sum over its input channels a kernel of three makes of a grey picture what it made of the same
    picture in all three. A third of a kernel of one for each of three makes of a picture what it made of the
    mean of the three. Any other change leaves the kernel as it is.
    """
    wide: np.ndarray = kernel.astype(np.float64)
    if (kernel.shape[1], channels) == (3, 1):
        return np.asarray(wide.sum(1, keepdims=True))
    if (kernel.shape[1], channels) == (1, 3):
        return np.repeat(wide / 3, 3, axis=1)
    return kernel


def _adapt(own: Mapping[str, np.ndarray], given: dict[str, np.ndarray], say: Callable[[str], None]) -> None:
    """Give `given` the head and the stem that `own` needs."""
    head, wanted = given.get("fc.weight"), own["fc.weight"]
    if head is not None and head.shape[1:] == wanted.shape[1:] and len(head) != len(wanted):
        say(f"the head is new: {len(wanted)} classes, where the file has {len(head)}")
        given |= {name: array for name, array in own.items() if name.startswith(HEAD)}
    for name in STEMS:
        if name in own and given.get(name, np.empty(0)).ndim == 4:
            channels, before = own[name].shape[1], given[name].shape[1]
            given[name] = adapt_channels(given[name], channels)
            if channels != before == 3:
                say(f"{name}: summed over its 3 input channels, for pictures of 1")
            elif channels != before == 1:
                say(f"{name}: a third of it for each of the 3 channels of the pictures")


def _problems(own: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> str:
    """What is missing, surplus and misshapen, by name; empty if nothing is."""
    both = [name for name in own if name in given and given[name].shape != own[name].shape]
    kinds = {
        "missing": [name for name in own if name not in given],
        "surplus": [name for name in given if name not in own],
        "misshapen": [f"{name} {list(given[name].shape)}, not {list(own[name].shape)}" for name in both],
    }

    def words(names: list[str]) -> str:
        more = f" and {len(names) - NAMES} more" if len(names) > NAMES else ""
        return ", ".join(names[:NAMES]) + more

    return "; ".join(f"{kind} {words(names)}" for kind, names in kinds.items() if names)
