"""The sentinel of a run, made from its options: see `sentinel.py`."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

from experiment.data.loading import Data
from experiment.engines import ENGINES, Batch, Engine
from experiment.errors import UserError
from experiment.options.config import Config
from experiment.run.output import RunOutput
from experiment.run.second_process import SecondProcess
from experiment.run.sentinel import Sentinel, name_first
from experiment.run.update_rule import UpdateRule
from experiment.run.verifier import Request, Setup, Verdict, Verifier

MATMUL_PRECISION = "JAX_DEFAULT_MATMUL_PRECISION"  # read by JAX; without it GPUs multiply in TF32

ArgumentsOf = Callable[[Config], dict[str, Any]]
"""From options to the keyword arguments of an engine, without its learning rate."""


def check_device(config: Config, engine: Engine) -> None:
    """Raise UserError where a step that is computed again may have other bits."""
    if config.verify_every and engine.threads is None and not config.deterministic:
        fault = "on this device a step computed again may have other bits"
        raise UserError(f"--verify-every: {fault}; add --deterministic, or leave the flag out")


@contextmanager
def open_sentinel(
    config: Config, data: Data, engine: Engine, output: RunOutput, start_step: int, arguments_of: ArgumentsOf
) -> Iterator[Sentinel | None]:
    """Context with the sentinel of a run, and the process of the other engine; None without --verify-every.

    Args:
        config: the options.
        data: the splits.
        engine: the run's.
        output: its checkpoints and its console are used.
        start_step: the step at which this session begins.
        arguments_of: for engines like the run's.
    """
    if not config.verify_every:
        yield None
        return
    (other,) = ENGINES.keys() - {config.framework}
    second = None
    if engine.threads is not None or os.environ.get(MATMUL_PRECISION) in ("highest", "float32"):
        second = SecondProcess(partial(make_check, verifier_setup(config, other, arguments_of)))
    else:
        output.console.report(
            f"steps are verified in this process alone: without {MATMUL_PRECISION}=highest this device "
            f"rounds more than the {other} engine"
        )
    sentinel = Sentinel(
        engine,
        config.verify_every,
        start_step=start_step,
        second=second,
        second_name=other,
        checkpoints=output.checkpoints,
        report=output.console.report,
        read=partial(read_batch, data) if engine.holds_images else None,
    )
    with closing(sentinel):
        yield sentinel


def make_check(setup: Setup) -> Callable[[Request], Verdict]:
    """Return the function that compares steps; for the second process."""
    return Verifier(setup, name_first).check


def verifier_setup(config: Config, other: str, arguments_of: ArgumentsOf) -> Setup:
    """Return what compares the steps of a run with those of the engine `other`."""
    # None of these changes what is compared
    plain = dataclasses.replace(config, accumulate=1, remat=False, log_gradients=False, model_ema_decay=None)
    arguments = {name: arguments_of(dataclasses.replace(plain, framework=name)) for name in ENGINES}
    options = arguments[other]["optimizer_options"]
    rule = UpdateRule(config.optimizer, options, config.model_ema_decay)
    return Setup(config.framework, other, arguments, rule)


def read_batch(data: Data, step: int) -> Batch:
    """Return the training batch of a step, from 1, with its images."""
    batches: Any = data.train_batches(step - 1)
    with closing(batches):
        batch: Batch = next(batches)
    return batch
