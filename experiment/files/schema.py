"""The types of the JSON files of a run, for `experiment.reading`.

They say what the readers rely on. Entries that a file may have beside these are not checked here; config.json
may have none (`run_folder.read_record`), and its options are checked by `Config`.
"""

from typing import Annotated, Any, Required, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**53)]
Positive = Annotated[int, Meta(ge=1, le=2**53)]
Side = Annotated[int, Meta(ge=1, le=99_999)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Number = Annotated[float, Meta(ge=-1e308, le=1e308)]
Metrics = dict[str, Number | None]
"""Numbers by name; None for one that was not finite."""


class Resolved(TypedDict, total=False):
    """ "resolved" of config.json: what followed from the options and the data."""

    total_steps: Count
    steps_per_epoch: Positive
    schedule_steps: Required[Count]
    warmup_steps: Count
    optimizer_options: dict[str, Number | bool | None]
    init_from_sha256: str | None
    init_from_commit: str | None
    num_classes: Annotated[int, Meta(ge=1, le=10_000_000)]
    class_names: Annotated[list[str], Meta(min_length=1)]
    image_shape: tuple[Side, Side, Annotated[int, Meta(ge=1, le=1000)]]
    mean: Annotated[list[Number], Meta(min_length=1)]
    std: Annotated[list[Annotated[float, Meta(gt=0, le=1e308)]], Meta(min_length=1)]
    train_size: Count
    val_size: Count
    test_size: Count
    data_version: str | None
    data_config: str | None
    data_test_split: str | None
    data_sha256: str | None
    optimizer_sha256: Sha256
    class_weights: list[Number]


class Session(TypedDict, total=False):
    """A start or resume of a run."""

    step: Count
    time: str
    command: list[str]
    device: str
    threads: Count | None
    cpu_count: Count | None
    python: str
    platform: str
    versions: dict[str, str]
    git_commit: str | None


class Record(TypedDict):
    """config.json."""

    config: dict[str, Any]
    resolved: Resolved
    sessions: list[Session]


class Summary(TypedDict, total=False):
    """summary.json."""

    framework: str
    model: str
    dataset: str
    optimizer: str
    seed: Count
    parameters: Count
    trainable_parameters: Count
    frozen_parameters: Count
    steps: Required[Count]
    epochs: Number
    test: Metrics | None
    best: Metrics | None
    images_per_second: Number | None
    compile_seconds: Number | None
    wall_seconds: Number | None
    processor_seconds: Number | None


class History(TypedDict):
    """The start of metrics.jsonl that a checkpoint belongs to."""

    length: Count
    sha256: Sha256


class Best(TypedDict):
    """The lowest validation loss so far."""

    step: Count
    loss: Number


class Totals(TypedDict):
    """The metrics of an epoch that goes on: `Metrics.to_json`."""

    examples: Count
    loss_sum: Number | None
    hits: Annotated[list[Count], Meta(min_length=1)]
    labels: Annotated[list[Count], Meta(min_length=1)]
    predictions: Annotated[list[Count], Meta(min_length=1)]
    top5: Count


class Clock(TypedDict, total=False):
    """The times of a run: `timing.Clock`."""

    wall_seconds: Annotated[float, Meta(ge=0, le=1e15)]
    processor_seconds: Annotated[float, Meta(ge=0, le=1e15)] | None
    compile_seconds: Annotated[float, Meta(ge=0, le=1e15)]
    train_seconds: Annotated[float, Meta(ge=0, le=1e15)]
    train_steps: Count


class CheckpointRecord(TypedDict, total=False):
    """run.json of a checkpoint."""

    history: Required[History]
    epoch_metrics: Totals | None
    best: Best | None
    clock: Clock
    identity: dict[str, Any]
    validation_due: bool


class FileSum(TypedDict):
    """Size and hash of a file of a checkpoint."""

    bytes: Count
    sha256: Sha256


class Manifest(TypedDict):
    """manifest.json of a checkpoint."""

    files: dict[str, FileSum]
