"""The result of a comparison, and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity.alignment import Pair
from parity.trace import Value
from parity.weights import Audit


@dataclass(frozen=True)
class Tensor:
    """One tensor of both models. Errors are relative to the reference's largest magnitude.

    Attributes:
        what: "output", "input gradient", "parameter gradient" or "statistics"; "tensor" of recorded ones.
        reference, candidate: names.
        shape: of the reference's.
        error: of the candidate in its own precision, including what earlier stages passed on.
        noise: the largest such error of two correct models.
        made_here: the error of this stage alone, on the reference's own numbers; of the float64 twins, or if
            `coarse` in the models' own precision.
        allowed: the limit of `made_here`: a multiple of its noise.
        departs: `made_here` exceeds `allowed`.
        coarse: the twins agree; the candidate computes in a lower precision.
        factor: `allowed` is this many times the noise.
    """

    what: str
    reference: str
    candidate: str
    shape: tuple[int, ...]
    error: float
    noise: float
    made_here: float
    allowed: float
    departs: bool
    coarse: bool
    factor: float


@dataclass(frozen=True)
class Stage:
    """A value of the reference, the candidate's, and their comparison, forward and backward."""

    value: Value
    other: Value
    pair: Pair
    forward: Tensor
    backward: Tensor | None


@dataclass(frozen=True)
class Difference:
    """The first place at which the models differ.

    Attributes:
        what: "parameter", "output", "input gradient", "parameter gradient" or "statistics"; "tensor" of
            recorded ones.
        reference, candidate: the names of the stage or tensor.
        error: made at this place, relative to the tensor's largest magnitude.
        noise: what such an error may be; of recorded tensors what is allowed.
        index: where it is largest, in the reference's layout.
        cause: a sentence, or None.
        where: file and line of the candidate, if known.
        cause_id: a short name of the cause, such as "epsilon"; "" if none was found.
    """

    what: str
    reference: str
    candidate: str
    error: float
    noise: float
    index: tuple[int, ...] | None
    cause: str | None
    where: str
    cause_id: str = ""

    @property
    def distance(self) -> str:
        """How far the two are apart, in words."""
        if np.isinf(self.error) and self.index is None:
            return "they cannot be compared"
        limit = "allowed" if self.what == "tensor" else "noise"
        at = f", most at {list(self.index)}" if self.index is not None else ""
        return f"off by {self.error:.1e} of its largest magnitude, {limit} {self.noise:.1e}{at}"

    def __str__(self) -> str:
        of = f" {self.reference}" if self.what in ("tensor", "parameter") else f" of {self.reference}"
        of = "" if self.reference == self.what else of
        names = of if self.candidate in (self.reference, "") else f"{of} (candidate: {self.candidate})"
        place = f", at {self.where}" if self.where else ""
        cause = self.cause or "No cause that this tool knows makes them agree."
        distance = "" if np.isinf(self.error) and self.index is None else f": {self.distance}"
        return f"The models first differ at the {self.what}{names}{place}{distance}.\n{cause}"


