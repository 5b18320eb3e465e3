"""The options: every flag, every mistake in one line, what a resumed run may change; and the schedules."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_resnet
import numpy_ref
from experiment.errors import UserError
from experiment.options.command_line import make_parser, parse
from experiment.options.config import MODELS, OPTIMIZERS, Config, flag_of, parse_image_size
from experiment.options.resolving import CHANGEABLE, USED_BY, refuse_unused, resolve
from experiment.run.schedules import has_converged, make_schedule
from jax_resnet.optimizers import BOUNDED
from tests.tolerances import FLOAT64_LAYER

FIELDS = {field.name: field for field in dataclasses.fields(Config)}

# Each flag with a value that is not its default, as it is written and as Config holds it.
VALUES: dict[str, tuple[list[str], object]] = {
    "framework": (["numpy"], "numpy"),
    "model": (["resnet50"], "resnet50"),
    "batch_norm": ([], False),
    "batch_norm_group": (["8"], 8),
    "residual_scale": (["1"], 1.0),
    "stride_in_1x1": ([], True),
    "small_images": ([], True),
    "precision": (["float64"], "float64"),
    "drop_path": (["0.1"], 0.1),
    "test_size": (["40"], "40"),
    "randaugment": (["2", "9"], (2, 9)),
    "random_erase": (["0.25"], 0.25),
    "mixup_alpha": (["0.2"], 0.2),
    "cutmix_alpha": (["1"], 1.0),
    "loss": (["bce"], "bce"),
    "label_smoothing": (["0.1"], 0.1),
    "class_weights": (["balanced"], "balanced"),
    "dataset": (["mnist"], "mnist"),
    "data_dir": (["some dir"], "some dir"),
    "train_subset": (["0.5"], 0.5),
    "val_fraction": (["0"], 0.0),
    "test_fraction": (["0.2"], 0.2),
    "skip_bad": ([], True),
    "image_size": (["64x96"], "64x96"),
    "resize": (["96"], (96,)),
    "grayscale": ([], True),
    "crop_to_bbox": ([], True),
    "mean_only": ([], True),
    "augment": (["crop-flip"], "crop-flip"),
    "optimizer": (["adabound"], "adabound"),
    "optimizer_arguments": (["b1=0.9", "nesterov=true"], ("b1=0.9", "nesterov=true")),
    "lr": (["1e-4"], 1e-4),
    "final_lr": (["0.2"], 0.2),
    "gamma": (["0.01"], 0.01),
    "beta1": (["0"], 0.0),
    "beta2": (["0.99"], 0.99),
    "eps": (["0"], 0.0),
    "momentum": (["0.5"], 0.5),
    "weight_decay": (["5e-4"], 5e-4),
    "norm_weight_decay": (["0"], 0.0),
    "bias_weight_decay": (["0"], 0.0),
    "nesterov": ([], True),
    "clip_grad_norm": (["5"], 5.0),
    "model_ema_decay": (["0.999"], 0.999),
    "schedule": (["multistep"], "multistep"),
    "milestones": (["30", "60"], (30, 60)),
    "decay_factor": (["1"], 1.0),
    "patience": (["0"], 0),
    "cooldown": (["4"], 4),
    "warmup_steps": (["0"], 0),
    "schedule_steps": (["7"], 7),
    "init_from": (["weights.safetensors"], "weights.safetensors"),
    "freeze_backbone": ([], True),
    "epochs": (["3"], 3),
    "steps": (["0"], 0),
    "batch_size": (["1"], 1),
    "eval_batch_size": (["7"], 7),
    "early_stopping_patience": (["3"], 3),
    "seed": (["4294967295"], 2**32 - 1),
    "accumulate": (["2"], 2),
    "remat": ([], True),
    "distributed": ([], True),
    "deterministic": ([], True),
    "recipe": (["cifar10-resnet20"], "cifar10-resnet20"),
    "run_dir": (["runs/a"], "runs/a"),
    "resume": ([], True),
    "checkpoint_every": (["5"], 5),
    "eval_every": (["6"], 6),
    "log_every": (["1"], 1),
    "verify_every": (["100"], 100),
    "log_gradients": ([], True),
    "keep_checkpoints": (["1"], 1),
    "test": ([], False),
    "report": ([], False),
}

# The defaults that docs and recorded runs rely on.
DEFAULTS = {
    "framework": "jax",
    "model": "resnet101",
    "dataset": "digits",
    "optimizer": "adam",
    "lr": 1e-3,
    "final_lr": 0.1,
    "gamma": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "precision": "float32",
    "train_subset": 1.0,
    "val_fraction": 0.1,
    "batch_size": 32,
    "log_every": 10,
    "keep_checkpoints": 3,
    "seed": 0,
    "steps": None,
    "resume": False,
    "batch_norm": True,
}

FROZEN = ["--freeze-backbone", "--init-from", "weights.safetensors"]

# What is written, the flag that the line must name, and a word of its remedy.
MISTAKES = [
    (["--learning-rate", "0.1"], "--learning-rate", "--help"),
    (["--step", "3"], "--step", "--help"),  # no abbreviations: --steps may one day be two flags
    (["stray"], "stray", "--help"),
    (["--steps"], "--steps", "--help"),
    (["--steps", "three"], "--steps", "three"),
    (["--steps", "1e3"], "--steps", "1e3"),
    (["--lr", "fast"], "--lr", "fast"),
    (["--milestones"], "--milestones", "--help"),
    (["--framework", "tensorflow"], "--framework", "jax, numpy"),
    (["--framework", "numpy", "--precision", "bfloat16"], "--precision", "--framework jax"),
    (["--model", "resnet99"], "--model", "resnet101"),
    (["--optimizer", "adamax"], "--optimizer", "adabound"),
    (["--optimizer", "adamax"], "--optimizer", "optax:NAME, FILE.py:FUNCTION"),
    (["--optimizer", "optax:"], "--optimizer", "optax:NAME"),
    (["--optimizer", "mine.txt:make"], "--optimizer", "FILE.py:FUNCTION"),
    (["--optimizer", "optax:lion", "--framework", "numpy"], "--optimizer", "--framework jax"),
    (["--optimizer", "optax:lion", "--verify-every", "2"], "--verify-every", "leave"),
    (["--optimizer", "optax:lion", "--weight-decay", "0.1"], "--weight-decay", "--optimizer-arguments"),
    (["--optimizer", "optax:lion", "--beta1", "0.8"], "--beta1", "--optimizer-arguments"),
    (["--optimizer", "optax:lion", "--optimizer-arguments", "b1"], "--optimizer-arguments", "NAME=VALUE"),
    (["--optimizer-arguments", "b1=0.9"], "--optimizer-arguments", "leave"),
    (["--schedule", "linear"], "--schedule", "cosine"),
    (["--precision", "float16"], "--precision", "bfloat16"),
    (["--train-subset", "0"], "--train-subset", "above 0 and at most 1"),
    (["--train-subset", "1.1"], "--train-subset", "above 0 and at most 1"),
    (["--val-fraction", "-0.1"], "--val-fraction", "at least 0 and below 1"),
    (["--val-fraction", "1"], "--val-fraction", "at least 0 and below 1"),
    (["--test-fraction", "0"], "--test-fraction", "above 0 and below 1"),
    (["--lr", "0"], "--lr", "above 0"),
    (["--lr", "-1"], "--lr", "above 0"),
    (["--lr", "nan"], "--lr", "above 0"),
    (["--batch-size", "9" * 400], "--batch-size", "out of range"),
    (["--lr", "inf"], "--lr", "above 0"),
    (["--final-lr", "0"], "--final-lr", "above 0"),
    (["--gamma", "0"], "--gamma", "above 0"),
    (["--beta1", "1"], "--beta1", "below 1"),
    (["--residual-scale", "-1"], "--residual-scale", "at least 0"),
    (["--beta1", "-0.5"], "--beta1", "at least 0"),
    (["--beta2", "1"], "--beta2", "below 1"),
    (["--beta2", "nan"], "--beta2", "below 1"),
    (["--eps", "-1"], "--eps", "at least 0"),
    (["--eps", "inf"], "--eps", "at least 0"),
    (["--momentum", "1"], "--momentum", "below 1"),
    (["--weight-decay", "-1"], "--weight-decay", "at least 0"),
    (["--test-size", "31"], "--test-size", "at least 32"),
    (["--test-size", "big"], "--test-size", "96"),
    (["--test-size", "40", "--model", "cnn"], "--test-size", "leave"),
    (["--randaugment", "2"], "--randaugment", "2 9"),
    (["--randaugment", "0", "9"], "--randaugment", "2 9"),
    (["--randaugment", "2", "31"], "--randaugment", "30 or less"),
    (["--randaugment", "2", "9", "--augment", "autoaugment"], "--randaugment", "crop-flip"),
    (["--random-erase", "1.1"], "--random-erase", "at most 1"),
    (["--mixup-alpha", "-1"], "--mixup-alpha", "at least 0"),
    (["--cutmix-alpha", "inf"], "--cutmix-alpha", "at least 0"),
    (["--loss", "hinge"], "--loss", "bce"),
    (["--label-smoothing", "1"], "--label-smoothing", "below 1"),
    (["--class-weights", "sqrt"], "--class-weights", "balanced"),
    (["--norm-weight-decay", "-1"], "--norm-weight-decay", "at least 0"),
    (["--norm-weight-decay", "0", "--no-batch-norm"], "--norm-weight-decay", "leave"),
    (["--norm-weight-decay", "0", "--model", "cnn"], "--norm-weight-decay", "leave"),
    (["--norm-weight-decay", "0", *FROZEN], "--norm-weight-decay", "--freeze-backbone"),
    (["--batch-norm-group", "0"], "--batch-norm-group", "at least 1"),
    (["--batch-norm-group", "5"], "--batch-norm-group", "--batch-size 32"),
    (["--batch-norm-group", "32", "--accumulate", "2"], "--batch-norm-group", "in 2 micro-batches"),
    (["--batch-norm-group", "8", "--no-batch-norm"], "--batch-norm-group", "leave"),
    (["--batch-norm-group", "8", "--model", "cnn"], "--batch-norm-group", "leave"),
    (["--batch-norm-group", "8", *FROZEN], "--batch-norm-group", "--freeze-backbone"),
    (["--bias-weight-decay", "-1"], "--bias-weight-decay", "at least 0"),
    (["--optimizer", "sgd", "--momentum", "0", "--nesterov"], "--nesterov", "--momentum"),
    (["--clip-grad-norm", "0"], "--clip-grad-norm", "above 0"),
    (["--clip-grad-norm", "inf"], "--clip-grad-norm", "above 0"),
    (["--model-ema-decay", "0"], "--model-ema-decay", "above 0"),
    (["--model-ema-decay", "1"], "--model-ema-decay", "below 1"),
    (["--drop-path", "1"], "--drop-path", "below 1"),
    (["--drop-path", "-0.1"], "--drop-path", "at least 0"),
    (["--drop-path", "0.1", "--model", "cnn"], "--drop-path", "leave"),
    (["--drop-path", "0.1", *FROZEN], "--drop-path", "--freeze-backbone"),
    (["--decay-factor", "0"], "--decay-factor", "above 0"),
    (["--decay-factor", "1.5"], "--decay-factor", "at most 1"),
    (["--schedule", "multistep", "--milestones", "0"], "--milestones", "at least 1"),
    (["--schedule", "multistep", "--milestones", "20", "10"], "--milestones", "increase"),
    (["--schedule", "multistep", "--milestones", "10", "10"], "--milestones", "increase"),
    (["--schedule", "multistep"], "--schedule", "--milestones"),
    (["--milestones", "10"], "--milestones", "--schedule multistep"),
    (["--patience", "-1"], "--patience", "at least 0"),
    (["--cooldown", "-1"], "--cooldown", "at least 0"),
    (["--early-stopping-patience", "0"], "--early-stopping-patience", "at least 1"),
    (["--schedule", "plateau", "--val-fraction", "0"], "--schedule plateau", "--val-fraction"),
    (
        ["--early-stopping-patience", "2", "--val-fraction", "0"],
        "--early-stopping-patience",
        "--val-fraction",
    ),
    (["--accumulate", "0"], "--accumulate", "at least 1"),
    (["--accumulate", "3"], "--accumulate", "--batch-size 32"),
    (["--accumulate", "2", "--framework", "numpy"], "--accumulate", "--framework jax"),
    (["--remat", "--framework", "numpy"], "--remat", "--framework jax"),
    (["--distributed", "--framework", "numpy"], "--distributed", "--framework jax"),
    (["--remat", "--model", "cnn"], "--remat", "leave"),
    (["--freeze-backbone"], "--freeze-backbone", "--init-from"),
    (["--warmup-steps", "-1"], "--warmup-steps", "at least 0"),
    (["--schedule-steps", "0"], "--schedule-steps", "at least 1"),
    (["--epochs", "-1"], "--epochs", "at least 0"),
    (["--steps", "-1"], "--steps", "at least 0"),
    (["--steps", "99999999999999999999"], "--steps", "at most"),
    (["--epochs", "99999999999999999999"], "--epochs", "at most"),
    (["--batch-size", "0"], "--batch-size", "at least 1"),
    (["--eval-batch-size", "0"], "--eval-batch-size", "at least 1"),
    (["--seed", "-1"], "--seed", "at least 0"),
    (["--seed", "4294967296"], "--seed", "at most"),
    (["--checkpoint-every", "0"], "--checkpoint-every", "at least 1"),
    (["--eval-every", "0"], "--eval-every", "at least 1"),
    (["--log-every", "0"], "--log-every", "at least 1"),
    (["--verify-every", "-1"], "--verify-every", "at least 0"),
    (["--verify-every", "10", "--precision", "float64"], "--verify-every", "leave"),
    (["--verify-every", "10", "--distributed"], "--verify-every", "--distributed"),
    (["--verify-every", "10", "--accumulate", "2"], "--verify-every", "--accumulate"),
    (["--keep-checkpoints", "0"], "--keep-checkpoints", "at least 1"),
    (["--image-size", "31"], "--image-size", "32"),
    (["--image-size", "64x31"], "--image-size", "32"),
    (["--image-size", "31x64"], "--image-size", "32"),
    (["--image-size", "big"], "--image-size", "64x96"),
    (["--image-size", ""], "--image-size", "64x96"),
    (["--image-size", "-64"], "--image-size", "64x96"),
    (["--image-size", "64x64x3"], "--image-size", "64x96"),
    (["--augment", "mixup"], "--augment", "crop-flip"),
    (["--resize", "31"], "--resize", "at least 32"),
    (["--resize", "480", "256", "--augment", "crop-flip"], "--resize", "smaller first"),
    (["--resize", "32", "40", "48", "--augment", "crop-flip"], "--resize", "one number, or two"),
    (["--resize", "256", "480"], "--resize", "--augment"),
    (["--resume"], "--resume", "--run-dir"),
    (["--resume", "--run-dir", ""], "--run-dir", "name"),
    (["--run-dir", ""], "--run-dir", "name"),
    (["--model", "cnn", "--no-batch-norm"], "--no-batch-norm", "leave"),
    (["--model", "resnet18", "--stride-in-1x1"], "--stride-in-1x1", "resnet50"),
    (["--model", "resnet20", "--stride-in-1x1"], "--stride-in-1x1", "resnet50"),
    (["--model", "resnet20", "--small-images"], "--small-images", "leave"),
    (["--model", "cnn", "--small-images"], "--small-images", "leave"),
]


def refusal(argv, stored=None):
    """The one line that refuses a command line."""
    with pytest.raises(UserError) as caught:
        resolve(parse(argv), stored)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def test_the_tables_are_complete():
    assert VALUES.keys() == FIELDS.keys()
    limited = {
        flag_of(field)
        for field in FIELDS.values()
        if field.metadata["choices"] or any(v is not None for v in field.metadata["limits"].values())
    }
    assert limited <= {flag for _, flag, _ in MISTAKES}


@pytest.mark.parametrize("name", VALUES)
def test_flag_parses(name):
    written, value = VALUES[name]
    given = parse([flag_of(FIELDS[name]), *written])
    assert given == {name: value}
    assert type(given[name]) is type(value)


def test_all_flags_together():
    # 0 goes with no early stopping; a frozen backbone without batch norm; NumPy has none of the others
    left_out = {"val_fraction", "accumulate", "remat", "distributed", "drop_path", "norm_weight_decay"}
    left_out |= {"batch_norm_group", "verify_every"}  # the second needs float32
    left_out |= {"optimizer_arguments"}  # of an optimizer beside the table
    values = {name: value for name, value in VALUES.items() if name not in left_out}
    argv = [word for name, (written, _) in values.items() for word in [flag_of(FIELDS[name]), *written]]
    expected = {name: VALUES[name][1] for name in values} | {n: FIELDS[n].default for n in left_out}
    assert dataclasses.asdict(resolve(parse(argv))) == expected


def test_defaults():
    config = dataclasses.asdict(resolve(parse([])))
    assert {name: config[name] for name in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize(
    ("argv", "flag", "remedy"),
    [
        (["--optimizer", "sgd", "--beta1", "0.5"], "--beta1", "adabound"),
        (["--optimizer", "sgdbound", "--beta2", "0.9"], "--beta2", "adam"),
        (["--momentum", "0.5"], "--momentum", "--optimizer sgd"),
        (["--nesterov"], "--nesterov", "--optimizer sgd"),
        (["--optimizer", "sgdbound", "--nesterov"], "--nesterov", "--optimizer sgd"),
        (["--gamma", "0.1"], "--gamma", "--optimizer adabound"),
        (["--decay-factor", "0.5"], "--decay-factor", "--schedule multistep, plateau"),
        (["--schedule", "constant", "--patience", "3"], "--patience", "--schedule plateau"),
    ],
)
def test_a_flag_that_would_do_nothing_is_refused(argv, flag, remedy):
    given = parse(argv)
    with pytest.raises(UserError, match=f"^{flag}: .*leave it out, or choose .*{remedy}"):
        refuse_unused(given, resolve(given))


def test_optimizers_with_bounds_are_the_engines():
    assert USED_BY["gamma"] == ("optimizer", BOUNDED)


def test_flags_that_are_of_use_are_not_refused():
    for argv in (["--optimizer", "sgdbound", "--beta1", "0.5", "--gamma", "1"], ["--eps", "1e-6"]):
        refuse_unused(parse(argv), resolve(parse(argv)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_defaults_of_an_optimizer(optimizer):
    config = resolve(parse(["--optimizer", optimizer]))
    assert config.lr == (0.1 if optimizer == "sgd" else 1e-3)
    assert config.weight_decay == (0.01 if optimizer == "adamw" else 0.0)


def test_the_length_of_a_run():
    def steps(*argv):
        return resolve(parse(argv)).total_steps(steps_per_epoch=40)

    assert steps("--steps", "7", "--epochs", "2") == 7
    assert steps("--steps", "0") == 0
    assert steps("--epochs", "2") == 80
    assert steps("--epochs", "0") == 0
    assert steps() == 280  # digits: seven epochs
    assert steps("--dataset", "mnist") == 40


@pytest.mark.parametrize(
    ("argv", "size", "fits"),
    [
        (["--model", "resnet18"], (32, 32), False),
        (["--model", "resnet101"], (32, 32), False),
        (["--model", "resnet18"], (32, 33), True),
        (["--model", "resnet18", "--batch-size", "2"], (32, 32), True),
        (["--model", "resnet18", "--batch-size", "4", "--accumulate", "4"], (32, 32), False),
        (["--model", "resnet18", "--batch-size", "4", "--accumulate", "2"], (32, 32), True),
        (["--model", "resnet18", "--batch-size", "4", "--batch-norm-group", "1"], (32, 32), False),
        (["--model", "resnet18", "--batch-size", "4", "--batch-norm-group", "2"], (32, 32), True),
        (["--model", "resnet20", "--batch-size", "4", "--batch-norm-group", "1"], (32, 32), True),
        (["--model", "resnet18", "--init-from", "w", "--freeze-backbone"], (32, 32), True),
        (["--model", "resnet18", "--small-images"], (32, 32), True),
        (["--model", "resnet18", "--no-batch-norm"], (32, 32), True),
        (["--model", "resnet20"], (32, 32), True),
        (["--model", "cnn"], (32, 32), True),
    ],
)
def test_batch_norm_over_a_single_value_is_refused(argv, size, fits):
    config = resolve(parse(["--batch-size", "1", *argv]))
    if fits:
        config.check_batch_norm(*size)
    else:
        with pytest.raises(UserError, match=r"^--(batch-size|accumulate|batch-norm-group): "):
            config.check_batch_norm(*size)


def test_model_options_are_those_that_differ():
    def options(*argv):
        return resolve(parse(argv)).model_options()

    assert options() == {"residual_scale": 0.2}
    assert options("--residual-scale", "1") == {"residual_scale": 1.0}
    assert options("--model", "cnn") == {}
    assert options("--batch-norm-group", "4") == {"residual_scale": 0.2, "batch_norm_group": 4}
    expected = {"batch_norm": False, "stride_in_1x1": True, "small_images": True}
    assert options("--no-batch-norm", "--stride-in-1x1", "--small-images") == expected


def test_help_names_every_flag_its_default_and_its_choices():
    text = " ".join(make_parser().format_help().split())
    for field in FIELDS.values():
        assert re.search(rf"{flag_of(field)}[ ,]", text), field.name
    for name in (*MODELS, *OPTIMIZERS):
        assert name in text
    assert "(default 32)" in text


@pytest.mark.parametrize(("argv", "flag", "remedy"), MISTAKES, ids=[" ".join(row[0]) for row in MISTAKES])
def test_mistake_is_one_line_that_names_the_flag_and_the_remedy(argv, flag, remedy):
    message = refusal(argv)
    assert flag in message
    assert remedy in message


@pytest.mark.parametrize(
    ("text", "size"), [("32", (32, 32)), ("64x96", (64, 96)), ("224", (224, 224)), ("96x32", (96, 32))]
)
def test_image_size_is_height_by_width(text, size):
    assert parse_image_size(text) == size


def stored_options(*argv):
    """What config.json holds of a run that was started so."""
    options = dataclasses.asdict(resolve(parse(argv)))
    return json.loads(json.dumps({**options, "run_dir": None, "resume": False}))


MULTISTEP = ("--schedule", "multistep", "--milestones", "5", "9", "--lr", "0.02", "--optimizer", "adamw")


def test_resume_takes_every_unset_flag_from_the_run():
    config = resolve(parse(["--resume", "--run-dir", "r"]), stored_options(*MULTISTEP, "--batch-size", "8"))
    fresh = resolve(parse([*MULTISTEP, "--batch-size", "8"]))
    assert config == dataclasses.replace(fresh, resume=True, run_dir="r")


def test_resume_takes_the_same_flags_again():
    argv = [*MULTISTEP, "--weight-decay", "0.01"]  # the weight decay is adamw's default
    assert resolve(parse([*argv, "--resume", "--run-dir", "r"]), stored_options(*MULTISTEP)).lr == 0.02


@pytest.mark.parametrize("name", sorted(CHANGEABLE - {"resume", "run_dir"}))
def test_resume_may_change(name):
    written, value = VALUES[name]
    given = parse(["--resume", "--run-dir", "r", flag_of(FIELDS[name]), *written])
    assert getattr(resolve(given, stored_options()), name) == value


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in CHANGEABLE])
def test_resume_refuses_any_other_difference_by_name(name):
    written, value = VALUES[name]
    flag = flag_of(FIELDS[name])
    message = refusal(["--resume", "--run-dir", "r", flag, *written], stored_options())
    assert message.startswith(f"{flag}: ")
    assert str(value) in message
    assert str(stored_options()[name]) in message.replace("()", "[]")


def test_what_may_change_is_what_the_design_says():
    intervals = {"checkpoint_every", "eval_every", "log_every"}
    assert ({"framework", "steps", "epochs"} | intervals).issubset(CHANGEABLE)
    moves_numbers = {"model", "precision", "dataset", "optimizer", "lr", "seed", "batch_size", "val_fraction"}
    assert CHANGEABLE.isdisjoint(moves_numbers)


def test_epochs_on_resume_override_the_stored_steps():
    def total(*argv):
        config = resolve(parse(["--resume", "--run-dir", "r", *argv]), stored_options("--steps", "7"))
        return config.total_steps(steps_per_epoch=40)

    assert total() == 7
    assert total("--epochs", "2") == 80
    assert total("--epochs", "2", "--steps", "9") == 9
    assert total("--steps", "9") == 9


def test_resume_checks_the_ranges_of_what_changes():
    assert "--log-every" in refusal(["--resume", "--run-dir", "r", "--log-every", "0"], stored_options())


def test_resume_keeps_the_validations_that_a_plateau_counts():
    argv = ["--resume", "--run-dir", "r", "--eval-every", "6"]
    stored = stored_options("--schedule", "plateau", "--eval-every", "5")
    assert refusal(argv, stored).startswith("--eval-every: the run has 5, not 6")
    assert resolve(parse(argv[:3]), stored).eval_every == 5


def test_options_of_a_later_version_are_refused_by_name():
    stored = {**stored_options(), "from_the_future": 1}
    with pytest.raises(UserError, match="unknown option 'from_the_future', of a newer version"):
        resolve(parse(["--resume", "--run-dir", "r"]), stored)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", "three"),
        ("steps", 1.5),
        ("lr", "0.1"),
        ("lr", [0.1]),
        ("model", 101),
        ("model", None),
        ("seed", True),
        ("batch_norm", 1),
        ("batch_size", None),
        ("milestones", [1.5]),
        ("milestones", "5"),
    ],
)
def test_a_stored_option_of_another_type_is_refused(name, value):
    message = refusal(["--resume", "--run-dir", "r"], {**stored_options(), name: value})
    assert name in message
    assert "config.json" in message


def torch_rates(make_scheduler, steps, lr=0.1):
    """The learning rates of PyTorch's scheduler at steps 0, 1, ..., `steps`."""
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=lr)
    scheduler = make_scheduler(optimizer)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(steps):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
            scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("length", [1, 2, 7, 400])
