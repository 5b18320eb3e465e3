"""Time folders of images against TFDS sets of the same images, and measure memory over epochs.

    python -m benchmarks.folder                      # ten minutes on two cores; nothing else should run
    python -m benchmarks.folder --only start --files 100000
    python -m benchmarks.folder --only rate threads --seconds 2

Everything is made in a temporary folder and removed.

- rate: images/s of the training input, folder and TFDS in interleaved rounds, medians: small PNG files as of
  CIFAR-10 in a first pass and from memory, and JPEGs of 500x375 that are streamed.
- threads: images/s of decoding the JPEGs and bringing them to 224x224, by threads and by processes.
- start: seconds until a folder of many small files is ready, the first and the second time.
- memory: resident memory after each epoch over streamed JPEGs.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiment.data import builtin
from experiment.data.augmentation import fit_image
from experiment.data.builtin import SyntheticSource
from experiment.data.images import read_image
from experiment.data.loading import Data, load
from numpy_ref.cores import core_count
from tests.helpers import made_tfds

CLASSES = 10


def images(count: int, size: tuple[int, int], form: str) -> list[tuple[bytes, int]]:
    """Files of generated images, smooth with noise, and their labels in ascending order."""
    made, labels = SyntheticSource(0, count, size).images(np.arange(count))
    height, width = size
    smooth = [p.resize((width // 4, height // 4)).resize((width, height)) for p in made]
    files = [
        (made_tfds.encoded(Image.blend(p, s, 0.5), form), int(label))
        for p, s, label in zip(made, smooth, labels, strict=True)
    ]
    return sorted(files, key=lambda file: file[1])


def write_folder(root: Path, files: Sequence[tuple[bytes, int]]) -> Path:
    """Write the files as root/train/CLASS/NUMBER, and those of every tenth number as root/test, too."""
    for number, (content, label) in enumerate(files):
        for part in ("train", "test") if number % 10 == 0 else ("train",):
            path = root / part / f"class{label}" / f"{number:06d}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return root


def write_tfds(root: Path, files: Sequence[tuple[bytes, int]]) -> Path:
    """Write the files as the TFDS set `made`."""
    import tensorflow_datasets as tfds

    features = {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=CLASSES),
    }
    made_tfds.write(root, "made", {"train": files, "test": files[::10]}, features=features)
    return root


def rate(data: Data, seconds: float) -> float:
    """Images/s of an epoch of training batches, or of as much as fits into `seconds`."""
    begun, count = time.perf_counter(), 0
    for batch in itertools.islice(data.train_batches(), data.steps_per_epoch):
        count += len(batch["label"])
        if time.perf_counter() - begun > seconds:
            break
    return count / (time.perf_counter() - begun)


def compare_rates(made: Path, rounds: int, seconds: float) -> None:
    """Print a row for each kind of images: folder, TFDS, and their ratio."""
    print("| images | folder, images/s | TFDS, images/s | folder / TFDS |\n| --- | --- | --- | --- |")
    cases: list[tuple[str, int, tuple[int, int], str, dict[str, Any]]] = [
        ("PNG 32x32", 5000, (32, 32), "png", {"augment": "crop-flip"}),
        ("JPEG 500x375 to 224x224", 400, (375, 500), "jpeg", {"augment": "crop-flip", "resize": (256, 480)}),
    ]
    for name, count, size, form, options in cases:
        files = images(count, size, form)
        options |= {"batch_size": 50, "seed": 0, "image_size": (32, 32) if form == "png" else (224, 224)}
        folders, sets = write_folder(made / f"{form}-folder", files), write_tfds(made / f"{form}-tfds", files)
        opened: dict[str, Callable[[], Data]] = {
            "folder": partial(load, "folder", data_dir=str(folders), **options),
            "made": partial(load, "made", data_dir=str(sets), **options),
        }
        for state in ("first pass", "from memory") if form == "png" else ("streamed",):
            rates: dict[str, list[float]] = {kind: [] for kind in opened}
            for number, kind in itertools.product(range(rounds + 1), opened):
                data = opened[kind]()
                if state == "from memory":
                    rate(data, float("inf"))
                measured = rate(data, seconds)
                if number:  # in the first round modules are imported
                    rates[kind].append(measured)
            by_folder, by_tfds = (statistics.median(rates[kind]) for kind in opened)
            ratio = statistics.median(a / b for a, b in zip(rates["folder"], rates["made"], strict=True))
            print(f"| {name}, {state} | {by_folder:.0f} | {by_tfds:.0f} | {ratio:.2f} |", flush=True)


def decode(paths: Sequence[Path]) -> np.ndarray:
    """A batch as training has it: uint8 [N, 224, 224, 3]."""
    return np.stack([fit_image(read_image(path, 3), (224, 224)) for path in paths])


def compare_threads(made: Path, rounds: int, workers: int) -> None:
    """Print images/s of threads and of processes, which send each batch back, in interleaved rounds."""
    files = images(400, (375, 500), "jpeg")
    paths = sorted(path for path in write_folder(made / "threads", files).rglob("*") if path.is_file())
    batches = [paths[start : start + 20] for start in range(0, len(paths), 20)]
    pools: dict[str, Executor] = {
        "1 thread": ThreadPoolExecutor(1),
        f"{workers} threads": ThreadPoolExecutor(workers),
        f"{workers} processes": ProcessPoolExecutor(workers, mp_context=get_context("spawn")),
    }
    rates: dict[str, list[float]] = {name: [] for name in pools}
    for number in range(rounds + 1):  # the first starts the workers
        for name, pool in pools.items():
            begun = time.perf_counter()
            for batch in pool.map(decode, batches):
                assert batch.shape[1:] == (224, 224, 3)
            if number:
                rates[name].append(len(paths) / (time.perf_counter() - begun))
    for pool in pools.values():
        pool.shutdown()
    print("| JPEG 500x375 to 224x224 | images/s |\n| --- | --- |")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} |", flush=True)


def measure_start(made: Path, count: int) -> None:
    """Print the seconds until a folder of `count` small files is ready: without and with the cache."""
    root = made / "many"
    some = images(1000, (32, 32), "png")
    for number in range(count):
        content, label = some[number % len(some)]
        path = root / f"class{label}" / f"{number:07d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for when in ("first", "second"):
        begun = time.perf_counter()
        data = load("folder", data_dir=str(root), batch_size=64, seed=0)
        next(data.train_batches())
        print(f"{count:,} files: the {when} time {time.perf_counter() - begun:.1f} s to the first batch")


def resident() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def measure_memory(made: Path, epochs: int) -> None:
    """Print the resident memory after each of some epochs over images that are not cached."""
    root = write_folder(made / "memory", images(400, (375, 500), "jpeg"))
    limit, builtin.CACHE_BYTES = builtin.CACHE_BYTES, 0  # as for a set that does not fit
    data = load("folder", data_dir=str(root), batch_size=50, seed=0, image_size=(224, 224))
    builtin.CACHE_BYTES = limit
    batches = data.train_batches()
    after = []
    for _ in range(epochs):
        for _ in itertools.islice(batches, data.steps_per_epoch):
            pass
        after.append(resident())
    print(f"MB after each of {epochs} epochs: {' '.join(f'{value:.0f}' for value in after)}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("rate", "threads", "start", "memory")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0, help="for a pass (default 5)")
    parser.add_argument("--workers", type=int, default=core_count(), help="threads, processes")
    parser.add_argument("--files", type=int, default=100_000, help="for start (default 100000)")
    parser.add_argument("--epochs", type=int, default=8, help="for memory (default 8)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        os.environ["XDG_CACHE_HOME"] = f"{made}/cache"
        for part in options.only:
            match part:
                case "rate":
                    compare_rates(Path(made), options.rounds, options.seconds)
                case "threads":
                    compare_threads(Path(made), options.rounds, options.workers)
                case "start":
                    measure_start(Path(made), options.files)
                case "memory":
                    measure_memory(Path(made), options.epochs)


if __name__ == "__main__":
    main()
