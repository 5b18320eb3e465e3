"""`python -m experiment evaluate` and `predict`: what a finished run says of its data, and of files."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from experiment.__main__ import main
from experiment.commands import train
from experiment.commands.evaluate import STRIDE, average, by_shape
from experiment.data.augmentation import ten_crops, ten_shifts, whole_image
from experiment.data.loading import load
from experiment.engines import load_engine
from experiment.files import weights
from experiment.run.completed_run import open_run
from tests.helpers import made_tfds

Pixels = npt.NDArray[np.uint8]


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    """The NumPy engine's others would take a second to start in every evaluation."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a few steps on digits."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    argv = ["--model", "cnn", "--framework", "numpy", "--steps", "40", "--no-report"]
    argv += ["--run-dir", str(run_dir)]
    assert train.main(argv) == 0
    return run_dir


def metrics(printed: str) -> dict[str, float]:
    """The numbers of the last line that `evaluate` prints."""
    words = re.findall(r"([a-z0-9- F]+) (\d+\.\d+)", printed.splitlines()[-1])
    return {name.strip(): float(value) for name, value in words}


# What is evaluated


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_single_crop_is_the_runs_own_test(
    finished: Path, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    test = json.loads((finished / "summary.json").read_text())["test"]
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--framework", framework]) == 0
    found = metrics(capsys.readouterr().out)
    want = {"loss": "loss", "top-1": "accuracy", "top-5": "top5", "macro F1": "f1"}
    assert found == pytest.approx({name: test[key] for name, key in want.items()}, abs=1.01e-4)


def test_validation_and_the_best_weights(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = json.loads((finished / "summary.json").read_text())["best"]
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--split", "val", "--weights", "best"]) == 0
    printed = capsys.readouterr().out
    assert metrics(printed)["loss"] == pytest.approx(best["loss"], abs=1e-4)
    assert "val of digits, 144 images, 32x32" in printed


def test_ten_crops_by_hand() -> None:
    image = noise(40, 50, 3)
    crops = ten_crops(Image.fromarray(image), (32, 36), 40)
    corners = [image[:32, :36], image[:32, 14:], image[8:, :36], image[8:, 14:], image[4:36, 7:43]]
    np.testing.assert_array_equal(crops[:5], np.stack(corners))
    np.testing.assert_array_equal(crops[5:], np.stack([crop[:, ::-1] for crop in corners]))


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (60, 60, (96, 96)),
        (50, 50, (112, 112)),
        (60, 94, (96, 160)),
        (94, 60, (160, 96)),
        (60, 68, (96, 96)),
        (60, 87, (96, 128)),
    ],
)
def test_a_whole_image_is_all_of_it(height: int, width: int, size: tuple[int, int]) -> None:
    """Squares stay so. Of a shorter side of 96, the longer one would be 96, 150, 150, 109 and 139."""
    image = Image.fromarray(noise(height, width, 3))
    want = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(whole_image(image, min(size), STRIDE), want)


def test_ten_shifts_are_of_the_size_that_was_trained() -> None:
    """Of an image padded by an eighth: the middle one is itself, a corner one misses an eighth."""
    image = noise(32, 40, 3)
    views = ten_shifts(image, (1, 2, 3))
    np.testing.assert_array_equal(views[4], image)
    np.testing.assert_array_equal(views[0, 4:, 5:], image[:-4, :-5])
    assert (views[0, :4] == (1, 2, 3)).all()
    np.testing.assert_array_equal(views[3, :-4, :-5], image[4:, 5:])
    np.testing.assert_array_equal(views[5:], views[:5, :, ::-1])


