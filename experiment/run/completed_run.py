"""A completed run, opened for use: its options, and its network with the weights, on either engine."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiment.engines import Engine, load_engine, set_environment
from experiment.errors import UserError, first_of
from experiment.files import results, run_folder, weights
from experiment.files.arrays import differences
from experiment.files.results import WEIGHTS
from experiment.options.command_line import Parser
from experiment.options.config import FRAMEWORKS, Config, parse_image_size
from experiment.options.resolving import resolve
from experiment.program import found


@dataclass(frozen=True)
class CompletedRun:
    """A completed run, as `open_run` returns it.

    Attributes:
        config: the run's options.
        resolved: what followed from them and the data: `class_names`, `image_shape`, `mean`, `std`, ...
        engine: what computes.
        state: its state, with the weights.
    """

    config: Config
    resolved: dict[str, Any]
    engine: Engine
    state: Any

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that it takes: of those that it was trained on, or of
        `--test-size`."""
        height, width, channels = self.resolved["image_shape"]
        return height, width, channels

    def logits(self, images: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The logits [N, num_classes] of each batch of images, uint8 [N, H, W, C]."""
        return self.engine.evaluate(self.state, ({"image": image} for image in images))


def add_run(parser: Parser) -> None:
    """Add the arguments of a command that say which run it opens, and how: RUN, --framework, --weights."""
    add = parser.add_argument
    parser.add_path("run", metavar="RUN", any_bytes=True, help="the folder of a run")
    add("--framework", choices=FRAMEWORKS, help="engine that computes (default: the run's)")
    add("--weights", choices=list(WEIGHTS), default="final", help="which of the run's (default final)")


def open_run(
    run_dir: Path,
    *,
    which: str = "final",
    framework: str | None = None,
    data_dir: str | None = None,
    widen: bool = False,
) -> CompletedRun:
    """Open the folder of a run; nothing in it is changed.

    Args:
        run_dir: the folder.
        which: "final", the weights after the last step, or "best", the best on validation.
        framework: the engine, by default the run's own.
        data_dir: where TFDS keeps its data, by default as when the run began.
        widen: compute in float32 what the run computed in bfloat16; its weights are float32.

    Raises:
        UserError: no folder of a run; its files are damaged; the weights are absent, of another network or of
            another step than the run; an engine that cannot do the run's precision.
    """
    run_dir = found(run_dir)
    if not run_dir.exists():
        raise UserError(f"{run_dir}: not found; name the folder of a run")
    record = run_folder.read_named_record(run_dir)
    given = {"framework": framework, "data_dir": data_dir}
    # Options of training: those that one engine lacks, and the average, which the weights are already
    stored = {**record["config"], "accumulate": 1, "remat": False, "model_ema_decay": None}
    resolved = record["resolved"]
    if stored.get("test_size"):  # what is evaluated is of that size
        stored |= {"image_size": stored["test_size"], "test_size": None, "resize": ()}
        size = parse_image_size(stored["image_size"], "--test-size")
        resolved = {**resolved, "image_shape": [*size, resolved["image_shape"][2]]}
    if widen and stored.get("precision") == "bfloat16":
        stored["precision"] = "float32"
    config = resolve({name: value for name, value in given.items() if value is not None}, stored)
    set_environment(config.framework, deterministic=config.deterministic)
    path = run_dir / WEIGHTS[which]
    if not path.is_file():
        remedy = {
            "final": "a run has it at its end: continue it with --resume, or take --weights best",
            "best": "without validation there is no best; take --weights final",
        }
        raise UserError(f"{path}: not found; {remedy[which]}")
    tensors = weights.load(path)
    weights.check(path, tensors)
    results.check_weights(run_dir, which)
    results.check_identity(path, record)
    try:
        engine = load_engine(config.framework)(
            **config.engine_options(),
            **{name: resolved[name] for name in run_folder.ENGINE_FACTS if name != "image_shape"},
            image_shape=tuple(resolved["image_shape"]),
            optimizer="sgd",  # none is needed
            optimizer_options={},
            learning_rate=lambda step: 0.0,
        )
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{run_dir / 'config.json'}: is not what a run writes ({error}); restore it"
        ) from None
    tree = engine.to_tree(engine.init())
    network = {name: tree[name] for name in ("params", "batch_stats")}
    loaded = {part: {name: tensors[name] for name in network[part] if name in tensors} for part in network}
    unexpected = tensors.keys() - weights.from_tree(network).keys()
    lines = [*differences(network, loaded), *(f"{name} is unexpected" for name in sorted(unexpected))]
    if lines:
        raise UserError(f"{path}: is of another network: {first_of(lines, 3)}; restore the file")
    return CompletedRun(config, resolved, engine, engine.from_tree({**tree, **loaded}))
