"""Data sets that TFDS has prepared in its array_record format, read without TensorFlow."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from experiment.data.augmentation import fill_color, to_gray
from experiment.data.builtin import cached, fit_to, gray_already, identity, no_boxes
from experiment.data.images import ImageError, decode_image
from experiment.data.prepared import check_prepared, plain_name, prepare_again, prepare_command
from experiment.data.types import IMAGENET, Batch, Dataset, Fit, Identity, Labels, Size, Statistics
from experiment.errors import UserError, one_line

if TYPE_CHECKING:
    from PIL.Image import Image

GRAY: Statistics = ((0.5,), (0.5,))
STATISTICS: dict[str, Statistics] = {
    # As published with each data set or by the frameworks' examples, of the images before padding. Other
    # color sets take ImageNet's, as networks trained there expect it; other gray ones GRAY.
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TEST_SPLITS = {"imagenet2012": ("validation",)}
"""The splits to test on, the first that has labeled examples; of a data set not named here `test`, then
`validation`."""

HIDDEN = -1
"""The label that TFDS stores where the label is not published."""

RECORD_NAMES = ("file_name", "filename", "image/filename", "image/file_name", "id", "image_id", "image/id")
"""Features by which data sets name their records."""

VARIABLE_SIZES = {"cars196": (96, 96)}
"""The default size of a data set whose images differ in size; not named here: 224x224."""


class TfdsSource:
    """One split of a prepared data set.

    Records are read a batch at a time: array_record wakes a pool of threads for each call, which costs more
    than decoding a small image. TFDS' decoder is not used: its pixels depend on whether OpenCV is
    installed, and it ignores orientation and leaves CMYK and palette images as they are.
    """

    def __init__(
        self,
        builder: Any,
        split: str,
        data_dir: str | None,
        *,
        name: str,
        keys: tuple[str, str],
        channels: int,
        fit: Fit,
        crop_to_bbox: bool = False,
    ) -> None:
        import tensorflow_datasets as tfds

        self._channels, self._fit, self._crop_to_bbox = channels, fit, crop_to_bbox
        features = builder.info.features
        self._image, self._label = keys
        self._classes: int = features[self._label].num_classes
        self._name = next((name for name in RECORD_NAMES if name in features), None)
        self.split, self._set = split, name
        self._where = f"of {name} ({split}) in {builder.data_dir}"
        self._remedy = prepare_again(name, data_dir)
        for path in map(Path, builder.info.splits[split].filepaths):
            if not path.is_file():
                raise UserError(f"--data-dir: {path.name} is missing, {self._where}{self._remedy}")
        self._records = builder.as_data_source(split, decoders={self._image: tfds.decode.SkipDecoding()})

    def __len__(self) -> int:
        return len(self._records)

    def hides_labels(self) -> bool:
        """Return whether the first, the middle or the last example has no label (-1)."""
        places = sorted({0, len(self) // 2, len(self) - 1})
        return any(record[self._label] == HIDDEN for record in self._read(places))

    def read(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Return the examples at `indices`.

        Raises:
            UserError: a record that cannot be read or decoded, or a label that is not one of the classes.
                It names the record.
        """
        images, labels = self.images(indices)
        return {"image": np.stack([self._fit(image) for image in images]), "label": labels}

    def labels(self, indices: npt.NDArray[np.int64]) -> Labels:
        """Return the labels at `indices`; raises as `read` does for records."""
        places = indices.tolist()
        parts = [places[start : start + 1024] for start in range(0, len(places), 1024)]
        found = [self._label_of(*pair) for part in parts for pair in zip(part, self._read(part), strict=True)]
        return np.array(found, np.int32)

    def images(self, indices: npt.NDArray[np.int64]) -> tuple[list["Image"], Labels]:
        """Return the images at `indices`, cut to their boxes if that was asked for; raises as `read`."""
        places = indices.tolist()
        records = self._read(places)
        images = [self._decode(place, record) for place, record in zip(places, records, strict=True)]
        return images, np.array([record[self._label] for record in records], np.int32)

    def _read(self, places: list[int]) -> list[dict[str, Any]]:
        """Return the records at `places`, their images not decoded."""
        try:
            records: list[dict[str, Any]] = self._records.__getitems__(places)
            return records
        except MemoryError:
            raise
        except Exception as error:  # array_record and protobuf have their own types for bad bytes
            if len(places) > 1:  # one by one, to name the record that is damaged
                return [self._read([place])[0] for place in places]
            raise UserError(
                f"{self._record(places[0])} cannot be read ({one_line(error)}){self._remedy}"
            ) from error

    def _decode(self, place: int, record: dict[str, Any]) -> "Image":
        """Return the image of a record, its label checked as well."""
        self._label_of(place, record)
        try:
            box = record["bbox"] if self._crop_to_bbox else None
            return decode_image(io.BytesIO(record[self._image]), self._channels, box)
        except ImageError as error:
            raise UserError(
                f"{self._record(place, record)}: {error}; use another data set, or prepare this one "
                f"in another directory if this copy may be at fault: `{prepare_command(self._set, 'DIR')}`"
            ) from error
        except ValueError as error:
            raise UserError(f"{self._record(place, record)}: {error}; leave --crop-to-bbox out") from error

    def _label_of(self, place: int, record: dict[str, Any]) -> int:
        """Return the label of a record. Raises UserError if it is none of the classes."""
        label = int(record[self._label])
        if not 0 <= label < self._classes:
            fault = (
                "has no label (-1): labels of this split are hidden or unknown"
                if label == HIDDEN
                else f"has the label {label}, which is none of its {self._classes} classes"
            )
            raise UserError(f"{self._record(place, record)} {fault}; use another data set")
        return label

    def _record(self, place: int, record: dict[str, Any] | None = None) -> str:
        """Name a record by its place in the split, from 0, and by what the data set calls it."""
        named = ""
        if record is not None and self._name is not None:
            value = record[self._name]
            value = value.decode(errors="replace") if isinstance(value, bytes) else value
            named = f", {self._name} {one_line(value)},"
        return f"--data-dir: record {place}{named} {self._where}"


