"""Writes a small TFDS data directory, of given images, without TensorFlow."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Example = tuple[bytes, int] | Mapping[str, Any]
"""The bytes of an image's file and its label; or by name what the features have: bytes, an int, floats."""


def encoded(image: Any, form: str = "png") -> bytes:
    """The bytes of a PNG or JPEG file: of a Pillow image, or of a uint8 array [H, W] or [H, W, 3]."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def images(count: int, shape: tuple[int, ...], seed: int = 0) -> list[tuple[bytes, int]]:
    """Random images, the first two bytes of which are their number; labels 0, 1, 0, 1, ..."""
    images = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    for number, image in enumerate(images):
        image.reshape(-1)[:2] = divmod(number, 256)
    return [(encoded(image), number % 2) for number, image in enumerate(images)]


def write(
    root: Path,
    name: str,
    splits: Mapping[str, Sequence[Example]],
    *,
    shape: tuple[int | None, int | None, int] = (None, None, 3),
    features: Mapping[str, Any] | None = None,
    version: str = "1.0.0",
    config: str | None = None,
) -> Path:
    """Write the data set `name` into the TFDS data directory `root`; return its directory.

    Args:
        root: the TFDS data directory.
        name: the data set's name; TFDS need not know it.
        splits: for each split, its examples.
        shape: what the features say of the images; None for sizes that differ.
        features: instead of an image `image` and a class `label`.
        version: the data set's.
        config: the name of its configuration, if it has several.
    """
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    directory = root / name / (config or "") / version
    directory.mkdir(parents=True)
    if features is None:
        label = tfds.features.ClassLabel(names=["even", "odd"])
        features = {"image": tfds.features.Image(shape=shape), "label": label}
    tfds.features.FeaturesDict(dict(features)).save_config(directory)
    described = []
    for split, examples in splits.items():
        path = directory / f"{name}-{split}.array_record-00000-of-00001"
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for each in examples:
            example = tf_example_pb2.Example()
            named = each if isinstance(each, Mapping) else {"image": each[0], "label": each[1]}
            for field, value in named.items():
                feature = example.features.feature[field]
                if isinstance(value, bytes):
                    feature.bytes_list.value.append(value)
                elif isinstance(value, int):
                    feature.int64_list.value.append(value)
                else:
                    feature.float_list.value.extend(value)
            writer.write(example.SerializeToString())
        writer.close()
        described.append(
            {
                "name": split,
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "numBytes": str(path.stat().st_size),
                "shardLengths": [str(len(examples))],
            }
        )
    info: dict[str, Any] = {"name": name, "version": version, "fileFormat": "array_record"}
    info["splits"] = described
    if config is not None:
        info["configName"] = config
    (directory / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return directory
