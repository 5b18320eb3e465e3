"""Data sets that TFDS has prepared in its array_record format, read without TensorFlow.

`python -m experiment prepare NAME --data-dir DIR` makes them; nothing here writes to the disk. Every message
about missing or damaged data names that command.
"""

import difflib
import io
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from experiment.errors import UserError
from experiment.paths import local_path
from experiment.sources import (
    Batch,
    Dataset,
    Fit,
    Labels,
    Source,
    Statistics,
    cached,
    fit_to,
    grey_already,
    no_boxes,
)
from experiment.transforms import Size, crop_to_box, fill_color, to_grey

if TYPE_CHECKING:
    from PIL.Image import Image

GREY: Statistics = ((0.5,), (0.5,))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, Statistics] = {
    # As published with each data set or by the frameworks' examples, of the pictures before padding. Other
    # colour sets take ImageNet's, as networks trained there expect it; other grey ones GREY.
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TEST_SPLITS = {"imagenet2012": "validation"}
"""Where `test` has no public labels. Elsewhere it is `test`, or `validation` where there is no `test`."""

VARIABLE_SIZES = {"cars196": (96, 96)}
"""The default size of a data set whose pictures differ in size; not named here: 224x224."""


def prepare_command(name: str, data_dir: str | None) -> str:
    """Return the command that downloads and prepares a data set."""
    directory = "" if data_dir is None else f" --data-dir {shlex.quote(data_dir)}"
    return f"python -m experiment prepare {name}{directory}"


def one_line(error: BaseException) -> str:
    """Return the message of an error of another library, cut to a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def check_name(name: str) -> None:
    """Raise UserError unless `name` is a plain TFDS name: no path, configuration, version or argument."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError(
            f"--dataset {name!r} is not a plain TFDS name (lower-case letters, digits and _; no path, "
            "configuration or version): use one like mnist, or digits, or synthetic"
        )


def check_known(name: str) -> None:
    """Raise UserError unless TFDS knows how to prepare a data set of that name."""
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name not in known:
        close = difflib.get_close_matches(name, ["digits", "synthetic", *known])
        hint = (
            f"did you mean {' or '.join(close)}?" if close else "use digits, synthetic, mnist, cifar10, ..."
        )
        raise UserError(f"--dataset {name}: TFDS knows no data set of that name; {hint}")


