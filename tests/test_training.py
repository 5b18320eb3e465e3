"""A whole run of the training loop in this process: what it leaves on the disk, and whether that is true.

Numbers are checked by PyTorch, from the weights and the images alone.
"""

from __future__ import annotations

import dataclasses
import json
import math
import signal

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import sklearn.metrics
import torch

import experiment.data.loading
import torch_oracle
from experiment.commands import train
from experiment.files.checkpoints import Checkpoints
from experiment.options.config import Config
from experiment.run.schedules import make_schedule
from tests.helpers.runs import SMALL, Run, patch_data
from tests.tolerances import FLOAT32_LAYER, FLOAT64_LAYER

STEPS = ["--steps", "20", "--eval-every", "5", "--checkpoint-every", "6", "--keep-checkpoints", "2"]


def start(folder, *argv, status=0) -> Run:
    assert train.main([*SMALL, *argv, "--run-dir", str(folder)]) == status
    return Run(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return start(tmp_path_factory.mktemp("runs") / "run", *STEPS)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Run:
    return start(tmp_path_factory.mktemp("runs") / "untrained", "--steps", "0")


def images(split, seed=0):
    """(images, labels) of a part of the data that SMALL names, as PyTorch takes them."""
    data = experiment.data.loading.load("digits", data_dir=None, batch_size=16, seed=seed, train_subset=0.1)
    return as_tensors(data, next(iter(data.eval_batches(split, 10_000))))


def as_tensors(data, batch):
    image = (batch["image"] / 255 - np.array(data.mean)) / np.array(data.std)
    return torch.tensor(image.transpose(0, 3, 1, 2)), torch.tensor(batch["label"].astype(np.int64))


def reference_model(weights):
    """The network in PyTorch, in float64."""
    model = torch_oracle.cnn(10, 1).double().eval()
    torch_oracle.load_state_dict(model, weights)
    return model


def reference_metrics(weights, image, label):
    """The four metrics by PyTorch and scikit-learn."""
    with torch.no_grad():
        logits = reference_model(weights)(image)
    classes = range(10)
    return {
        "loss": torch.nn.functional.cross_entropy(logits, label).item(),
        "accuracy": (logits.argmax(1) == label).double().mean().item(),
        "f1": sklearn.metrics.f1_score(label, logits.argmax(1), average="macro"),
        "top5": sklearn.metrics.top_k_accuracy_score(label, logits.numpy(), k=5, labels=classes),
    }


METRICS = {"loss", "accuracy", "f1", "top5"}


def only_metrics(line):
    return {name: line[name] for name in METRICS}


def test_the_files_of_a_run(run):
    names = {path.name for path in run.folder.iterdir()}
    files = {"config.json", "metrics.jsonl", "summary.json", "log.txt"}
    assert names >= files | {"weights.safetensors", "weights-best.safetensors", "checkpoints"}
    assert not [path for path in run.folder.rglob("*") if path.suffix in {".tmp", ".incomplete", ".pkl"}]
    assert run.checkpoints == [18, 20]


def test_config_holds_every_resolved_option(run):
    options = run.config["config"]
    assert options.keys() == {field.name for field in dataclasses.fields(Config)}
    assert options["lr"] == 1e-3
    assert options["weight_decay"] == 0
    assert options["steps"] == 20
    resolved = run.config["resolved"]
    assert resolved["total_steps"] == resolved["schedule_steps"] == 20
    assert resolved["steps_per_epoch"] == 8
    assert resolved["image_shape"] == [32, 32, 1]
    assert (resolved["train_size"], resolved["val_size"], resolved["test_size"]) == (130, 14, 360)
    assert resolved["class_names"] == [str(digit) for digit in range(10)]


def test_config_tells_of_each_session(run):
    (session,) = run.config["sessions"]
    assert session["step"] == 0
    assert session["device"]
    assert session["command"][:2] == SMALL[:2]
    assert session["versions"]["jax"] == jax.__version__
    assert {"flax", "optax", "numpy", "orbax-checkpoint", "grain"} <= session["versions"].keys()
    assert "git_commit" in session


def test_metrics_has_each_line_once_in_order(run):
    places = [(line["split"], line["scope"], line["step"]) for line in run.lines()]
    expected = []
    for step in range(1, 21):
        expected.append(("train", "step", step))
        if step % 8 == 0:
            expected.append(("train", "epoch", step))
        if step % 5 == 0:
            expected.append(("val", "epoch", step))
    assert places == [*expected, ("test", "epoch", 20)]


def test_metrics_has_the_fields_of_the_design(run):
    place = {"split", "scope", "step", "epoch"}
    for line in run.lines():
        more = {"lr", "grad_norm", "update_norm"} if line["scope"] == "step" else set()
        assert line.keys() == place | METRICS | more
        assert line["epoch"] == math.ceil(line["step"] / 8)
        assert all(math.isfinite(line[name]) for name in METRICS | more)


def test_the_learning_rate_is_that_of_the_schedule(run):
    schedule = make_schedule("cosine", 1e-3, length=20, warmup_steps=2)  # a tenth of the run
    assert [line["lr"] for line in run.lines("train", "step")] == [schedule(step) for step in range(20)]


def test_an_epoch_is_the_mean_of_its_steps(run):
    steps = run.lines("train", "step")
    for line in run.lines("train", "epoch"):
        of_epoch = [step for step in steps if step["epoch"] == line["epoch"]]
        assert len(of_epoch) == 8
        for name in ("loss", "accuracy", "top5"):  # batches of one size; F1 is no mean
            mean = sum(step[name] for step in of_epoch) / 8
            assert line[name] == pytest.approx(mean, rel=FLOAT64_LAYER), name


def test_training_learns(run):
    losses = [line["loss"] for line in run.lines("train", "epoch")]
    assert losses[1] < losses[0] < 3


def test_the_first_step_by_pytorch(run, untrained):
    """Loss and gradient norm of the first batch, from the weights of a run that took no step."""
    data = experiment.data.loading.load("digits", data_dir=None, batch_size=16, seed=0, train_subset=0.1)
    image, label = as_tensors(data, next(data.train_batches(0)))
    model = reference_model(untrained.weights())
    loss = torch.nn.functional.cross_entropy(model(image), label)
    loss.backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in model.parameters()))
    first = run.lines("train", "step")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=FLOAT32_LAYER)
    assert first["grad_norm"] == pytest.approx(norm, rel=FLOAT32_LAYER)


