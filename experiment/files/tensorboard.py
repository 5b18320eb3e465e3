"""RUN/tensorboard: the lines of metrics.jsonl, the options and the images, as TensorBoard reads them.

Written with TensorBoard's own record writer, which needs no TensorFlow, in the thread of the run: an error of
the disk is raised where it happens.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from experiment.files import metrics_log

FOLDER = "tensorboard"
METRICS = ("loss", "accuracy", "f1", "top5")
RESULTS = ("loss/test", "accuracy/test", "f1/test")


class EventFile:
    """The one file of a run's newest session.

    It begins with all that metrics.jsonl holds already, and the files of earlier sessions are removed: no
    step comes twice, wherever the run was stopped. A running TensorBoard drops the data of removed files.
    """

    def __init__(self, run_dir: Path, options: Mapping[str, Any]) -> None:
        """Start the file. `options` are the run's; metrics.jsonl is already cut back to the resumed step."""
        from tensorboard.compat.proto import event_pb2
        from tensorboard.plugins.hparams import summary_v2 as hparams

        folder = run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        old = _files(run_dir)
        # TensorBoard reads the files in the order of their names, which begin with a time in seconds.
        times = [path.name.split(".")[3] for path in old]
        begun = max([int(time.time()), *(int(seconds) + 1 for seconds in times if seconds.isdigit())])
        self._records = _Records(folder / f"events.out.tfevents.{begun:010d}.run", "xb")
        for path in old:
            path.unlink()
        self._records.write(file_version="brain.Event:2")
        self._records.write(step=0, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        plain = {
            name: value for name, value in options.items() if isinstance(value, bool | int | float | str)
        }
        self._records.write(step=0, summary=hparams.hparams_pb(plain, trial_id=run_dir.name))
        declared = [hparams.HParam(name) for name in plain], [hparams.Metric(tag) for tag in RESULTS]
        self._records.write(step=0, summary=hparams.hparams_config_pb(*declared))
        for line in metrics_log.read(run_dir / metrics_log.NAME):
            self.append(line)
        self.flush()

    def append(self, line: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl as scalars: loss/val, loss/train; of a step loss/batch, step/lr, ..."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        part = "batch" if line["scope"] == "step" else line["split"]
        values = [
            Summary.Value(tag=f"{name}/{part}" if name in METRICS else f"step/{name}", simple_value=value)
            for name, value in line.items()
            if isinstance(value, int | float) and name not in ("step", "epoch")
        ]
        self._records.write(step=line["step"], summary=Summary(value=values))

    def flush(self) -> None:
        """Hand everything to the operating system, so that a reader sees it."""
        self._records.flush()

    def close(self) -> None:
        """Close the file."""
        self._records.close()


def add_images(run_dir: Path, images: Mapping[str, bytes], step: int) -> None:
    """Add PNG files, by name, to the event file of a run that has just ended at `step`."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    records = _Records(max(_files(run_dir)), "ab")
    for name, content in images.items():
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        image = Summary.Image(encoded_image_string=content, width=width, height=height, colorspace=4)
        value = Summary.Value(tag=f"report/{name}", image=image)
        records.write(step=step, summary=Summary(value=[value]))
    records.close()


def _files(run_dir: Path) -> list[Path]:
    return list((run_dir / FOLDER).glob("events.out.tfevents.*.run"))  # not those of other programs


class _Records:
    """A file of events."""

    def __init__(self, path: Path, mode: Literal["xb", "ab"]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        self._writer = RecordWriter(open(path, mode))  # noqa: SIM115 - closed by close()
        self.flush, self.close = self._writer.flush, self._writer.close

    def write(self, **fields: Any) -> None:
        """One event, now."""
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