def test_cosine_is_pytorchs(length):
    expected = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=length), length)
    schedule = make_schedule("cosine", 0.1, length=length)
    assert [schedule(step) for step in range(length + 1)] == pytest.approx(
        expected, rel=FLOAT64_LAYER, abs=1e-16
    )


def test_cosine_stays_at_zero_after_its_length():
    schedule = make_schedule("cosine", 0.1, length=10)
    assert schedule(10) == schedule(11) == schedule(10**6) == 0


def test_cosine_of_no_length_is_defined():
    assert make_schedule("cosine", 0.1, length=0)(0) == 0.1


@pytest.mark.parametrize("factor", [0.1, 0.5, 1.0])
def test_multistep_is_pytorchs(factor):
    milestones = [1, 5, 6, 20]
    expected = torch_rates(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, milestones=milestones, gamma=factor), 30
    )
    schedule = make_schedule("multistep", 0.1, length=30, milestones=milestones, factor=factor)
    assert [schedule(step) for step in range(31)] == pytest.approx(expected, rel=FLOAT64_LAYER, abs=0)


LOSSES = {
    "falls": [2.0 - 0.01 * k for k in range(60)],
    "rests": [1.0] * 60,
    "rises": [1.0 + 0.01 * k for k in range(60)],
    "falls by less than the threshold": [1.0 * (1 - 0.9e-4) ** (k % 2) for k in range(60)],
    "falls by just more": [(1 - 1.1e-4) ** k for k in range(60)],
    "wavers": list(np.random.default_rng(0).normal(size=400).cumsum() * 0.05 + 3),
    "is no number at times": [math.nan if k % 3 else 3.0 - 0.02 * k for k in range(60)],
    "is infinite": [math.inf] * 30,
}


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize(
    ("patience", "factor", "cooldown"), [(10, 0.1, 0), (5, 0.1, 5), (5, 0.1, 25), (0, 0.5, 0), (1, 0.9, 2)]
)
def test_plateau_is_pytorchs(losses, patience, factor, cooldown):
    """A validation every third step. With its fall by less than 1e-8 left out, as PyTorch leaves it out."""
    optimizer = torch.optim.SGD([torch.zeros(1, dtype=torch.float64)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=factor, patience=patience, cooldown=cooldown
    )
    validations: list[tuple[int, float]] = []
    schedule = make_schedule(
        "plateau", 0.1, length=9, factor=factor, patience=patience, cooldown=cooldown, validations=validations
    )
    expected = [0.1] * 3
    assert [schedule(step) for step in range(3)] == expected
    for number, loss in enumerate(LOSSES[losses], start=1):
        validations.append((3 * number, loss))
        scheduler.step(loss)
        expected += [optimizer.param_groups[0]["lr"]] * 3
        assert schedule(3 * number) == pytest.approx(expected[-1], rel=FLOAT64_LAYER, abs=0)
    # What came later changes nothing of what was before
    assert [schedule(step) for step in range(len(expected))] == pytest.approx(
        expected, rel=FLOAT64_LAYER, abs=0
    )


def test_plateau_worked_out_by_hand():
    """Patience 1, so two in a row; then one that does not count."""
    losses = [3.0, 2.0, 2.0, 2.0, 5.0, 2.0, 2.0, 1.0]
    validations = [(10 * number, loss) for number, loss in enumerate(losses, start=1)]
    schedule = make_schedule(
        "plateau", 1.0, length=9, factor=0.5, patience=1, cooldown=1, validations=validations, warmup_steps=4
    )
    steps = [0, 3, 4, 39, 40, 69, 70, 1000]
    assert [schedule(step) for step in steps] == pytest.approx([0.2, 0.8, 1, 1, 0.5, 0.5, 0.25, 0.25])


@pytest.mark.parametrize(
    ("losses", "patience", "stops_at"),
    [
        ([3, 2, 1, 1, 1], 2, 5),  # as low is not lower
        ([3, 2, 1, 1, 0.99, 1], 2, None),
        ([1, 2], 1, 2),
        ([1], 1, None),
        ([], 1, None),
        ([math.nan, math.nan, 1, 2, math.nan, 3], 3, 6),
        ([5, 6, 4, 7, 3, 8, 2], 2, None),
    ],
)
def test_early_stopping_worked_out_by_hand(losses, patience, stops_at):
    validations = list(enumerate(losses, start=1))
    stops = [k for k in range(len(losses) + 1) if has_converged(validations[:k], patience)]
    assert (stops[0] if stops else None) == stops_at


def test_the_bounds_of_adabound_follow_a_plateau():
    """Once the bounds have closed, an update is lr / base_lr * final_lr * gradient, in both engines."""
    validations = [(2, 1.0), (4, 1.0)]
    schedule = make_schedule("plateau", 0.01, length=9, patience=0, validations=validations)
    options: dict[str, Any] = {"b1": 0.0, "final_lr": 0.5, "base_lr": 0.01, "gamma": 1e9}
    gradient = np.array([2.0, -3.0, 1e-3])
    for step, factor in ((3, 0.5), (4, 0.05)):
        parameter = numpy_ref.layers.Parameter(np.zeros(3))
        parameter.add_grad(gradient)
        numpy_ref.make_optimizer("adabound", [parameter], schedule(step), **options).step()
        np.testing.assert_allclose(parameter.value, -factor * gradient, rtol=1e-8)
        with jax.enable_x64(True):
            tx = jax_resnet.make_optimizer("adabound", jnp.asarray(schedule(step)), **options)
            params = {"w": jnp.zeros(3, jnp.float64)}
            updates, _ = tx.update({"w": jnp.asarray(gradient)}, tx.init(params), params)
        np.testing.assert_allclose(updates["w"], -factor * gradient, rtol=1e-8)


def test_constant():
    assert {make_schedule("constant", 0.1, length=3)(step) for step in range(9)} == {0.1}


def test_warmup_worked_out_by_hand():
    schedule = make_schedule("constant", 1.0, length=100, warmup_steps=4)
    assert [schedule(step) for step in range(6)] == pytest.approx(
        [0.2, 0.4, 0.6, 0.8, 1, 1], rel=FLOAT64_LAYER
    )
    # It rises to where the cosine is by then, and the cosine's clock has not waited.
    schedule = make_schedule("cosine", 1.0, length=10, warmup_steps=5)
    expected = [0.5 * k / 6 for k in range(1, 6)] + [0.5, 0.5 * (1 - 0.3090169943749474241)]
    assert [schedule(step) for step in range(7)] == pytest.approx(expected, rel=FLOAT64_LAYER)
    # Milestones within the warm-up have their effect on its end.
    schedule = make_schedule("multistep", 1.0, length=10, milestones=[2, 8], factor=0.5, warmup_steps=4)
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.5, 0.5, 0.5, 0.25]
    assert [schedule(step) for step in range(9)] == pytest.approx(expected, rel=FLOAT64_LAYER)


@pytest.mark.parametrize("name", ["constant", "cosine", "multistep", "plateau"])
def test_a_schedule_is_a_function_of_the_step_alone(name):
    schedule = make_schedule(
        name, 0.1, length=20, milestones=[3, 9], validations=[(7, 1.0), (9, 1.0)], patience=0, warmup_steps=5
    )
    forward = [schedule(step) for step in range(25)]
    assert [schedule(step) for step in reversed(range(25))] == forward[::-1]
    assert all(isinstance(rate, float) for rate in forward)
    assert forward[0] > 0  # a warm-up never begins with a wasted step
