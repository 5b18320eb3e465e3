"""`python -m tests.ports.score`: what `parity` says about the labeled set, as a table.

A fault is placed if the report names its stage (or one that its label accepts), and explained if it also
names its cause. A correct port must raise no alarm, in float32 and float64, with every seed.

    python -m tests.ports.score                  # all faults, all ports with one seed
    python -m tests.ports.score --seeds 5        # the ports with five
    python -m tests.ports.score gru lstm -v      # some models, and what was said of each miss
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax

import parity
from tests import ports, ports_blind
from tests.ports.case import Case, Fault, Port

COARSE = {"epsilon-outside-root": "epsilon", "momentum": "momentum-convention"}
"""What the report calls by a finer name than the label."""


@dataclass(frozen=True)
class Outcome:
    """What the report said of one fault.

    Attributes:
        placed: it names the stage.
        explained: and the cause.
        said: stage, cause and sentence, for the reader.
    """

    fault: Fault
    placed: bool
    explained: bool
    said: str


def models(case: Case) -> tuple[parity.Model, parity.Model]:
    """The reference and the candidate of a case."""
    match case.adapter:
        case "nnx":
            candidate = parity.nnx_model(case.candidate)
        case "linen":
            candidate = parity.linen_model(case.candidate, case.variables)
        case "jax":
            candidate = parity.jax_model(case.candidate, case.variables, case.state)
    return parity.torch_model(case.reference), candidate


def compare(case: Case) -> parity.Report:
    """Compare the two models of a case."""
    return parity.compare(*models(case), case.inputs, case.candidate_inputs)


def outcome(fault: Fault) -> Outcome:
    """Compare a faulty port with its reference, and the report with the label."""
    try:
        case = fault.build(0)
        first = compare(case).first_difference
    except parity.ParityError as error:
        return Outcome(fault, False, False, f"refused: {error}")
    if first is None:
        return Outcome(fault, False, False, "no difference")
    placed = is_placed(fault, case, first)
    said = f"{first.what} of {first.reference} ({first.candidate}) at {first.where}: {first.cause}"
    return Outcome(
        fault,
        placed,
        placed and COARSE.get(first.cause_id, first.cause_id) == fault.cause,
        f"[{first.cause_id}] {said}",
    )


def is_placed(fault: Fault, case: Case, first: parity.Difference) -> bool:
    """True if the report names the stage, or the parameter or statistic, that the label names.

    The last operation of a module has the module's name in a report: "layer1" for "layer1.add".
    """
    if fault.parameter and first.reference == fault.parameter:
        return True
    trace = parity.torch_model(case.reference).run(case.inputs)
    last = {f"{v.module}.{v.operation}": v.name for v in trace.values if v.is_module}
    names = [last.get(name, name) for name in (fault.stage, *fault.accept)]
    kinds = (fault.what, "parameter", *(("output",) if fault.what == "parameter" else ()))
    return first.what in kinds and any(
        first.reference == name or first.reference.startswith(f"{name}.") for name in names
    )


def alarms(port: Port, seeds: Sequence[int]) -> Iterator[str]:
    """What is said against a correct port; nothing if all is well."""
    for seed in seeds:
        for dtype in ("float32", "float64"):
            with jax.enable_x64(True) if dtype == "float64" else contextlib.nullcontext():
                try:
                    first = compare(port.build(seed, dtype=dtype)).first_difference
                except parity.ParityError as error:
                    yield f"seed {seed}, {dtype}: refused: {error}"
                    continue
            if first is not None:
                yield f"seed {seed}, {dtype}: {first}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="cnn, lstm, cnn-nnx/epsilon, ...; all if none is given"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="of the correct ports (default 1; 0: faults alone)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="print what was said of each miss")
    options = parser.parse_args()

    def wanted(name: str) -> bool:
        return not options.models or any(name.startswith(model) for model in options.models)

    for package in (ports, ports_blind):
        outcomes = []
        for fault in filter(lambda fault: wanted(fault.name), package.all_faults()):
            result = outcome(fault)
            outcomes.append(result)
            if options.verbose and not result.explained:
                label = f"{fault.name}: {fault.what} of {fault.stage}, {fault.cause}"
                print(f"{'cause' if result.placed else 'STAGE'} {label}\n    {result.said}", flush=True)
        print(f"{package.__name__}\n{table(outcomes)}\n")
        runs = 0
        for port in filter(lambda port: wanted(port.name), package.all_ports()) if options.seeds else ():
            for alarm in alarms(port, range(options.seeds)):
                print(f"ALARM {port.name}: {alarm}", flush=True)
            runs += 2 * options.seeds
        print(f"{runs} runs of correct ports of {package.__name__}\n")


def table(outcomes: Sequence[Outcome]) -> str:
    """Faults, right stages and right causes by model, as Markdown."""
    lines = ["| model | faults | right stage | right cause |", "| --- | --- | --- | --- |"]
    rows: dict[str, list[Outcome]] = {}
    for result in outcomes:
        rows.setdefault(result.fault.port.name, []).append(result)
    for name, group in [*rows.items(), ("all", list(outcomes))]:
        placed, explained = sum(o.placed for o in group), sum(o.explained for o in group)
        lines.append(f"| {name} | {len(group)} | {placed} | {explained} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