def tfds_dataset(
    name: str,
    data_dir: str | None,
    image_size: Size | None,
    resize: int | None = None,
    *,
    grayscale: bool = False,
    crop_to_bbox: bool = False,
    holds_out: bool = False,
) -> Dataset:
    """Open a prepared data set.

    Args:
        name: a TFDS name, with configuration and version where they are needed: `NAME/CONFIG:VERSION`.
        data_dir: the TFDS data directory; None is TFDS' own default.
        image_size: height and width, or None for the default: the images' own size if they all have one (at
            least 32), else `VARIABLE_SIZES`.
        resize: the shorter side before the image is cropped to that size; None: what covers it.
        grayscale: images of one channel from a set of color.
        crop_to_bbox: only the part of an image inside its bounding box, which is the feature `bbox`. What
            does not fill the size is then filled with the mean color, unless `resize` is given.
        holds_out: True if a test part will be taken from `train`, so that none is needed here.

    Raises:
        UserError: an unknown name, data that is missing or damaged, features or splits that do not fit.
    """
    builder = check_prepared(name, data_dir)
    plain = plain_name(name)
    keys, (height, width, channels), class_names = _features(name, builder, crop_to_bbox=crop_to_bbox)
    statistics = STATISTICS.get(plain, GRAY if channels == 1 else IMAGENET)
    if grayscale:
        if channels == 1:
            raise UserError(gray_already(name))
        channels, statistics = 1, to_gray(statistics)
    own_size = (max(height, 32), max(width, 32)) if height and width else None
    size = image_size or own_size or VARIABLE_SIZES.get(plain, (224, 224))
    shape = (*size, channels)
    fill = fill_color(statistics[0]) if crop_to_bbox else None
    fit = fit_to(size, resize, fill)
    options: dict[str, Any] = {"channels": channels, "fit": fit, "crop_to_bbox": crop_to_bbox}
    options |= {"name": name, "keys": keys}
    train = _labeled(builder, ("train",), data_dir, options)
    test = None
    if not (holds_out or _has_only_train(builder)):
        test = _labeled(builder, TEST_SPLITS.get(plain, ("test", "validation")), data_dir, options)
    sources = cached(train, shape), None if test is None else cached(test, shape)
    for source in filter(None, sources):
        source.read(np.array([0]))  # what is not decodable at all is noticed before a run begins
    return Dataset(
        *sources,
        class_names,
        shape,
        *statistics,
        _identity(builder, test.split if test is not None else None),
    )


