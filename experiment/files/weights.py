"""State dicts as safetensors files: {torchvision parameter name: array in PyTorch's layout}."""

import hashlib
import json
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np

from experiment.errors import UserError
from experiment.files.identify import HEAD_NAMES, Shapes
from experiment.files.run_folder import write_file
from experiment.program import command
from experiment.reading import check_regular, read_bytes

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?"}
TYPES |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}
"""The types in a safetensors file as NumPy's. It has none for BF16: the upper half of a float32."""

# What torch.compile, FSDP and checkpointing of activations put into names, wherever a wrapped part begins.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
HEADS = (*HEAD_NAMES, "head.fc", "head", "classifier")  # beside a backbone: its last layer
FIRST_KERNELS = ("conv1.weight", "conv.weight")  # of the ResNets, of the small CNN
LARGEST = np.finfo(np.float32).max
HASH = "sha256"
"""The entry of a run's record in a weights file that holds `content_sha256`."""


def from_tree(tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state dict of a checkpoint tree: its parameters and batch statistics, or their averages if any."""
    network = tree.get("ema", tree)
    return {**network["params"], **network["batch_stats"]}


def load(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, from whatever program; bfloat16 as float32, which is exact.

    Raises:
        UserError: the file is absent, damaged, or has a type that no network here has; its tensors are not
            those whose hash is in it.
    """
    from safetensors import SafetensorError, deserialize

    try:
        content = read_bytes(path)
        entries = deserialize(content)  # type: ignore[no-untyped-call]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except SafetensorError as error:
        remedy = f"`{command('convert')}` makes one of PyTorch's files"
        raise UserError(f"{path}: no safetensors file, or a damaged one ({error}); {remedy}") from None
    tensors = {}
    for name, entry in sorted(entries, key=lambda item: item[0]):  # the library's order is another each time
        kind, data = entry["dtype"], entry["data"]
        if kind == "BF16":
            array = (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif kind in TYPES:
            array = np.frombuffer(data, TYPES[kind])
        else:
            raise UserError(f"{path}: {name} is of type {kind}; save it as one of {', '.join(TYPES)}, BF16")
        tensors[name] = array.reshape(entry["shape"])
    record = _record(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]))
    if (recorded := record.pop(HASH, None)) is None:
        sound = "identity" not in record  # else a version that writes both has written it
    else:
        sound = recorded == content_sha256(tensors, record)
    if not sound:
        raise UserError(f"{path}: its content differs from its SHA-256: it is damaged; take another copy")
    return tensors


