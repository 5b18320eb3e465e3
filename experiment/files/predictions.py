"""predictions.npz: the predicted class of every test image, and a few of the images themselves."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import image_of, pixels_of
from experiment.data.types import Pixels
from experiment.errors import UserError
from experiment.files.run_folder import write_file
from experiment.metrics import softmax
from experiment.reading import check_regular

FILE = "predictions.npz"
ARRAYS = ("labels", "predictions", "confidences", "shown")
SAMPLES = 32
MISTAKES = 32
DAMAGES: tuple[type[Exception], ...] = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, EOFError, MemoryError, OverflowError),
    *(NotImplementedError, SyntaxError, RecursionError, zipfile.BadZipFile, zlib.error),
)
"""What NumPy and zipfile raise for a damaged file; MemoryError for a header with huge shapes."""
THUMBNAIL = 96
"""Pixels of the longer side, at most, of an image that is kept."""

Integers = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Predictions:
    """The content of predictions.npz, as `Collector` collects it.

    Attributes:
        step: the step the weights are of.
        class_names: the classes' names.
        labels: the true classes, int32 [N].
        predictions: the predicted ones, int32 [N].
        confidences: the probabilities given to those, float32 [N].
        shown: which examples are among the images, int32 [K]; the first `samples` are spread evenly over
            the test set, the rest are mistakes, the most confident first.
        images: uint8 [K, h, w, C].
        samples: how many are samples.
    """

    step: int
    class_names: tuple[str, ...]
    labels: Integers
    predictions: Integers
    confidences: npt.NDArray[np.float32]
    shown: Integers
    images: Pixels
    samples: int

    def save(self, path: Path) -> None:
        """Write it, whole or not at all; equal content gives equal bytes. Nothing in it is pickled."""
        file = io.BytesIO()
        np.savez_compressed(
            file,
            step=np.array(self.step),
            class_names=np.array(self.class_names, np.str_),
            **{name: getattr(self, name) for name in ARRAYS},
            pictures=self.images,  # the name in the file is of the first version
            samples=np.array(self.samples),
        )
        write_file(path, file.getvalue())


def load(path: Path) -> Predictions:
    """Read what `Predictions.save` wrote. Raises UserError if the file is absent, damaged or another."""
    try:
        check_regular(path)
        with open(path, "rb") as content, np.load(content) as file:
            loaded = Predictions(
                step=int(file["step"]),
                class_names=tuple(map(str, file["class_names"])),
                samples=int(file["samples"]),
                images=file["pictures"],
                **{name: file[name] for name in ARRAYS},
            )
        n, classes = len(loaded.labels), len(loaded.class_names)
        if not (
            loaded.labels.shape == loaded.predictions.shape == loaded.confidences.shape == (n,)
            and all(a.dtype == np.int32 for a in (loaded.labels, loaded.predictions, loaded.shown))
            and loaded.confidences.dtype == np.float32
            and loaded.shown.ndim == 1
            and loaded.images.shape[3:] in ((1,), (3,))
            and 0 not in loaded.images.shape[1:]
            and loaded.step >= 0
            and all(((a >= 0) & (a < classes)).all() for a in (loaded.labels, loaded.predictions))
            and ((loaded.shown >= 0) & (loaded.shown < n)).all()
            and loaded.images.dtype == np.uint8
            and loaded.images.ndim == 4
            and len(loaded.images) == len(loaded.shown) >= loaded.samples >= 0
        ):
            raise ValueError("its arrays do not fit together")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; a run writes it when it tests, at its end") from None
    except DAMAGES as error:
        raise UserError(f"{path}: is not what a run writes ({error}); test the run again") from None
    return loaded


class Collector:
    """Collects `Predictions` of a part of the data, batch by batch in its order, few images in memory.

    Args:
        size: how many examples there will be.
    """

    def __init__(self, size: int) -> None:
        self._parts: list[tuple[Integers, Integers, npt.NDArray[np.float32]]] = []
        self._seen = 0
        self._sampled = np.unique(np.linspace(0, size - 1, min(SAMPLES, size)).round().astype(np.int32))
        self._samples: list[tuple[int, Pixels]] = []
        self._mistakes: list[tuple[float, int, Pixels]] = []

    def update(self, images: Pixels, logits: np.ndarray, labels: Integers) -> None:
        """Add a batch: images uint8 [N, H, W, C], logits [N, num_classes], labels [N]."""
        predictions = logits.argmax(1).astype(np.int32)
        confidences = softmax(logits).max(1).astype(np.float32)  # NaN for logits that are not finite
        self._parts.append((labels.astype(np.int32), predictions, confidences))
        here = self._sampled[(self._sampled >= self._seen) & (self._sampled < self._seen + len(labels))]
        self._samples += [(int(i), _thumbnail(images[i - self._seen])) for i in here]
        (wrong,) = np.nonzero(predictions != labels)
        for i in wrong[np.argsort(-confidences[wrong], kind="stable")][:MISTAKES]:
            if len(self._mistakes) < MISTAKES or confidences[i] > self._mistakes[-1][0]:
                self._mistakes.append((float(confidences[i]), self._seen + int(i), _thumbnail(images[i])))
                self._mistakes.sort(key=lambda mistake: (-mistake[0], mistake[1]))
                del self._mistakes[MISTAKES:]
        self._seen += len(labels)

    def finish(self, step: int, class_names: Sequence[str]) -> Predictions:
        """Return everything that was added."""
        images = [*self._samples, *(mistake[1:] for mistake in self._mistakes)]
        labels, predictions, confidences = map(np.concatenate, zip(*self._parts, strict=True))
        return Predictions(
            step=step,
            class_names=tuple(class_names),
            labels=labels,
            predictions=predictions,
            confidences=confidences,
            shown=np.array([index for index, _ in images], np.int32),
            images=np.stack([image for _, image in images]),
            samples=len(self._samples),
        )


def _thumbnail(image: Pixels) -> Pixels:
    """Return an image [H, W, C], made smaller if it is larger than a report shows."""
    if max(image.shape[:2]) <= THUMBNAIL:
        return image.copy()
    thumbnail = image_of(image)
    thumbnail.thumbnail((THUMBNAIL, THUMBNAIL))
    return pixels_of(thumbnail)
