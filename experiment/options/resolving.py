"""A checked Config from the flags that were given, and on resume from the options stored with the run."""

import dataclasses
import typing
from typing import Any

from experiment.errors import UserError
from experiment.options.config import OPTIMIZERS, Config, flag_of
from experiment.options.paths import HUB, local_path

# Options that only some values of another option use.
USED_BY = {
    **dict.fromkeys(("final_lr", "gamma"), ("optimizer", ("adabound", "amsbound", "adaboundw", "sgdbound"))),
    "beta1": ("optimizer", tuple(name for name in OPTIMIZERS if name != "sgd")),
    **dict.fromkeys(
        ("beta2", "eps"), ("optimizer", tuple(name for name in OPTIMIZERS if name not in ("sgd", "sgdbound")))
    ),
    **dict.fromkeys(("momentum", "nesterov"), ("optimizer", ("sgd",))),
    "decay_factor": ("schedule", ("multistep", "plateau")),
    **dict.fromkeys(("patience", "cooldown"), ("schedule", ("plateau",))),
    "skip_bad": ("dataset", ("folder",)),
}

PATHS = ("data_dir", "init_from", "run_dir")  # options that name a local file or folder

# The published defaults: PyTorch's, and for AdaBound those of the reference code.
DEFAULT_LR = {"sgd": 0.1}
DEFAULT_WEIGHT_DECAY = {"adamw": 0.01}

# Options that a resumed run may change: none changes a number in a step of both runs.
CHANGEABLE = frozenset(
    {
        *("framework", "steps", "epochs", "data_dir", "run_dir", "resume", "distributed"),
        *("checkpoint_every", "eval_every", "log_every", "keep_checkpoints", "report", "test"),
        *("log_gradients", "verify_every"),
        "early_stopping_patience",  # like steps: when the run ends
        "schedule_steps",  # `session.resolve_lengths` refuses another length of the schedule
    }
)


def is_changeable(name: str, schedule: str) -> bool:
    """Return True if a resumed run may change an option."""
    # A plateau is counted in validations: other intervals would change the rates.
    return name in CHANGEABLE and not (name == "eval_every" and schedule == "plateau")


def with_local_paths(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with `~` expanded in their paths. Raises UserError for a path that is not local.

    Weights may have a name on the Hub instead (`files/hub.py`).
    """
    paths = {name: options[name] for name in PATHS if isinstance(options.get(name), str)}
    if paths.get("init_from", "").startswith(HUB):
        del paths["init_from"]
    return options | {name: local_path("--" + name.replace("_", "-"), path) for name, path in paths.items()}


def refuse_unused(given: dict[str, Any], config: Config) -> None:
    """Raise UserError for a flag that was given and that the run does not use."""
    for name in (name for name in given if name in USED_BY):
        decides, values = USED_BY[name]
        if getattr(config, decides) not in values:
            fault = f"--{name.replace('_', '-')}: {decides} {getattr(config, decides)} does not use it"
            raise UserError(f"{fault}; leave it out, or choose --{decides} {', '.join(values)}")


def resolve(given: dict[str, Any], stored: dict[str, Any] | None = None) -> Config:
    """A checked Config, its learning rate and weight decay filled in, from the flags that were given and, on
    resume, the options stored with the run.

    Raises UserError for an option out of range, and on resume for one that differs from the stored one and
    may not.
    """
    given = with_local_paths(given)
    if stored is None:
        config = Config(**given)
    else:
        hints = typing.get_type_hints(Config)
        stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
        for name, value in stored.items():
            if name not in hints:
                raise UserError(f"config.json: unknown option {name!r}, of a newer version; use that version")
            if not fits(value, hints[name]):
                remedy = "restore the file, or start a fresh run"
                raise UserError(f"config.json: {name} cannot be {value!r}; {remedy}")
        stored = with_local_paths(stored)
        if "epochs" in given and "steps" not in given:
            stored["steps"] = None
        config = Config(**{**stored, **given})
        for field in dataclasses.fields(Config):
            old, new = stored.get(field.name, field.default), getattr(config, field.name)
            if not is_changeable(field.name, config.schedule) and old != new:
                remedy = "leave the flag out, or start a fresh run"
                raise UserError(f"{flag_of(field)}: the run has {old}, not {new}; {remedy}")
    config.check()
    usual: dict[str, Any] = {
        "lr": DEFAULT_LR.get(config.optimizer, 1e-3),
        "weight_decay": DEFAULT_WEIGHT_DECAY.get(config.optimizer, 0.0),
    }
    unset = {name: value for name, value in usual.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **unset)


def fits(value: Any, hint: Any) -> bool:
    """True if a value read from JSON or TOML is of the type that its field is annotated with."""
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(type(item) is kind for item in value)
    kinds = typing.get_args(hint) or (hint,)
    return type(value) in kinds or (type(value) is int and float in kinds)
