"""What a person sees while a run goes on: lines, kept in log.txt too, and a progress bar."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, TextIO

PLAIN_LINE_SECONDS = 5.0


class Console:
    """Lines on `stream` and in a log file; on a terminal a bar of images with loss, accuracy, speed and time left."""

    def __init__(self, log: Path | None = None, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._log = open(log, "a", encoding="utf-8") if log else None  # noqa: SIM115 - closed by close()
        self._bar: Any = None
        self._terminal = self._stream.isatty()
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
            self._log.flush()

    def start(self, done: int, total: int, batch_size: int) -> None:
        """Show a bar over `total` steps of which `done` are done."""
        from tqdm import tqdm

        self._batch_size = batch_size
        self._bar = tqdm(
            total=total * batch_size,
            initial=done * batch_size,
            unit=" images",
            unit_scale=True,
            file=self._stream,
            disable=not self._terminal,
            dynamic_ncols=True,
            smoothing=0.1,
        )

    def progress(self, step: int, total: int, epoch: str, loss: float, accuracy: float, speed: float) -> None:
        """Move the bar to `step`; without a terminal, a plain line every few seconds."""
        if self._terminal:
            self._bar.set_description(f"epoch {epoch}")
            self._bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.3f}", refresh=False)
            self._bar.update(step * self._batch_size - self._bar.n)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_SECONDS or step == total:
            self._last_line = time.monotonic()
            left = (total - step) * self._batch_size / speed if speed else 0.0
            self.say(
                f"step {step}/{total}, epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.3f}, "
                f"{speed:.0f} images/s, {left:.0f} s left"
            )

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Take the bar away and close the log."""
        self.stop()
        if self._log:
            self._log.close()
