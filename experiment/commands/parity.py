"""`python -m experiment parity WEIGHTS [IMAGE]`: one network in three implementations, stage by stage.

For whoever ports a model: the first stage that departs shows where to look. `parity FILE.py` compares two
models that the file defines, with the package `parity`.
"""

import argparse
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiment.data.augmentation import fit_image
from experiment.data.images import read_image
from experiment.data.types import IMAGENET
from experiment.engines import load_module, set_environment
from experiment.errors import UserError, first_of
from experiment.files import hub, weights
from experiment.files.identify import Network, identify
from experiment.options.command_line import Parser
from experiment.options.config import MODELS, check_limits, parse_image_size
from experiment.program import command, found

Stages = Mapping[str, np.ndarray]

# Relative to a tensor's largest magnitude. In ResNet-101 two right answers differ by 1e-5 and 2e-14 with the
# running statistics. In training mode the last batch norms divide by deviations of few values: 5e-4 and 2e-12
# with four images of 64x64.
TOLERANCES = {"float32": 1e-4, "float64": 1e-12}
TOLERANCES_TRAIN = {"float32": 1e-2, "float64": 1e-10}
VARIATIONS = 3


def main(argv: Sequence[str]) -> int:
    """Print the table; return 0 if all agree, 1 if a stage departs.

    Raises:
        UserError: a file that is absent or damaged, weights of an unknown network, arguments that do not fit.
    """
    options = _parser().parse_args(argv)
    options.weights = found(hub.local_file(options.weights))
    if options.weights.suffix == ".py":
        return _compare_file(options, argv)
    options.image = None if options.image is None else found(options.image)
    check_limits("--seed", options.seed, least=0)
    if options.tolerance is not None:
        check_limits("--tolerance", options.tolerance, least=0)
    if options.dump is not None and (options.dump.exists() or not options.dump.parent.is_dir()):
        fault = "exists; remove it" if options.dump.exists() else "there is no such folder; make it"
        raise UserError(f"--dump: {options.dump}: {fault}, or give another name")
    tensors, _ = weights.load_network(options.weights)
    shapes = {name: array.shape for name, array in tensors.items()}
    try:
        network = identify(shapes, options.model, stride_in_1x1=options.stride_in_1x1)
    except UserError as error:
        raise UserError(f"{options.weights}: {error}") from None
    image, source = _input(options, network)
    outputs = _outputs(options, network, tensors, image)
    if options.dump is not None:
        ours = {name: _layout(array, options.layout) for name, array in outputs["numpy"].items()}
        weights.save(options.dump, ours, {"model": network.model, "layout": options.layout})
    if options.reference is not None:
        outputs["reference"] = _reference(options, outputs["numpy"])
    print(f"{options.weights}: {network}\ninput: {source}")
    if "torch" not in outputs:
        print("PyTorch is not installed (the extra `test` brings it): two engines, without the reference")
    mode, tolerances = ("training", TOLERANCES_TRAIN) if options.train else ("evaluation", TOLERANCES)
    tolerance = tolerances[options.precision] if options.tolerance is None else options.tolerance
    return _report(outputs, tolerance, mode, options.precision)