def test_the_summary(run):
    summary = run.summary
    described = {"framework": "jax", "model": "cnn", "dataset": "digits", "optimizer": "adam", "seed": 0}
    assert {name: summary[name] for name in described} == described
    count = sum(array.size for array in run.weights().values())
    assert summary["parameters"] == summary["trainable_parameters"] == count == 82010
    assert (summary["steps"], summary["epochs"]) == (20, 2.5)
    assert summary["test"] == only_metrics(run.lines("test")[0])
    assert summary["images_per_second"] > 0
    assert summary["compile_seconds"] >= 0
    assert summary["wall_seconds"] > summary["compile_seconds"]
    assert summary["processor_seconds"] > 0
    times = {"images_per_second", "compile_seconds", "wall_seconds", "processor_seconds"}
    assert summary.keys() == described.keys() | times | {
        *("parameters", "trainable_parameters", "frozen_parameters", "steps", "epochs", "test", "best")
    }


def test_the_final_weights_give_the_test_result(run):
    expected = reference_metrics(run.weights(), *images("test"))
    assert run.summary["test"] == pytest.approx(expected, rel=FLOAT32_LAYER)


def test_the_best_weights_give_the_best_validation_result(run):
    best = run.summary["best"]
    assert best["step"] in (5, 10, 15, 20)
    expected = reference_metrics(run.weights("weights-best"), *images("val"))
    assert only_metrics(best) == pytest.approx(expected, rel=FLOAT32_LAYER)
    (line,) = [line for line in run.lines("val") if line["step"] == best["step"]]
    assert only_metrics(best) == only_metrics(line)
    assert best["loss"] == min(line["loss"] for line in run.lines("val"))


def test_the_weights_say_where_they_come_from(run):
    for name, step in (("weights", 20), ("weights-best", run.summary["best"]["step"])):
        with safetensors.safe_open(run.folder / f"{name}.safetensors", "numpy") as file:
            record = json.loads(file.metadata()["run"])
        assert len(record.pop("sha256")) == 64
        identity = record.pop("identity")
        assert record == {"model": "cnn", "dataset": "digits", "step": step}
        assert identity["mean"] == run.config["resolved"]["mean"]
        assert not [name for name in identity if name.startswith("init_from")]


