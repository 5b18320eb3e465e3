"""The ready recipes: each one resolves by the very command that it opens with; flags override it."""

from __future__ import annotations

import json
import shlex
import tomllib

import pytest

from experiment.commands import train
from experiment.errors import UserError
from experiment.options import recipes
from experiment.options.command_line import parse
from experiment.options.config import Config
from experiment.options.recipes import with_recipe
from experiment.options.resolving import resolve


def resolved(*argv: str) -> Config:
    return resolve(with_recipe(parse(argv)))


def comment(name: str) -> list[str]:
    """The lines of the comment that a recipe opens with."""
    lines = (recipes.FOLDER / f"{name}.toml").read_text().splitlines()
    return [line.removeprefix("# ") for line in lines[: lines.index("")]]


def test_the_runs_that_are_promised_are_there():
    promised = {"cifar10-resnet20", "cifar10-resnet32", "cifar10-resnet110", "cifar100-resnet32"}
    promised |= {"fashion-mnist", "fashion-mnist-frozen", "imagenet-resnet34", "imagenet-resnet101"}
    promised |= {"cars-resnet101-adam", "cars-resnet101-adabound", "mnist-resnet101-numpy"}
    assert promised <= set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_resolves_by_the_command_it_opens_with(name):
    command, *facts = comment(name)
    program, script, *argv = shlex.split(command)
    assert (program, script, argv[:2]) == ("python", "train.py", ["--recipe", name])
    config = resolved(*argv)
    options = tomllib.loads((recipes.FOLDER / f"{name}.toml").read_text())
    assert config.recipe == name
    for key, value in options.items():
        if key not in parse(argv):
            assert getattr(config, key) == (tuple(value) if isinstance(value, list) else value), key
    told = [line.split(":")[0] for line in facts if not line.startswith(" ")]
    assert told == ["What", "Source", "Expected", "Time"]


def test_flags_override_a_recipe():
    recipe = resolved("--recipe", "cifar10-resnet20")
    assert (recipe.lr, recipe.steps, recipe.milestones, recipe.seed) == (0.1, 64000, (32000, 48000), 0)
    config = resolved("--recipe", "cifar10-resnet20", "--lr", "0.05", "--model", "resnet56", "--seed", "3")
    assert (config.lr, config.model, config.seed) == (0.05, "resnet56", 3)
    assert (config.milestones, config.weight_decay) == (recipe.milestones, recipe.weight_decay)


def test_switches_of_a_recipe_can_be_taken_back():
    argv = ["--recipe", "imagenet-resnet101", "--model", "resnet34"]
    with pytest.raises(UserError, match="--stride-in-1x1"):
        resolved(*argv)
    assert not resolved(*argv, "--no-stride-in-1x1").stride_in_1x1
    assert resolved("--recipe", "cifar10-resnet20").mean_only
    assert not resolved("--recipe", "cifar10-resnet20", "--no-mean-only").mean_only


def test_a_length_or_a_schedule_that_is_given_takes_the_place_of_the_recipes():
    def steps(*argv: str) -> int:
        return resolved("--recipe", "cifar10-resnet20", *argv).total_steps(steps_per_epoch=351)

    assert steps() == 64000
    assert steps("--epochs", "2") == 702
    assert steps("--steps", "7") == 7
    config = resolved("--recipe", "cifar10-resnet20", "--schedule", "cosine")
    assert (config.schedule, config.milestones) == ("cosine", ())


def test_without_a_recipe_nothing_changes():
    assert with_recipe({"seed": 3}) == {"seed": 3}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("lr = ", ["cannot be read", "restore"]),
        ("learning_rate = 0.1", ["learning_rate is no option"]),
        ('lr = "fast"', ["lr cannot be 'fast'"]),
        ("milestones = [1.5]", ["milestones cannot be (1.5,)"]),
        ("batch_norm = 1", ["batch_norm cannot be 1"]),
        ('run_dir = "runs/mine"', ["run_dir is no option"]),
        ("[optimizer]\nlr = 0.1", ["optimizer cannot be"]),
        ("batch_size = 0", ["--batch-size", "at least 1"]),
        ('model = "resnet99"', ["--model", "resnet101"]),
    ],
)
def test_a_spoilt_recipe_is_refused_in_a_line(tmp_path, monkeypatch, content, words):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    (tmp_path / "mine.toml").write_text(content)
    with pytest.raises(UserError) as caught:
        resolved("--recipe", "mine")
    (line,) = str(caught.value).splitlines()
    for word in words:
        assert word in line


def test_an_unknown_recipe_is_refused_and_the_others_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("nonesuch", "../recipes/cifar10-resnet20", ""):
        assert train.main(["--recipe", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train.py: error: --recipe: unknown recipe {name!r}")
        assert "cifar10-resnet20" in line
    assert list(tmp_path.iterdir()) == []


def test_the_resolved_options_are_kept_and_resume_does_not_read_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('model = "cnn"\ntrain_subset = 0.1\nlr = 0.02\nepochs = 1\nreport = false\n')
    run_dir = tmp_path / "run"
    assert train.main(["--recipe", "mine", "--batch-size", "16", "--run-dir", str(run_dir)]) == 0
    options = json.loads((run_dir / "config.json").read_text())["config"]
    wanted = {"recipe": "mine", "model": "cnn", "lr": 0.02, "batch_size": 16, "epochs": 1, "beta1": 0.9}
    assert {name: options[name] for name in wanted} == wanted
    path.unlink()
    assert train.main(["--resume", "--run-dir", str(run_dir), "--recipe", "mine"]) == 0
