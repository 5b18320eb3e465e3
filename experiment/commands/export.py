"""`python -m experiment export RUN`: a run's network for other programs, and a model card.

Each file is read back from the disk, run, and compared with the run by the package `parity`
(`commands/certify.py`). If one does not agree, nothing is written.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from experiment.commands import certify
from experiment.commands.certify import Check, Images
from experiment.data import loading
from experiment.engines import Batch, Engine, load_module
from experiment.errors import RunFailedError, UserError
from experiment.files import onnx_graph, run_folder, weights
from experiment.files.results import WEIGHTS
from experiment.options.command_line import Parser
from experiment.options.config import Config, check_limits
from experiment.options.resolving import resolve
from experiment.program import command, found, install_command
from experiment.report.model_card import ExportedFile, model_card
from experiment.run.completed_run import CompletedRun, add_run, open_run
from experiment.run.session import make_engine

FORMATS = {"onnx": ("onnx", "onnxruntime"), "stablehlo": (), "pth": ("torch",)}
"""What can be written, and the packages it needs."""

EXTRAS = {"onnx": "export", "onnxruntime": "export", "torch": "test"}
CARD = "README.md"


def main(argv: Sequence[str]) -> int:
    """Write a folder of exported files and a model card; return 0, or 1 if a file departs from the run.

    Raises:
        UserError: no completed run; the output is in the way; a package is missing.
    """
    options = _parser().parse_args(argv)
    formats = [name for name in FORMATS if name in (options.format or FORMATS)]
    run_dir = found(options.run)
    out: Path = options.out or run_dir / "export"
    _check(options, formats, run_dir, out)
    os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")  # a GPU would compute in TF32
    run = open_run(
        run_dir, which=options.weights, framework=options.framework, data_dir=options.data_dir, widen=True
    )
    export = _Export(options, run, run_dir, certify.take_images(run, _load_data(run)))
    try:
        with _whole_folder(out) as folder:
            export.write(formats, folder)
    except RunFailedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=command("export"),
        description="Write a run's network for other programs: ONNX (model.onnx), StableHLO of the network "
        "and of the training step (network.stablehlo, training_step.stablehlo), a PyTorch state dict "
        f"(model.pth), and a model card ({CARD}). Each file is read back and compared with the run.",
        epilog=f"ONNX needs the extra `export`: {install_command('export')}; model.pth needs PyTorch, which "
        "the extra `test` brings. Exit status: 1 if a file does not agree with the run.",
    )
    add = parser.add_argument
    add_run(parser)
    add("--format", choices=list(FORMATS), nargs="+", help="default: all of them")
    parser.add_path("--out", metavar="DIR", help="a new folder (default: RUN/export)")
    add("--batch-size", type=int, metavar="N", help="of the exported training step (default: the run's)")
    parser.add_data_dir("where TFDS keeps its data (default: the run's)")
    return parser


def _check(options: argparse.Namespace, formats: Sequence[str], run_dir: Path, out: Path) -> None:
    """Raise UserError for what is wrong with the arguments, before anything is computed."""
    if options.batch_size is not None:
        check_limits("--batch-size", options.batch_size, least=2)
    if run_dir.is_dir():
        run_folder.read_named_record(run_dir)
    else:
        raise UserError(
            f"{run_dir}: {'is no folder' if run_dir.exists() else 'not found'}; name the folder of a run"
        )
    for name in formats:
        for package in FORMATS[name]:
            if importlib.util.find_spec(package) is None:
                extra = EXTRAS[package]
                raise UserError(
                    f"--format {name}: needs {package}, which the extra `{extra}` brings: run "
                    f"`{install_command(extra)}`, or name the other formats"
                )
    if os.path.lexists(out):
        raise UserError(f"--out: {out} exists; remove it, or name another folder")
    if not out.parent.is_dir():
        raise UserError(f"--out: there is no folder {out.parent}; make it first")


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `out` that becomes `out` at the end, or is removed after an error."""
    try:
        parent = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror}); name another folder") from None
    try:
        folder = parent / out.name
        folder.mkdir()
        yield folder
        os.rename(folder, out)
    finally:
        shutil.rmtree(parent, ignore_errors=True)