def test_the_last_checkpoint_holds_the_final_weights(run):
    tree, _ = Checkpoints(run.folder / "checkpoints", 1).load(20)
    assert tree["step"] == 20
    weights = run.weights()
    assert tree["params"].keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(tree["params"][name], array, err_msg=name, strict=True)


def test_best_is_not_last(tmp_path):
    """With a rate that rises and soon spoils what was learned, an earlier step's weights were the best."""
    argv = ["--lr", "0.3", "--warmup-steps", "12", "--schedule", "constant"]
    run = start(tmp_path / "run", *argv, "--steps", "12", "--eval-every", "2")
    losses = {line["step"]: line["loss"] for line in run.lines("val")}
    best = run.summary["best"]
    assert 2 < best["step"] < 12
    assert best["loss"] == losses[best["step"]] == min(losses.values())
    expected = reference_metrics(run.weights("weights-best"), *images("val"))
    assert best["loss"] == pytest.approx(expected["loss"], rel=FLOAT32_LAYER)


class Mislabelled:
    """A source with its labels turned round."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return len(self.source)

    def read(self, indices):
        batch = self.source.read(indices)
        return {**batch, "label": 9 - batch["label"]}


def test_the_test_set_selects_nothing(run, tmp_path, monkeypatch):
    """With other test labels everything but the test result stays the same to the last bit."""

    def change(data):
        source, indices = data.parts["test"]
        return dataclasses.replace(data, parts={**data.parts, "test": (Mislabelled(source), indices)})

    patch_data(monkeypatch, change)
    other = start(tmp_path / "run", *STEPS)
    assert other.lines("test") != run.lines("test")
    assert other.lines()[:-1] == run.lines()[:-1]
    assert other.summary["best"] == run.summary["best"]
    for name in ("weights.safetensors", "weights-best.safetensors"):
        assert other.content(name) == run.content(name)


def test_without_validation_nothing_is_called_best(tmp_path):
    run = start(tmp_path / "run", "--steps", "4", "--eval-every", "2", "--val-fraction", "0")
    assert run.lines("val") == []
    assert run.summary["best"] is None
    assert not (run.folder / "weights-best.safetensors").exists()
    assert (run.folder / "weights.safetensors").exists()


@pytest.mark.parametrize("size", [1, 7, 359, 360, 361, 1000])
def test_evaluation_counts_each_test_example_once(untrained, tmp_path, size):
    run = start(tmp_path / "run", "--steps", "0", "--eval-batch-size", str(size))
    assert run.weights()["fc.weight"].tobytes() == untrained.weights()["fc.weight"].tobytes()
    expected = reference_metrics(run.weights(), *images("test"))
    result = run.summary["test"]
    assert result["loss"] == pytest.approx(expected["loss"], rel=FLOAT32_LAYER)
    for name in ("accuracy", "f1", "top5"):  # of counts: one example more or less would show
        assert result[name] == pytest.approx(expected[name], rel=FLOAT64_LAYER), name


def test_no_steps(untrained):
    assert untrained.checkpoints == []
    assert [line["split"] for line in untrained.lines()] == ["test"]
    summary = untrained.summary
    assert (summary["steps"], summary["epochs"], summary["images_per_second"]) == (0, 0, 0)
    assert summary["best"] is None
    assert summary["test"] == pytest.approx(
        reference_metrics(untrained.weights(), *images("test")), rel=FLOAT32_LAYER
    )


def test_the_same_seed_gives_the_same_bytes(run, tmp_path):
    again = start(tmp_path / "again", *STEPS)
    for name in ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors"):
        assert again.content(name) == run.content(name), name
    other = start(tmp_path / "other", *STEPS, "--seed", "1")
    assert other.weights()["fc.weight"].tobytes() != run.weights()["fc.weight"].tobytes()


def test_a_run_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert train.main([*SMALL, "--steps", "0"]) == 0
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert "-cnn-digits-adam" in folder.name
        assert Run(folder).summary["steps"] == 0


def test_it_says_what_it_does_and_where_it_is(tmp_path, capsys):
    run = start(tmp_path / "run", "--steps", "4")
    out, error = capsys.readouterr()
    assert error == ""
    for words in ("130 training, 14 validation and 360 test", "compiling", "step 4/4", "images/s"):
        assert words in out
    assert f"test: accuracy {run.summary['test']['accuracy']:.4f}" in out
    assert f"best on validation: accuracy {run.summary['best']['accuracy']:.4f}" in out
    assert out.splitlines()[-1].endswith(str(run.folder))
    log = (run.folder / "log.txt").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in log] == out.splitlines()


def test_the_schedule_that_a_refusal_proposes_is_taken(tmp_path, capsys):
    run = start(tmp_path / "run", "--steps", "4")
    resume = ["--resume", "--run-dir", str(run.folder), "--steps", "6"]
    assert train.main(resume) == 2
    assert "add --schedule-steps 4" in capsys.readouterr().err
    assert train.main([*resume, "--schedule-steps", "4"]) == 0
    assert [line["lr"] for line in run.lines("train", "step")][4:] == [0, 0]
    assert [session["step"] for session in run.config["sessions"]] == [0, 4]
    assert train.main(resume[:3]) == 0  # kept from then on
    assert run.summary["steps"] == 6


def failed(folder, capsys, *argv):
    """A run that fails, and the line that says why."""
    capsys.readouterr()
    run = start(folder, *argv, status=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert "the run failed" in line
    assert not (folder / "summary.json").exists()
    assert not (folder / "weights.safetensors").exists()
    return run, line


@pytest.mark.parametrize(("every", "kept"), [(1, [1]), (4, [])])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, every, kept):
    """The first step is finite and leaves weights of 1e30; the second is noticed before any save after it."""
    argv = ["--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant", "--warmup-steps", "0"]
    run, line = failed(tmp_path / "run", capsys, *argv, "--steps", "8", "--checkpoint-every", str(every))
    assert "not finite at step 2;" in line
    assert "--lr" in line
    assert run.checkpoints == kept
    assert ("the last good checkpoint is 1 " if kept else "no checkpoint before it") in line
    first, second, *_ = run.lines("train", "step")
    assert math.isfinite(first["loss"])
    assert second["loss"] is None


def test_what_is_poisoned_later_leaves_the_good_checkpoints(tmp_path, capsys, monkeypatch):
    """An image of no numbers in step 8, between two checkpoints and two updates of the metrics."""

    class Poisoned(experiment.data.loading.Data):
        def train_batches(self, start_step=0):
            for step, batch in enumerate(super().train_batches(start_step), start_step):
                image = batch["image"].astype(np.float32)  # taken as it is
                yield {**batch, "image": image * np.nan if step == 7 else image}

    def change(data):
        return Poisoned(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})

    patch_data(monkeypatch, change)
    argv = ["--steps", "20", "--checkpoint-every", "3", "--log-every", "20", "--eval-every", "20"]
    run, line = failed(tmp_path / "run", capsys, *argv)
    assert "not finite at step 8;" in line
    assert "the last good checkpoint is 6 " in line
    assert run.checkpoints == [3, 6]
    tree, _ = Checkpoints(run.folder / "checkpoints", 1).load(6)
    for group in (tree["params"], tree["optimizer"]["mu"], tree["optimizer"]["nu"]):
        assert all(np.isfinite(array).all() for array in group.values())
    # Resumed with the same data it comes to the same end.
    assert train.main(["--resume", "--run-dir", str(run.folder)]) == 1
    assert "not finite at step 8;" in capsys.readouterr().err
    assert run.checkpoints == [3, 6]
    # With sound data it goes on.
    monkeypatch.undo()
    assert train.main(["--resume", "--run-dir", str(run.folder)]) == 0
    assert [line["step"] for line in run.lines("train", "step")] == list(range(1, 21))


def test_a_summary_is_json_whatever_the_numbers(tmp_path):
    """Finite so far, but the weights are already past any use: the test result is not a number."""
    argv = ["--optimizer", "sgd", "--lr", "1e30", "--schedule", "constant", "--warmup-steps", "0"]
    run = start(tmp_path / "run", *argv, "--steps", "1")
    assert run.summary["test"]["loss"] is run.lines("test")[0]["loss"] is None
    assert run.lines("val")[0]["loss"] is None
    assert run.summary["best"] is None  # what is not a number is not the best


PLATEAU = [
    *("--schedule", "plateau", "--patience", "0", "--decay-factor", "0.5", "--cooldown", "1"),
    *("--lr", "0.05", "--optimizer", "adabound", "--warmup-steps", "3", "--eval-every", "2"),
]


def interrupt(monkeypatch, at):
    """SIGTERM when the batch of the step after `at` is asked for; it takes effect after that step."""

    class Interrupting(experiment.data.loading.Data):
        def train_batches(self, start_step=0):
            for step, batch in enumerate(super().train_batches(start_step), start_step):
                if step == at:
                    signal.raise_signal(signal.SIGTERM)
                yield batch

    def change(data):
        return Interrupting(**{f.name: getattr(data, f.name) for f in dataclasses.fields(data)})

    patch_data(monkeypatch, change)


@pytest.mark.parametrize("framework", ["jax", "numpy"])
def test_a_plateau_run_stopped_in_the_middle_ends_as_one_that_was_not(tmp_path, monkeypatch, framework):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = [*PLATEAU, "--framework", framework, "--steps", "25", "--checkpoint-every", "9"]
    whole = start(tmp_path / "whole", *argv)
    rates = [line["lr"] for line in whole.lines("train", "step")]
    assert rates[:3] == pytest.approx([0.05 / 4, 0.05 / 2, 0.05 * 3 / 4])
    # What PyTorch makes of the validations, and each fall at once after the one that brought it
    expected = make_schedule(
        *("plateau", 0.05),
        length=25,
        factor=0.5,
        patience=0,
        cooldown=1,
        validations=[(line["step"], line["loss"]) for line in whole.lines("val") if line["step"] % 2 == 0],
        warmup_steps=3,
    )
    assert rates == [expected(step) for step in range(25)]
    falls = [step for step in range(4, 25) if rates[step] < rates[step - 1]]
    assert len(falls) > 1

    stop = falls[0]  # the first step at a lower rate is the last before the stop
    interrupt(monkeypatch, stop)
    parted = start(tmp_path / "parted", *argv, status=128 + signal.SIGTERM)
    assert parted.checkpoints[-1] == stop + 1
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert train.main(["--resume", "--run-dir", str(parted.folder)]) == 0
    for name in ("metrics.jsonl", "weights.safetensors", "weights-best.safetensors"):
        assert parted.content(name) == whole.content(name), name


def test_a_longer_plateau_run_does_not_count_the_validation_at_the_end_of_the_shorter(tmp_path):
    """At step 7 of a validation every second step."""
    whole = start(tmp_path / "whole", *PLATEAU, "--steps", "21")
    parted = start(tmp_path / "parted", *PLATEAU, "--steps", "7")
    assert train.main(["--resume", "--run-dir", str(parted.folder), "--steps", "21"]) == 0
    assert parted.lines("train") == whole.lines("train")
    assert parted.content("weights.safetensors") == whole.content("weights.safetensors")


EARLY = [
    *("--lr", "0.3", "--schedule", "constant", "--steps", "40", "--eval-every", "2"),
    *("--early-stopping-patience", "3"),
]


def test_early_stopping_keeps_the_best_weights(tmp_path, capsys):
    run = start(tmp_path / "run", *EARLY)
    out = capsys.readouterr().out
    losses = [line["loss"] for line in run.lines("val")]
    steps = run.summary["steps"]
    assert steps == 2 * len(losses) < 40
    assert min(losses) == losses[-4]  # then three that were no better
    assert run.summary["best"]["step"] == steps - 6
    assert run.checkpoints[-1] == steps
    assert f"step {steps}: no better validation loss for 3 validations, the run ends early" in out
    expected = reference_metrics(run.weights("weights-best"), *images("val"))
    assert run.summary["best"]["loss"] == pytest.approx(expected["loss"], rel=FLOAT32_LAYER)
    assert run.summary["test"] == pytest.approx(
        reference_metrics(run.weights(), *images("test")), rel=FLOAT32_LAYER
    )

    # Resumed, it has come to its end; with more patience it goes on as a run that had it from the start
    before = run.content("metrics.jsonl")
    resume = ["--resume", "--run-dir", str(run.folder)]
    assert train.main(resume) == 0
    assert run.content("metrics.jsonl") == before
    assert train.main([*resume, "--early-stopping-patience", "40"]) == 0
    patient = start(tmp_path / "patient", *EARLY, "--early-stopping-patience", "40")
    assert run.content("metrics.jsonl") == patient.content("metrics.jsonl")
    assert run.content("weights-best.safetensors") == patient.content("weights-best.safetensors")