@dataclass(frozen=True)
class Report:
    """Result of `compare`.

    Attributes:
        reference, candidate: the frameworks.
        precision: of the reference.
        stages: all paired values in the reference's order of computation.
        tensors: gradients of inputs and parameters, and running statistics; or recorded tensors.
        weights: the audit of the parameters.
        unmatched: modules of the reference without a counterpart.
        first_difference: None if the models agree.
        notes: what could not be compared, one sentence each.
    """

    reference: str
    candidate: str
    precision: str
    stages: Sequence[Stage]
    tensors: Sequence[Tensor]
    weights: Audit
    unmatched: Sequence[str]
    first_difference: Difference | None
    notes: Sequence[str] = ()

    @property
    def agrees(self) -> bool:
        """True if no stage and no tensor departs."""
        return self.first_difference is None

    def __str__(self) -> str:
        title = f"{'stage':<32}{'candidate':<32}{'error':>9}{'noise':>9}{'made here':>11}{'gradient':>10}"
        rows = [title] if self.stages else []
        for stage in self.stages:
            forward, backward = stage.forward, stage.backward
            gradient = (
                "" if backward is None else f"{backward.made_here:.0e}{'!' if backward.departs else ' '}"
            )
            mark = "!" if forward.departs else " "
            rows.append(
                f"{_short(stage.value.name):<32}{_short(stage.other.name):<32}{forward.error:>9.0e}"
                f"{forward.noise:>9.0e}{forward.made_here:>10.0e}{mark}{gradient:>10}"
            )
        for t in self.tensors:
            if t.departs or not self.stages:
                mark = " !" if t.departs else ""
                rows.append(f"{t.what} of {t.reference}: {t.made_here:.1e}, allowed {t.allowed:.1e}{mark}")
        rows += [f"not found in the candidate: {', '.join(self.unmatched)}"] if self.unmatched else []
        rows += self.notes
        return "\n".join([*rows, "", self.verdict])

    @property
    def verdict(self) -> str:
        """The result in a sentence or two."""
        if self.first_difference is None:
            others = f"{len(self.tensors)} gradients and statistics"
            compared = (
                f"{len(self.stages)} stages, {others}" if self.stages else f"{len(self.tensors)} tensors"
            )
            return f"The models agree: {compared}."
        return str(self.first_difference)

    def save(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML file."""
        from jinja2 import Environment, PackageLoader

        template = Environment(loader=PackageLoader("parity", "."), autoescape=True).get_template(
            "report.html"
        )
        first = self.first_difference
        title = "The models agree" if first is None else f"The models first differ at {first.reference}"
        about = f"Reference: {self.reference}, {self.precision}. Candidate: {self.candidate}."
        page = template.render(
            report=self, title=title, about=about, figure=_figure(self.stages) if self.stages else ""
        )
        Path(path).write_text(page, encoding="utf-8")


def _figure(stages: Sequence[Stage]) -> str:
    """Error and noise along the network, forward and backward, as a PNG in base64."""
    import base64
    import io

    from matplotlib.figure import Figure

    backward = [stage.backward for stage in stages if stage.backward is not None]
    rows = [("outputs", [stage.forward for stage in stages]), ("gradients", backward)]
    rows = [(title, tensors) for title, tensors in rows if tensors]
    figure = Figure(figsize=(11, 2.9 * len(rows) + 0.4), layout="constrained")
    for axes, (title, tensors) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        x = range(len(tensors))
        curves = (
            ("as it is", [t.error for t in tensors], {"color": "#59636e", "marker": "."}),
            ("noise of that", [t.noise for t in tensors], {"color": "#59636e", "linestyle": ":"}),
            ("made here", [t.made_here for t in tensors], {"color": "#0072b2", "marker": "."}),
            ("allowed", [t.allowed for t in tensors], {"color": "#0072b2", "linestyle": ":"}),
        )
        for label, errors, style in curves:
            axes.semilogy(
                x, [min(max(error, 1e-17), 1e3) for error in errors], label=label, linewidth=1.3, **style
            )
        departing = [index for index, tensor in enumerate(tensors) if tensor.departs]
        axes.plot(
            departing,
            [min(tensors[i].made_here, 1e3) for i in departing],
            "o",
            color="#d55e00",
            label="departs",
        )
        axes.set_title(f"{title}: largest error, relative", loc="left", fontsize=10, fontweight="bold")
        axes.set_xticks(x, [_short(t.reference) for t in tensors], rotation=90, fontsize=7)
        if len(tensors) > 60:
            axes.set_xticks(
                x[:: -(-len(tensors) // 60)],
                [_short(t.reference) for t in tensors[:: -(-len(tensors) // 60)]],
            )
        axes.grid(color="#dfe4e9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            ncols=5, fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.3, 1.0), borderaxespad=0.1
        )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return base64.b64encode(buffer.getvalue()).decode()


def _short(name: str) -> str:
    return name if len(name) < 32 else f"...{name[-27:]}"