def test_ten_crops_of_small_images_are_shifts(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run without --resize. With all ten views worked out by hand the loss is the same."""
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--crops", "10", "--batch-size", "70"]) == 0
    printed = capsys.readouterr().out
    assert "360 images, 10 crops of 32x32, padded by an eighth, probabilities averaged" in printed
    run = open_run(finished)
    data = load("digits", **run.config.data_options())
    (batch,) = data.eval_batches("test", 360)
    views = [ten_shifts(image, (0,)) for image in batch["image"]]
    (logits,) = run.logits([np.concatenate(views)])
    scores = np.exp(logits.astype(float) - logits.max(1, keepdims=True))
    mean = (scores / scores.sum(1, keepdims=True)).reshape(360, 10, 10).mean(1)
    loss = -np.log(mean[np.arange(360), batch["label"]]).mean()
    assert metrics(printed)["loss"] == pytest.approx(loss, abs=1e-4)
    capsys.readouterr()
    assert main(["evaluate", str(finished), "--crops", "10", "--resize", "37"]) == 0
    assert "10 crops of 32x32 from a shorter side of 37" in capsys.readouterr().out


def test_what_is_left_over_of_a_shape_is_no_shape_of_its_own() -> None:
    """JAX compiles once for each."""
    calls = []

    def logits(batches: Iterable[Pixels]) -> Iterator[np.ndarray]:
        for images in batches:
            calls.append(images.shape)
            yield images.mean((1, 2))

    images = noise(7, 1, 8, 8, 3)
    whole: Any = (range(7), images, [0] * 7)
    parts: Any = [
        (range(3), images[:3], [0] * 3),
        (range(3, 6), images[3:6], [0] * 3),
        ([6], images[6:], [0]),
    ]
    together, _ = average(logits, [[whole]], 7, 3)
    calls.clear()
    apart, _ = average(logits, [parts], 7, 3)
    assert set(calls) == {(3, 8, 8, 3)}
    np.testing.assert_allclose(apart, together, rtol=1e-12)


def test_scores_of_all_views_are_averaged(tmp_path: Path) -> None:
    """Images of four shapes in turns, a made network: against one image at a time, in plain NumPy."""
    shapes = [(60, 90, 3), (90, 60, 3), (64, 64, 3), (60, 130, 3)]
    files = [(made_tfds.encoded(noise(*shapes[n % 4], seed=n)), n % 2) for n in range(22)]
    made_tfds.write(tmp_path, "made", {"train": files, "test": files})
    data = load("made", data_dir=str(tmp_path), batch_size=2, seed=0, image_size=(48, 48))
    weights = np.random.default_rng(1).normal(size=(6, 2))
    calls = []

    def logits(batches: Iterable[Pixels]) -> Iterator[np.ndarray]:
        for images in batches:
            calls.append(images.shape)
            features = np.concatenate([images.mean((1, 2)), images[:, 0, 0]], 1)
            yield features @ weights / 50

    def probabilities(images: Pixels) -> np.ndarray:
        scores = np.exp(next(logits([images])))
        mean: np.ndarray = (scores / scores.sum(1, keepdims=True)).mean(0)
        return mean

    views: list[Callable[[Any], Pixels]] = [
        lambda image: ten_crops(image, (48, 48), 52),
        lambda image: whole_image(image, 64, 32)[None],
    ]
    groups = [by_shape(data, "test", view, pixels=5 * 64 * 96) for view in views]
    scores, labels = average(logits, groups, 22, 2)
    assert labels.tolist() == [n % 2 for n in range(22)]
    assert {shape[1:] for shape in calls} == {
        (48, 48, 3),
        (64, 96, 3),
        (96, 64, 3),
        (64, 64, 3),
        (64, 128, 3),
    }
    assert max(np.prod(shape[:3]) for shape in calls) <= 5 * 64 * 96
    for number, score in enumerate(scores):
        image = Image.fromarray(noise(*shapes[number % 4], seed=number))
        want = np.mean([probabilities(view(image)) for view in views], axis=0)
        np.testing.assert_allclose(np.exp(score), want, rtol=1e-12, err_msg=str(number))


# Eight layers: a place in the last map sees 12 pixels to each side. What is drawn is 32 and more from every
# border, so that border and drawing never meet, and crops are 4 pixels apart, the network's stride.
NETWORK = {"stage_sizes": (1, 1, 1), "small_images": True, "width": 8}
SIDE, CROP, DRAWN = 88, 80, 8


@pytest.mark.parametrize("framework", ["numpy", "jax"])
def test_ten_crops_of_a_centred_image_score_as_one(framework: str, tmp_path: Path) -> None:
    """The images are mirror-symmetric and constant outside the centre; but for the last."""
    files = []
    for number in range(4):
        image = np.full((SIDE, SIDE, 3), 80 * number, np.uint8)
        half = noise(DRAWN, DRAWN // 2, 3, seed=number)
        middle = slice((SIDE - DRAWN) // 2, (SIDE + DRAWN) // 2)
        image[middle, middle] = np.concatenate([half, half[:, ::-1]], 1)
        if number == 3:
            image[:, :10] = 255 - image[:, :10]
        files.append((made_tfds.encoded(image), number % 2))
    made_tfds.write(tmp_path, "made", {"train": files, "test": files})
    data = load("made", data_dir=str(tmp_path), batch_size=2, seed=0, image_size=(CROP, CROP), resize=(SIDE,))
    engine = load_engine(framework)(
        model="resnet18",
        model_options=NETWORK,
        num_classes=2,
        image_shape=data.image_shape,
        mean=data.mean,
        std=data.std,
        optimizer="sgd",
        optimizer_options={},
        learning_rate=lambda step: 0.0,
    )
    state = engine.init()

    def logits(batches: Iterable[Pixels]) -> Iterator[np.ndarray]:
        return engine.evaluate(state, ({"image": images} for images in batches))

    (batch,) = data.eval_batches("test", 4)
    (found,) = logits([batch["image"]])
    one = np.exp(found - found.max(1, keepdims=True))
    one /= one.sum(1, keepdims=True)
    views = by_shape(data, "test", lambda p: ten_crops(p, (CROP, CROP), SIDE), 40 * CROP**2)
    scores, _ = average(logits, [views], 4, 2)
    apart = np.abs(np.exp(scores) - one).max(1)
    assert apart[:3].max() < 1e-6
    assert apart[3] > 1e-3, "nor does the last image's score depend on the crop"
    assert np.ptp(one[:3, 0]) > 1e-3, "the images score alike"


def test_whole_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Twice one scale counts as once; two scales differ from both."""
    files = [(made_tfds.encoded(noise(40, 50, 3, seed=number)), number % 2) for number in range(6)]
    made_tfds.write(tmp_path, "made", {"train": files, "test": files})
    run = ["--dataset", "made", "--data-dir", str(tmp_path), "--model", "resnet20", "--framework", "numpy"]
    run += ["--image-size", "32", "--steps", "2", "--batch-size", "2", "--val-fraction", "0", "--no-report"]
    assert train.main([*run, "--run-dir", str(tmp_path / "run")]) == 0
    printed = []
    for scales in (["32"], ["32", "32"], ["56"], ["32", "56"]):
        capsys.readouterr()
        assert main(["evaluate", str(tmp_path / "run"), "--scales", *scales]) == 0
        printed.append(capsys.readouterr().out.splitlines())
    assert "6 images, whole, shorter sides 32 56, probabilities averaged" in printed[-1][1]
    losses = [metrics(lines[-1])["loss"] for lines in printed]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def listing(directory: Path) -> dict[str, tuple[int, bytes | None]]:
    found = {}
    for path in sorted(directory.rglob("*")):
        found[str(path)] = (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
    return found


REFUSED = [
    (["evaluate"], ["RUN", "--help"]),
    (["evaluate", "nowhere"], ["nowhere", "not found"]),
    (["evaluate", "run", "--crops", "5"], ["--crops"]),
    (["evaluate", "run", "--framework", "torch"], ["--framework", "jax"]),
    (["evaluate", "run", "--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["evaluate", "run", "--resize", "0"], ["--resize: 0", "32x32"]),
    (["evaluate", "run", "--crops", "10", "--resize", "0"], ["--resize: 0", "32x32"]),
    (["evaluate", "run", "--resize", "31"], ["--resize: 31", "32x32", "32 or more"]),
    (["evaluate", "run", "--crops", "10", "--resize", "20"], ["--resize: 20", "32x32", "32 or more"]),
    (["evaluate", "run", "--scales", "40"], ["--scales: cnn", "32x32"]),
    (["evaluate", "run", "--scales", "31"], ["--scales: 31", "at least 32"]),
    (["evaluate", "run", "--scales", "40", "--crops", "10"], ["--crops", "--scales"]),
    (["evaluate", "run", "--scales", "40", "--resize", "40"], ["--resize", "--scales"]),
    (["predict", "run"], ["IMAGE", "after the run"]),
    (["predict", "nowhere", "a.png"], ["nowhere", "not found"]),
    (["predict", "run", "absent.png"], ["absent.png", "not found"]),
    (["predict", "run", "run/checkpoints"], ["none of the ", " files is an image: run/checkpoints/"]),
    (["predict", "run", "a.png", "--batch-size", "0"], ["--batch-size", "at least 1"]),
    (["predict", "run", "a.png", "--out", "a.txt"], ["--out: a.txt", ".csv or .json"]),
    (["predict", "run", "a.png", "--out", "nowhere/a.csv"], ["--out: nowhere/a.csv", "a folder that exists"]),
    (["predict", "run", "run/config.json"], ["config.json", "no image"]),
    (["predict", "run", "a.png", "--top", "0"], ["--top", "at least 1"]),
]


@pytest.fixture
def here(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a copy of the finished run."""
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(argv: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    before = listing(here)
    capsys.readouterr()
    assert main(argv) == 2
    assert listing(here) == before
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(("argv", "parts"), REFUSED, ids=[" ".join(row[0]) for row in REFUSED])
def test_a_mistake_is_one_line(
    argv: list[str], parts: list[str], here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(noise(40, 40)).save("a.png")
    line = refusal(argv, here, capsys)
    assert not [part for part in parts if part not in line], line


def test_weights_that_do_not_fit(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(noise(40, 40)).save("a.png")
    path = here / "run" / "weights.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "weights.safetensors" in refusal(["evaluate", "run"], here, capsys)
    config = here / "run" / "config.json"
    record = json.loads(config.read_text())
    path.write_bytes(whole)
    config.write_text(json.dumps({**record, "config": {**record["config"], "model": "resnet20"}}))
    line = refusal(["evaluate", "run"], here, capsys)
    assert "was written by a run with model cnn, and config.json has resnet20" in line
    tensors = weights.load(path)
    del tensors["fc.bias"]
    config.write_text(json.dumps(record))
    weights.save(path, tensors, {"step": 40})
    line = refusal(["evaluate", "run"], here, capsys)
    assert "is of another network" in line
    assert "fc.bias is missing" in line
    path.write_bytes(whole)
    config.write_text(json.dumps({**record, "resolved": {**record["resolved"], "test_size": 7}}))
    assert "test_size" in refusal(["evaluate", "run"], here, capsys)
    config.write_text(json.dumps({**record, "resolved": {"schedule_steps": 3}}))
    assert "config.json" in refusal(["evaluate", "run"], here, capsys)
    config.write_text(json.dumps(record))
    path.unlink()
    assert "--resume" in refusal(["evaluate", "run"], here, capsys)
    (here / "run" / "weights-best.safetensors").unlink()
    assert "--weights final" in refusal(["predict", "run", "a.png", "--weights", "best"], here, capsys)


# Images in files


def test_predictions_are_the_softmax_of_the_logits(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(Path("run"))
    data = load("digits", **run.config.data_options())
    images = next(data.eval_batches("test", 3))["image"]
    for number, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(f"{number}.png")
    (logits,) = run.logits([images])
    scores = np.exp(logits.astype(float))
    scores /= scores.sum(1, keepdims=True)
    capsys.readouterr()
    assert main(["predict", "run", "0.png", "1.png", "2.png", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[::4] == ["0.png", "1.png", "2.png"]
    for number, row in enumerate(scores):
        found = [line.split() for line in lines[4 * number + 1 : 4 * number + 4]]
        best = np.argsort(-row)[:3]
        assert [name for _, name in found] == [str(index) for index in best]
        assert [float(value) for value, _ in found] == pytest.approx(row[best], abs=1e-4)
    assert main(["predict", "run", "0.png", "--top", "99", "--framework", "jax"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
