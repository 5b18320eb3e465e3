"""`parity` names the stage and the cause of the labeled faults, and raises no alarm at correct ports."""

from __future__ import annotations

import pytest

from tests import ports, ports_blind
from tests.ports.case import Fault, Port
from tests.ports.score import alarms, outcome, table

QUICK = (
    "gru-jax/stop-gradient",
    "gru-jax/update-gate-convention",
)  # the others take minutes, mostly to compile
FAULTS = {fault.name: fault for fault in ports.all_faults()}


@pytest.mark.parametrize("fault", [FAULTS[name] for name in QUICK], ids=QUICK)
def test_a_fault_is_placed_and_explained(fault: Fault) -> None:
    result = outcome(fault)
    assert result.explained, result.said


def test_a_correct_port_raises_no_alarm() -> None:
    (port,) = (port for port in ports.all_ports() if port.name == "gru-jax")
    assert not list(alarms(port, [0]))


@pytest.mark.slow
def test_nearly_all_faults_of_the_first_set_are_placed_and_most_are_explained() -> None:
    results = [outcome(fault) for fault in FAULTS.values()]
    assert sum(result.placed for result in results) >= 0.95 * len(results), table(results)
    assert sum(result.explained for result in results) >= 0.95 * len(results), table(results)


@pytest.mark.slow
def test_most_faults_of_the_second_set_are_placed_and_explained() -> None:
    results = [outcome(fault) for fault in ports_blind.all_faults()]
    assert sum(result.placed for result in results) >= 0.9 * len(results), table(results)
    assert sum(result.explained for result in results) >= 0.75 * len(results), table(results)


@pytest.mark.slow
@pytest.mark.parametrize("port", [*ports.all_ports(), *ports_blind.all_ports()], ids=lambda port: port.name)
def test_correct_ports_raise_no_alarm(port: Port) -> None:
    """Two ports cannot be compared in one of the precisions; docs/comparing_models.md says why."""
    said = list(alarms(port, [0]))
    if port.float32_inside or port.name == "lstm-nnx-one-bias":
        assert len(said) == 1
    else:
        assert not said, said