def find_prepared(name: str, data_dir: str | None) -> Any | None:
    """Return the TFDS builder of a data set that is prepared in `data_dir`, or None.

    Args:
        name: a name that `check_name` lets through.
        data_dir: the TFDS data directory; None is TFDS' own default.

    Raises:
        UserError: its description is damaged, or its files are of a format that allows no random access.
    """
    import tensorflow_datasets as tfds

    directory = data_root(data_dir)
    try:
        # From files only: the builder that TFDS has code for may want TensorFlow, or another version.
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=directory)
        formats = {each.value for each in builder.info.available_file_formats()}
    except tfds.core.registered.DatasetNotFoundError:
        return None
    except Exception as error:  # whatever the readers of damaged JSON raise
        raise UserError(
            f"--data-dir: the description of {name} in {directory / name} is damaged ({one_line(error)}); "
            f"delete that folder and run `{prepare_command(name, data_dir)}`"
        ) from error
    if "array_record" not in formats:
        raise UserError(
            f"--data-dir: {name} in {builder.data_dir} is in the format {', '.join(sorted(formats))}, not "
            f"array_record; prepare it in another directory: `{prepare_command(name, 'DIR')}`"
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def data_root(data_dir: str | None) -> Path:
    """Return the TFDS data directory that `--data-dir` names: None is TFDS' own default."""
    import tensorflow_datasets as tfds

    directory = tfds.core.constants.DATA_DIR if data_dir is None else data_dir
    return Path(local_path("--data-dir", directory))


class TfdsSource:
    """One split of a prepared data set.

    Records are read a batch at a time: array_record wakes a pool of threads for each call, which costs more
    than to read and decode a small picture. Pillow decodes, not TFDS, whose pixels depend on whether OpenCV
    is installed, and which leaves CMYK and palette pictures as they are.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        data_dir: str | None,
        *,
        channels: int,
        fit: Fit,
        crop_to_bbox: bool = False,
    ) -> None:
        import tensorflow_datasets as tfds

        self._mode, self._fit, self._crop_to_bbox = "L" if channels == 1 else "RGB", fit, crop_to_bbox
        self._classes: int = builder.info.features["label"].num_classes
        self._complaint = f"--data-dir: cannot read {builder.name} ({split}) in {builder.data_dir}: "
        self._remedy = f"; delete that folder and run `{prepare_command(builder.name, data_dir)}`"
        for path in map(Path, builder.info.splits[split].filepaths):
            if not path.is_file():
                raise UserError(f"{self._complaint}{path.name} is missing{self._remedy}")
        self._records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`.

        Raises:
            UserError: bytes that do not decode, or a label that is not one of the classes.
        """
        pictures, labels = self.pictures(indices)
        return {"image": np.stack([self._fit(picture) for picture in pictures]), "label": labels}

    def pictures(self, indices: npt.NDArray[np.int64]) -> tuple[list["Image"], Labels]:
        """Return the pictures at `indices`, cut to their boxes if that was asked for; raises as `read`."""
        try:
            return self._decoded(indices.tolist())
        except MemoryError:
            raise
        except Exception as error:  # array_record, protobuf and Pillow each have their own for bad bytes
            record, cause = self._first_unreadable(indices.tolist(), error)
            raise UserError(f"{self._complaint}{record}{one_line(cause)}{self._remedy}") from error

    def _decoded(self, indices: list[int]) -> tuple[list["Image"], Labels]:
        records = self._records.__getitems__(indices)
        pictures = [self._decode(record) for record in records]
        labels = np.array([record["label"] for record in records], np.int32)
        if labels.min() < 0 or labels.max() >= self._classes:
            raise ValueError(f"labels outside of 0..{self._classes - 1}")
        return pictures, labels

    def _first_unreadable(self, indices: list[int], error: Exception) -> tuple[str, Exception]:
        """Name the first record that cannot be read by itself, and what is wrong with it."""
        for index in indices:
            try:
                self._decoded([index])
            except Exception as cause:
                return f"record {index} (from 0): ", cause
        return "", error

    def _decode(self, record: dict[str, Any]) -> "Image":
        from PIL import Image

        with Image.open(io.BytesIO(record["image"])) as picture:
            # Colour sets hold grey, CMYK and palette files too; ImageNet has the first two.
            converted = picture.convert(self._mode)
        return crop_to_box(converted, record["bbox"]) if self._crop_to_bbox else converted


def tfds_dataset(
    name: str,
    data_dir: str | None,
    image_size: Size | None,
    resize: int | None = None,
    *,
    grayscale: bool = False,
    crop_to_bbox: bool = False,
) -> Dataset:
    """Open a prepared data set.

    Args:
        name: a plain TFDS name.
        data_dir: the TFDS data directory; None is TFDS' own default.
        image_size: height and width, or None for the default: the pictures' own size if they all have one (at
            least 32), else `VARIABLE_SIZES`.
        resize: the shorter side before the picture is cropped to that size; None: what covers it.
        grayscale: pictures of one channel from a set of colour.
        crop_to_bbox: only the part of a picture inside its bounding box, which is the feature `bbox`. What
            does not fill the size is then filled with the mean colour, unless `resize` is given.

    Raises:
        UserError: an unknown name, data that is missing or damaged, features or splits that do not fit.
    """
    check_name(name)
    builder = find_prepared(name, data_dir)
    if builder is None:
        _refuse(name, data_dir)
    (height, width, channels), class_names = _features(name, builder)
    if crop_to_bbox and not _has_bbox(builder):
        raise UserError(no_boxes(name))
    statistics = STATISTICS.get(name, GREY if channels == 1 else IMAGENET)
    if grayscale:
        if channels == 1:
            raise UserError(grey_already(name))
        channels, statistics = 1, to_grey(statistics)
    own_size = (max(height, 32), max(width, 32)) if height and width else None
    size = image_size or own_size or VARIABLE_SIZES.get(name, (224, 224))
    shape = (*size, channels)
    fill = fill_color(statistics[0]) if crop_to_bbox else None
    fit = fit_to(size, resize, fill)
    splits = builder.info.splits
    sources: list[Source] = []
    for split in ("train", TEST_SPLITS.get(name, "test" if "test" in splits else "validation")):
        if split not in splits or not splits[split].num_examples:
            raise UserError(f"--dataset {name} has no examples in a split named {split}; use another")
        pictures = TfdsSource(builder, split, data_dir, channels=channels, fit=fit, crop_to_bbox=crop_to_bbox)
        source = cached(pictures, shape)
        source.read(np.array([0]))  # opens the file: what is cut or foreign is noticed before a run begins
        sources.append(source)
    return Dataset(sources[0], sources[1], class_names, shape, *statistics)


def _features(name: str, builder: Any) -> tuple[tuple[int | None, int | None, int], tuple[str, ...]]:
    """Return the pictures' height and width (None: they differ) and channels, and the classes' names."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    named = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    image, label = named.get("image"), named.get("label")
    if not (isinstance(image, tfds.features.Image) and isinstance(label, tfds.features.ClassLabel)):
        raise UserError(
            f"--dataset {name}: a picture `image` and a class `label` are needed, and it has "
            f"{', '.join(f'{key} ({type(value).__name__})' for key, value in named.items())}; use another"
        )
    height, width, channels = image.shape
    if channels not in (1, 3) or image.np_dtype != np.uint8:
        raise UserError(
            f"--dataset {name}: pictures of 1 or 3 channels of uint8 are needed, and it has {channels} of "
            f"{np.dtype(image.np_dtype).name}; use another"
        )
    return (height, width, channels), tuple(label.names)


def _has_bbox(builder: Any) -> bool:
    """Whether every picture has one bounding box, `bbox`."""
    import tensorflow_datasets as tfds

    return isinstance(dict(builder.info.features).get("bbox"), tfds.features.BBoxFeature)


def _refuse(name: str, data_dir: str | None) -> NoReturn:
    """Say why a data set is not there: TFDS does not know it, or it is not prepared."""
    check_known(name)
    root = data_root(data_dir)
    where = f"{root}" if root.is_dir() else f"{root} (which does not exist)"
    raise UserError(
        f"--dataset {name} is not prepared in --data-dir {where}: run `{prepare_command(name, data_dir)}`, "
        "or name the directory that has it"
    )