def _compare_file(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Compare the two models that a Python file defines, by the package `parity`."""
    from parity.__main__ import main as compare_file

    if len(argv) > 1:
        raise UserError(f"{options.weights} defines its own inputs and precision: give it no other argument")
    return compare_file([str(options.weights)])


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=command("parity"),
        description="Run one network in every implementation and compare what each of its stages gives: "
        "NumPy, JAX, PyTorch where it is installed, and with --reference your own program. Given a FILE.py "
        "that defines `reference`, `candidate` and `inputs`, compare these two models instead.",
        epilog="Exit status: 0 if all agree, 1 if a stage departs, 2 for a mistake in the arguments.",
    )
    add, add_path = parser.add_argument, parser.add_path
    add_path(
        "weights",
        metavar="WEIGHTS",
        hub=True,
        help="a safetensors state dict: torchvision's, timm's or ours; hf://OWNER/NAME; or a FILE.py with "
        "two models",
    )
    add_path("image", metavar="IMAGE", nargs="?", help="an image; without one, random numbers")
    add("--model", choices=MODELS, help="default: by the tensors")
    add("--stride-in-1x1", action="store_true", help="the paper's place of a bottleneck's stride (v1)")
    size = "96, or 64x96 (height x width); default 224, or 32 by the 3x3 stem"
    add("--image-size", metavar="SIZE", help=size)
    add("--mean", type=float, nargs="+", metavar="X", help="a channel, on the scale 0..1; default ImageNet's")
    add("--std", type=float, nargs="+", metavar="X", help="likewise; for other than three channels 0 and 1")
    add("--seed", type=int, default=0, help="of random numbers; default 0")
    add("--train", action="store_true", help="batch statistics, of the image and noisy copies of it")
    add("--precision", choices=list(TOLERANCES), default="float32", help="default float32")
    add("--tolerance", type=float, help="of a tensor's largest magnitude; default by the precision and mode")
    add_path("--reference", metavar="FILE", help="a safetensors file of stages that your program gave")
    add_path("--dump", metavar="FILE", help="write the input and the NumPy engine's stages as such a file")
    add("--layout", choices=["NCHW", "NHWC"], default="NCHW", help="of both files; default PyTorch's NCHW")
    return parser


def _input(options: argparse.Namespace, network: Network) -> tuple[np.ndarray, str]:
    """Return the input of all implementations, [N, H, W, C] in the precision, and its description."""
    size = network.image_size
    if options.image_size is not None:
        size = parse_image_size(options.image_size)
        if network.model == "cnn" and size != network.image_size:
            raise UserError(f"--image-size: the weights are for images of {network.image_size[0]} only")
    rng = np.random.default_rng(options.seed)
    count, channels = 1 + VARIATIONS if options.train else 1, network.in_channels
    shape = (*size, channels)
    if options.image is None:
        image = rng.normal(size=(count, *shape))
        return image.astype(options.precision), f"standard normal numbers of seed {options.seed}"
    mean, std = _statistics(options, channels)
    if channels not in (1, 3):
        raise UserError(f"IMAGE: no image has {channels} channels; leave it out for random numbers")
    image = (fit_image(read_image(options.image, channels), size) / 255 - mean) / std
    # Batch norm over copies of one image would divide by deviations of nearly nothing
    image = np.stack([image, *(image + rng.normal(size=(count - 1, *shape)))])
    mean_words, std_words = (" ".join(f"{number:g}" for number in numbers) for numbers in (mean, std))
    source = f"{options.image}, mean {mean_words}, std {std_words}"
    if options.train:
        source += f", and {VARIATIONS} copies with standard normal noise of seed {options.seed}"
    return image.astype(options.precision), source


def _statistics(options: argparse.Namespace, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel."""
    usual = IMAGENET if channels == 3 else ((0.0,) * channels, (1.0,) * channels)
    mean, std = (
        tuple(given) * (channels if len(given) == 1 else 1) if given else default
        for given, default in zip((options.mean, options.std), usual, strict=True)
    )
    for flag, values in (("--mean", mean), ("--std", std)):
        if len(values) != channels:
            fault = f"{len(values)} numbers for {channels} channels"
            raise UserError(f"{flag}: {fault}; give one, or one for each")
    if not all(map(math.isfinite, mean)):
        raise UserError("--mean: give finite numbers")
    if not all(0 < value < math.inf for value in std):
        raise UserError("--std: give numbers above 0")
    return mean, std


def _outputs(
    options: argparse.Namespace, network: Network, tensors: Stages, image: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """The input and every stage, of each implementation that is installed."""
    set_environment("jax", deterministic=False)
    runs: dict[str, Callable[..., dict[str, np.ndarray]]] = {
        name: load_module(name, "stages").run_stages for name in ("numpy", "jax")
    }
    if importlib.util.find_spec("torch") is not None:
        import torch_oracle.stages

        runs["torch"] = torch_oracle.stages.run_stages
    arguments: dict[str, Any] = {"train": options.train, "precision": options.precision, **network.options}
    outputs = {}
    for name, run in runs.items():
        try:
            stages = run(network.model, tensors, image, network.num_classes, **arguments)
        except ValueError as error:  # names that do not fit, or batch norm over a single value
            faults = first_of(str(error).split("; "), 8)
            raise UserError(f"{options.weights}: as {network.model}: {faults}") from None
        outputs[name] = {"input": image, **stages}
    return outputs


def _layout(array: np.ndarray, layout: str) -> np.ndarray:
    """[N, H, W, C] in the layout of the files; arrays without height and width as they are."""
    return array.transpose(0, 3, 1, 2) if layout == "NCHW" and array.ndim == 4 else array


def _reference(options: argparse.Namespace, ours: Stages) -> dict[str, np.ndarray]:
    """The stages of another program, [N, H, W, C]; it may have left some out."""
    path = options.reference
    stages = weights.load(path)
    unknown = [name for name in stages if name not in ours]
    if unknown or not stages:
        fault = f"unknown name {unknown[0]}" if unknown else "it is empty"
        raise UserError(f"--reference: {path}: {fault}; the names are {', '.join(ours)}")
    for name, array in stages.items():
        shape = _layout(ours[name], options.layout).shape
        if array.shape != shape:
            raise UserError(
                f"--reference: {path}: {name} has shape {list(array.shape)}, not {list(shape)} "
                f"({options.layout}; see --layout, --image-size and --train)"
            )
    back = (0, 2, 3, 1) if options.layout == "NCHW" else (0, 1, 2, 3)
    return {name: array.transpose(back) if array.ndim == 4 else array for name, array in stages.items()}


def _report(outputs: Mapping[str, Stages], tolerance: float, mode: str, precision: str) -> int:
    """Print the table and the result; return the exit status."""
    import parity

    pairs = list(itertools.combinations(outputs, 2))
    reports = {}
    for a, b in pairs:
        common = [stage for stage in outputs["numpy"] if stage in outputs[a] and stage in outputs[b]]
        theirs, ours = ({stage: outputs[engine][stage] for stage in common} for engine in (b, a))
        reports[a, b] = parity.compare_tensors(theirs, ours, tolerance)
    cells = {
        (pair, tensor.reference): f"{tensor.error:.1e}{'!' if tensor.departs else ' '}"
        for pair, report in reports.items()
        for tensor in report.tensors
    }
    print(f"{precision}, {mode} mode; differences relative to each tensor's largest magnitude\n")
    titles = [f"{a}-{b}" for a, b in pairs]
    print(" ".join([f"{'stage':<8}{'shape':<22}{'largest':>9}", *(f"{title:>16}" for title in titles)]))
    for stage, array in outputs["numpy"].items():
        shape = "x".join(map(str, array.shape))
        errors = [f"{cells.get((pair, stage), '- '):>16}" for pair in pairs]
        print(" ".join([f"{stage:<8}{shape:<22}{np.abs(array).max():>9.3g}", *errors]).rstrip())
    order = list(outputs["numpy"])
    departed = [
        (pair, report.first_difference)
        for pair, report in reports.items()
        if report.first_difference is not None
    ]
    if not departed:
        print(f"\nall agree within {tolerance:g}")
        return 0
    (a, b), first = min(departed, key=lambda item: (order.index(item[1].reference), -item[1].error))
    print(f"\n{first.reference} is the first stage that departs: {a} against {b}")
    print(f"{first.distance} (NHWC)\n{first.cause}")
    return 1
