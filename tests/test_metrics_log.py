"""metrics.jsonl: what is written, and how a resumed run finds its place in it."""

from __future__ import annotations

import hashlib
import json

import pytest

from experiment.errors import UserError
from experiment.files.metrics_log import MetricsLog

LINES = [{"split": "train", "step": step, "loss": 2.5 / step, "accuracy": step / 7} for step in range(1, 9)]


def write(path, lines, **position):
    """Append lines to a log opened at `position`; return the position after them."""
    log = MetricsLog(path, **position)
    for line in lines:
        log.append(line)
    position = log.sync()
    log.close()
    return position


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_one_json_object_a_line(path):
    write(path, LINES)
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES
    assert path.read_bytes().endswith(b"}\n")


def test_sync_tells_the_length_and_hash_of_the_file(path):
    log = MetricsLog(path)
    for line in LINES:
        log.append(line)
        position = log.sync()
        content = path.read_bytes()  # while the log is open: sync has brought it to the disk
        assert position == {"length": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    log.close()


def test_flush_shows_the_lines_to_readers(path):
    log = MetricsLog(path)
    log.append(LINES[0])
    log.flush()
    assert json.loads(path.read_text()) == LINES[0]
    log.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_becomes_null(path, value):
    write(path, [{"step": 1, "loss": value, "lr": 0.1, "split": "train", "best": None}])
    text = path.read_text()
    assert json.loads(text) == {"step": 1, "loss": None, "lr": 0.1, "split": "train", "best": None}
    assert "NaN" not in text
    assert "Infinity" not in text


def test_floats_read_back_to_the_last_bit(path):
    values = {"a": 0.1 + 0.2, "b": 1 / 3, "c": 5e-324, "d": 1.7976931348623157e308, "e": -0.0}
    write(path, [values])
    read = json.loads(path.read_text())
    assert {k: v.hex() for k, v in read.items()} == {k: v.hex() for k, v in values.items()}


@pytest.mark.parametrize("cut", range(len(LINES) + 1))
def test_a_resumed_history_has_the_same_bytes(path, tmp_path, cut):
    """Whatever was written after the checkpoint is cut off and written again."""
    write(path, LINES)
    other = tmp_path / "other.jsonl"
    position = write(other, LINES[:cut])
    write(other, [{"step": 99, "loss": 1.0}], **position)  # lines of the session that was killed
    end = write(other, LINES[cut:], **position)
    assert other.read_bytes() == path.read_bytes()
    assert end == write(tmp_path / "again.jsonl", LINES)


def test_a_torn_last_line_is_repaired(path, tmp_path):
    position = write(path, LINES[:3])
    whole = path.read_bytes()
    for torn in (b"{", b'{"split": "tr', b'{"split": "train"}', b"\0" * 40):  # zeros: a journal replayed
        path.write_bytes(whole + torn)
        write(path, LINES[3:], **position)
        assert [json.loads(line) for line in path.read_text().splitlines()] == LINES


def test_no_checkpoint_means_from_the_beginning(path):
    write(path, LINES)
    write(path, LINES[:2])
    assert [json.loads(line) for line in path.read_text().splitlines()] == LINES[:2]


@pytest.mark.parametrize("damage", ["changed", "shortened", "missing"])
def test_a_changed_prefix_is_refused_in_one_line(path, damage):
    position = write(path, LINES)
    content = bytearray(path.read_bytes())
    if damage == "changed":
        content[17] ^= 1
    elif damage == "shortened":
        del content[-1]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        MetricsLog(path, **position)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert str(path) in message
    assert "restore the file" in message
    if damage == "missing":
        assert not path.exists()
    else:
        assert path.read_bytes() == content  # untouched


def test_a_flipped_bit_of_the_prefix_is_noticed_wherever_it_is(path):
    position = write(path, LINES[:1])
    content = path.read_bytes()
    for index in range(len(content)):
        damaged = bytearray(content)
        damaged[index] ^= 1 << index % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError):
            MetricsLog(path, **position)