def _has_only_train(builder: Any) -> bool:
    """True if only the training split has examples."""
    return [split for split, info in builder.info.splits.items() if info.num_examples] == ["train"]


def _labeled(
    builder: Any, candidates: Sequence[str], data_dir: str | None, options: dict[str, Any]
) -> TfdsSource:
    """Return the first of the splits `candidates` that has examples with labels.

    Raises UserError, which names the splits that there are, if none has.
    """
    splits = builder.info.splits
    hidden = []
    for split in candidates:
        if split in splits and splits[split].num_examples:
            source = TfdsSource(builder, split, data_dir, **options)
            if not source.hides_labels():
                return source
            hidden.append(split)
    there = ", ".join(f"{split} ({info.num_examples:,} examples)" for split, info in splits.items())
    if hidden:
        fault = f"the labels of its {' and '.join(hidden)} split are hidden (-1)"
    else:
        fault = f"it has no {' or '.join(candidates)} split with examples"
    remedy = "" if "train" in candidates else ", or hold a part of train out with --test-fraction 0.1"
    raise UserError(
        f"--dataset {options['name']}: {fault}; a split to train on and one to test on are needed, and it "
        f"has {there or 'none'}; use another data set{remedy}"
    )


def _identity(builder: Any, test_split: str | None) -> Identity:
    """Return which version and configuration it is, with a hash of what describes the stored examples.

    Texts such as the citation, and how the files are stored, are not part of it.
    """
    config = builder.builder_config.name if builder.builder_config else None
    version = str(builder.version)
    described = {
        "name": builder.name,
        "config": config,
        "version": version,
        "features": json.loads((Path(builder.data_dir) / "features.json").read_text(encoding="utf-8")),
        "splits": {
            split: {"shard_lengths": list(info.shard_lengths), "num_bytes": info.num_bytes}
            for split, info in builder.info.splits.items()
        },
    }
    text = json.dumps(described, sort_keys=True)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return identity(sha256, version=version, config=config, test_split=test_split)


def _features(
    name: str, builder: Any, *, crop_to_bbox: bool
) -> tuple[tuple[str, str], tuple[int | None, int | None, int], tuple[str, ...]]:
    """Return the names of the features that are image and label, the images' height and width (None: they
    differ) and channels, and the classes' names.

    The features are `image` and `label`, or under other names the only ones of their types. With
    `crop_to_bbox`, every image must have one bounding box, `bbox`.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    named = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {"features": features}
    image_key = _only(named, tfds.features.Image, "image")
    label_key = _only(named, tfds.features.ClassLabel, "label")
    if image_key is None or label_key is None:
        raise UserError(
            f"--dataset {name}: an image and a class are needed, by the names `image` and `label` or the "
            "only ones of their types (Image, ClassLabel), and it has "
            f"{', '.join(f'{key} ({type(value).__name__})' for key, value in named.items())}; use another"
        )
    image, label = named[image_key], named[label_key]
    if not label.num_classes:
        raise UserError(f"--dataset {name}: its feature `{label_key}` has no number of classes; use another")
    height, width, channels = image.shape
    if channels not in (1, 3) or image.np_dtype != np.uint8:
        raise UserError(
            f"--dataset {name}: images of 1 or 3 channels of uint8 are needed, and it has {channels} of "
            f"{np.dtype(image.np_dtype).name}; use another"
        )
    if crop_to_bbox and not isinstance(named.get("bbox"), tfds.features.BBoxFeature):
        raise UserError(no_boxes(name))
    return (image_key, label_key), (height, width, channels), tuple(label.names)


def _only(features: Mapping[str, Any], kind: type, usual: str) -> str | None:
    """Return the name of the feature of a type: the usual one, or the only one; None if neither is there."""
    names = [name for name, feature in features.items() if isinstance(feature, kind)]
    if usual in names:
        return usual
    return names[0] if len(names) == 1 else None