def content_sha256(tensors: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a weights file's content in hexadecimal.

    Args:
        tensors: by name; their names, types, shapes and values count, in the order of the names.
        record: what the run has written about itself, without the hash.
    """
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
        digest.update(array.data)
    return digest.hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """Return what a run wrote about itself into its safetensors file: "model", "step", ...; else {}."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, "numpy") as file:
            return _record({"__metadata__": file.metadata()})
    except (OSError, SafetensorError):
        return {}


def _record(header: Mapping[str, Any]) -> dict[str, Any]:
    try:
        record = json.loads(header["__metadata__"]["run"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def step_of(path: Path) -> int | None:
    """Return the step that a run wrote into its safetensors file, or None if the file has none."""
    step = record_of(path).get("step")
    return step if isinstance(step, int) else None


def first_kernel(path: Path) -> np.ndarray | None:
    """Return the kernel [out, in, KH, KW] of a run's first convolution, or None if the file has none."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(path, "numpy") as file:  # reads this tensor alone
            name = next(name for name in FIRST_KERNELS if name in file.keys())  # noqa: SIM118
            return np.asarray(file.get_tensor(name))
    except (OSError, SafetensorError, StopIteration):
        return None


def load_network(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the network in a safetensors file, from whatever program, and the names that are not of it.

    The names are those of `network_names`, without the prefixes of wrappers.

    Raises:
        UserError: as `load` and `network_names` do.
    """
    tensors = load(path)
    try:
        names = network_names({name: array.shape for name, array in tensors.items()})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rest = sorted(tensors.keys() - set(names.values()))
    return {name: tensors[original] for name, original in names.items()}, rest


def network_names(shapes: Shapes) -> dict[str, str]:
    """Return {torchvision's name: name in the file} for the tensors of the network in a file.

    A network of the families here is found by its first block, under any prefix. Other tensors in the file
    (`n_averaged`, weights of a loss) are left out, except a head next to a backbone, which becomes `fc`. For
    any other network, only the prefix `module.` is removed, as often as every tensor but scalars has it.

    Args:
        shapes: {name in the file: shape}.

    Raises:
        UserError: several networks, or two tensors that would have one name.
    """
    originals = {WRAPPERS.sub("", name): name for name in shapes}
    if len(originals) < len(shapes):
        twice = next(name for name in shapes if originals[WRAPPERS.sub("", name)] != name)
        raise UserError(f"it holds {WRAPPERS.sub('', twice)} twice, with and without the name of a wrapper")
    prefixes = _prefixes(originals.keys())
    if len(prefixes) > 1:
        words = ", ".join(sorted(prefix.removesuffix(".") for prefix in prefixes))
        raise UserError(
            f"it holds several networks, under {words}: name one with --key of `{command('convert')}`"
        )
    if prefixes:
        prefix = prefixes[0]
    else:
        wrapped = [re.findall(r"^(?:module\.)*", name)[0] for name in originals if shapes[originals[name]]]
        prefix = min(wrapped, default="", key=len)
    names = {name.removeprefix(prefix): originals[name] for name in originals if name.startswith(prefix)}
    if prefixes and prefix and not {f"{head}.weight" for head in HEAD_NAMES} & names.keys():
        outer = re.sub(r"[^.]+\.$", "", prefix)
        for head in (f"{outer}{head}." for head in HEADS):
            if len(shapes.get(originals.get(f"{head}weight", ""), ())) == 2:
                names |= {
                    f"fc.{name.removeprefix(head)}": originals[name]
                    for name in originals
                    if name.startswith(head)
                }
                break
    return names


def _prefixes(names: Set[str]) -> list[str]:
    """Return the prefixes under which a ResNet's first block lies, or the convolution and head of a CNN."""
    prefixes = []
    for name in names:
        for end in ("layer1.0.conv1.weight", "conv.bias"):
            prefix = name.removesuffix(end)
            if prefix == name or prefix[-1:] not in ("", "."):
                continue
            if end != "conv.bias" or names & {f"{prefix}{head}.weight" for head in HEAD_NAMES}:
                prefixes.append(prefix)
    return [p for p in prefixes if not any(p != other and p.startswith(other) for other in prefixes)]


def check(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Raise UserError, naming the tensor, if values are none that a trained network has; see `fault`."""
    for name, values in tensors.items():
        if problem := fault(name, values):
            raise UserError(f"{path}: {problem}")


def fault(name: str, values: np.ndarray) -> str | None:
    """Return what is wrong with the values of a weight, bias or statistic, and the remedy; None if nothing.

    They are floating-point numbers, finite in float32, and variances are at least 0.
    """
    kind = name.rpartition(".")[2]
    if kind not in ("weight", "bias", "running_mean", "running_var"):
        return None
    if values.dtype.kind != "f":
        return f"{name} is of type {values.dtype}, and weights are floating-point numbers; save it as float32"
    infinite = ~(np.abs(values) <= LARGEST)
    if infinite.any():
        return (
            f"{name} has {infinite.sum():,} of {values.size:,} values that are NaN or infinite, the first at "
            f"{_first(infinite)}; take an earlier checkpoint of that training"
        )
    if kind == "running_var" and (values < 0).any():
        return (
            f"{name} has a variance below 0, the first at {_first(values < 0)}, which no training gives; "
            "take another copy of the file"
        )
    return None


def _first(mask: np.ndarray) -> list[int]:
    """Return the index of the first True."""
    return [int(i) for i in np.unravel_index(mask.argmax(), mask.shape)]


def save(path: Path, state_dict: Mapping[str, np.ndarray], metadata: Mapping[str, Any]) -> None:
    """Write a safetensors file, whole or not at all; the same content gives the same bytes."""
    from safetensors.numpy import save as serialize

    tensors = {name: np.ascontiguousarray(array) for name, array in state_dict.items()}
    # One entry only: the library writes several in an order that changes from call to call.
    header = {"run": json.dumps({**metadata, HASH: content_sha256(tensors, metadata)})}
    write_file(path, serialize(tensors, header))