def _load_data(run: CompletedRun) -> loading.Data | str:
    """Return the run's data set, or why it is not at hand."""
    try:
        data = loading.load(
            run.config.dataset,
            **(run.config.data_options() | {"augment": "none"}),
            recorded=run_folder.recorded_data(run.resolved),
        )
        run_folder.check_same_data(run.resolved, data)
    except UserError as error:
        return str(error)
    return data


@dataclasses.dataclass(frozen=True)
class _Export:
    """What the exporters need. The method of a format writes its files and compares them with the run."""

    options: argparse.Namespace
    run: CompletedRun
    run_dir: Path
    images: Images

    def write(self, formats: Sequence[str], folder: Path) -> None:
        """Write the files of the formats and the card; raise RunFailedError if one departs from the run."""
        files: list[ExportedFile] = []
        checks: list[Check] = []
        for name in formats:
            written, compared = getattr(self, name)(folder)
            files += written
            for check in compared:
                print(check, flush=True)
                if not check.agrees:
                    raise RunFailedError(f"{check.file} does not agree with the run, so nothing is written")
            checks += compared
        card = model_card(
            self.run_dir,
            self.options.weights,
            self.run.config,
            self.run.image_shape,
            files,
            checks,
            self.images.note,
            folder,
        )
        (folder / CARD).write_text(card, encoding="utf-8")

    @property
    def weights_file(self) -> Path:
        """The run's own file of weights."""
        return self.run_dir / WEIGHTS[self.options.weights]

    def onnx(self, folder: Path) -> tuple[list[ExportedFile], list[Check]]:
        """Write model.onnx."""
        run, path = self.run, folder / "model.onnx"
        resolved = run.resolved
        metadata = {
            "mean": resolved["mean"],
            "std": resolved["std"],
            "layout": "NCHW, float32, (x / 255 - mean) / std",
            "class_names": resolved["class_names"],
            "weights_sha256": run_folder.file_sha256(self.weights_file),
        }
        content = onnx_graph.build(
            weights.load(self.weights_file),
            run.image_shape,
            stride_in_1x1=run.config.stride_in_1x1,
            metadata=metadata,
        )
        path.write_bytes(content)
        loaded = path.read_bytes()
        checks = certify.logits(
            path.name,
            run,
            self.images,
            lambda image: onnx_graph.run(loaded, certify.normalized(run, image).transpose(0, 3, 1, 2)),
            precision="float32",
        )
        return [ExportedFile(path.name, "onnx")], checks

    def pth(self, folder: Path) -> tuple[list[ExportedFile], list[Check]]:
        """Write model.pth."""
        import torch

        import torch_oracle.stages
        import torch_oracle.weights

        run, path = self.run, folder / "model.pth"
        state = torch_oracle.weights.read(self.weights_file)
        path.write_bytes(torch_oracle.weights.serialize(state, as_safetensors=False))
        loaded = {name: t.numpy() for name, t in torch.load(path, weights_only=True).items()}
        options = run.config.model_options()
        if run.config.model == "cnn":
            options["image_size"] = run.image_shape[:2]

        def logits(image: np.ndarray) -> np.ndarray:
            stages = torch_oracle.stages.run_stages(
                run.config.model,
                loaded,
                certify.normalized(run, image),
                run.resolved["num_classes"],
                precision=run.config.precision,
                **options,
            )
            return stages["logits"]

        checks = certify.logits(path.name, run, self.images, logits, precision=run.config.precision)
        return [ExportedFile(path.name, "pth")], checks

    def stablehlo(self, folder: Path) -> tuple[list[ExportedFile], list[Check]]:
        """Write the network and the training step, and the arrays that they take."""
        from safetensors.numpy import load_file, save_file

        export, run = load_module("jax", "export"), self.run
        config = self._step_config()
        engine = self._engine(config)
        network, step = folder / "network.stablehlo", folder / "training_step.stablehlo"
        own, start = folder / "weights.safetensors", folder / "training_state.safetensors"
        network.write_bytes(export.export_network(engine, run.image_shape))
        step.write_bytes(export.export_step(engine, self._step_shape, config.batch_size))
        shutil.copyfile(self.weights_file, own)
        tensors = weights.load(self.weights_file)
        tree = engine.to_tree(engine.init())
        for part in ("params", "batch_stats"):
            tree[part] = {name: tensors[name].astype(array.dtype) for name, array in tree[part].items()}
        if "ema" in tree:
            tree["ema"] = {part: tree[part] for part in ("params", "batch_stats")}
        save_file(export.flat_state(engine.from_tree(tree)), start)

        loaded, arrays = network.read_bytes(), load_file(own)
        checks = certify.logits(
            network.name,
            run,
            self.images,
            lambda image: np.asarray(export.run_network(loaded, arrays, image)),
            precision=run.config.precision,
        )
        first, *batches = self.images.batches(config.batch_size, self._step_shape)
        tree = certify.after_first_step(engine, tree, first)
        candidate = export.StepRunner(step.read_bytes(), export.flat_state(engine.from_tree(tree)))
        kind = "random" if self.images.note or self._step_shape != run.image_shape else "real"
        words = f"state after each of {len(batches)} training steps on {kind} images"
        checks.append(certify.training_step(step.name, engine, tree, candidate, batches, words))
        if run.config.framework == "numpy" and config.accumulate == 1:
            checks.append(self._twin_check(step.name, config, tree, batches, words))
        files = [ExportedFile(network.name, "network"), ExportedFile(own.name, "weights")]
        files += [
            ExportedFile(step.name, "step", candidate.leaves, config.batch_size),
            ExportedFile(start.name, "state"),
        ]
        return files, checks

    def _twin_check(
        self, file: str, config: Config, tree: dict[str, Any], batches: Sequence[Batch], words: str
    ) -> Check:
        """Compare the step, exported in float64, with the NumPy engine's.

        In float32 the two depart too far to show anything: Adam turns gradients that are nothing but rounding
        into whole steps.
        """
        export = load_module("jax", "export")
        config = dataclasses.replace(config, precision="float64", remat=False)
        jax_engine = self._engine(dataclasses.replace(config, framework="jax"))
        numpy_engine = self._engine(dataclasses.replace(config, framework="numpy"))
        tree = _widened(tree)
        content = export.export_step(jax_engine, self._step_shape, config.batch_size)
        candidate = export.StepRunner(content, export.flat_state(jax_engine.from_tree(tree)))
        words = f"exported in float64, with the NumPy engine: {words}"
        return certify.training_step(file, numpy_engine, tree, candidate, batches, words)

    @property
    def _step_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the images that the run was trained on."""
        height, width, channels = run_folder.read_named_record(self.run_dir)["resolved"]["image_shape"]
        return height, width, channels

    def _step_config(self) -> Config:
        """Return the run's options for the exported step."""
        record = run_folder.read_named_record(self.run_dir)
        stored = {**record["config"], "precision": self.run.config.precision, "log_gradients": False}
        config = resolve({}, {**stored, "framework": "jax"})
        if self.options.batch_size is not None:
            config = dataclasses.replace(config, batch_size=self.options.batch_size)
            config.check()
        return config

    def _engine(self, config: Config) -> Engine:
        """Return an engine that trains as the run did, at the run's peak learning rate."""
        resolved = self.run.resolved
        facts: Any = SimpleNamespace(**{name: resolved[name] for name in run_folder.ENGINE_FACTS})
        facts.image_shape = self._step_shape
        engine = make_engine(config, facts, resolved)
        engine.learning_rate = lambda step: resolved["optimizer_options"]["base_lr"]
        return engine


def _widened(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree with its floating-point arrays in float64."""
    return {
        name: _widened(value)
        if isinstance(value, dict)
        else value.astype(np.float64 if value.dtype.kind == "f" else value.dtype)
        for name, value in tree.items()
    }
