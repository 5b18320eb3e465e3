"""Weights by name, hf://OWNER/NAME, from a server on the loopback address; what it may do wrong."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.numpy
import torch

import torch_oracle
from experiment import __main__
from experiment.commands import train
from experiment.errors import UserError
from experiment.files import hub
from experiment.options.resolving import resolve
from tests.helpers.hub_server import COMMIT, Repository, serve

NAME = "hf://timm/thin"
TOKEN = "hf_aSecretThatNobodyMaySee"
RUN = ["--framework", "numpy", "--model", "resnet8", "--train-subset", "0.02", "--batch-size", "16"]
RUN += ["--steps", "1", "--no-report", "--no-test", "--init-from"]


def network(classes: int = 7) -> bytes:
    """A ResNet-8 as timm stores one: with the counts of batches."""
    state = torch_oracle.state_dict(torch_oracle.resnet8(classes, 1))
    counts = {
        name.replace("running_mean", "num_batches_tracked"): np.array(9)
        for name in state
        if name.endswith("running_mean")
    }
    return bytes(safetensors.numpy.save({**state, **counts}))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, a token, and no waiting between attempts. The library reads these at its import."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # less than half the file
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "cache"


def point_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set HF_ENDPOINT, as the library keeps it after its import."""
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """The repository timm/thin, and timm/bare without model.safetensors."""
    held = Repository(network())
    with serve({"timm/thin": held, "timm/bare": Repository(None)}) as address:
        point_at(address, monkeypatch)
        yield held


def files(cache: Path) -> list[str]:
    """Contents and links in the cache, without locks and notes."""
    return sorted(
        path.relative_to(cache).as_posix()
        for path in cache.rglob("*")
        if not path.is_dir() and {"blobs", "snapshots"} & set(path.parts)
    )


def refused(name: str = NAME) -> str:
    with pytest.raises(UserError) as caught:
        hub.fetch(name)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_a_run_begins_from_a_name(
    repository: Repository,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once from the server, then offline from the cache; the commit and the hash stand in config.json."""
    assert train.main([*RUN, NAME, "--run-dir", str(tmp_path / "online")]) == 0
    assert repository.tokens[0] == f"Bearer {TOKEN}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(repository.requests)
    assert train.main([*RUN, f"{NAME}@main", "--run-dir", str(tmp_path / "offline")]) == 0
    assert len(repository.requests) == asked
    out, err = capsys.readouterr()
    assert f"begun from {NAME}: " in out
    assert "the head is new: 10 classes, where the file has 7" in out
    assert TOKEN not in out + err
    records = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("online", "offline")]
    assert repository.content is not None
    digest = hashlib.sha256(repository.content).hexdigest()
    for record in records:
        assert record["resolved"]["init_from_sha256"] == digest
        assert record["resolved"]["init_from_commit"] == COMMIT
        assert TOKEN not in json.dumps(record)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("online", "offline")]
    assert weights[0] == weights[1]
    point_at("http://127.0.0.1:9", monkeypatch)
    resumed = ["--run-dir", str(tmp_path / "online"), "--resume", "--steps", "2", "--schedule-steps", "1"]
    assert train.main(resumed) == 0  # a resumed run needs neither the server nor the file
    record = json.loads((tmp_path / "online" / "config.json").read_text())
    assert record["resolved"]["init_from_commit"] == COMMIT


def test_a_connection_that_is_cut_goes_on_where_it_ended(repository: Repository, cache: Path) -> None:
    repository.cut = 2
    file = hub.fetch(NAME)
    assert file.path.read_bytes() == repository.content
    assert [request.partition(" ")[2] == "-" for request in repository.requests] == [True, True, False, False]
    assert len(files(cache)) == 2


def test_a_download_that_fails_leaves_nothing_and_can_be_repeated(
    repository: Repository, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little is sent, as by a proxy that ends the file early: not even the library's attempts help."""
    assert repository.content is not None
    repository.sent = repository.content[:-100]
    assert refused().startswith(f"{NAME}: the download failed (OSError: Consistency check failed: ")
    assert files(cache) == []
    repository.sent = None
    repository.cut = 100
    assert "the same command tries again" in refused()
    assert files(cache) == []
    repository.cut = 0
    assert hub.fetch(NAME).path.read_bytes() == repository.content


@pytest.mark.parametrize("where", ["sent", "in the cache"])
def test_a_wrong_hash_is_refused(repository: Repository, cache: Path, where: str) -> None:
    assert repository.content is not None
    wrong = bytearray(repository.content)
    wrong[-1] ^= 1
    if where == "sent":
        repository.sent = bytes(wrong)
    else:
        path = hub.fetch(NAME).path.resolve()
        path.chmod(0o644)
        path.write_bytes(wrong)
    assert refused().startswith(f"{NAME}: the file has another hash than the server announced, ")
    assert files(cache) == []
    repository.sent = None
    assert hub.fetch(NAME).path.read_bytes() == repository.content


def test_git_names_small_files_by_sha1(tmp_path: Path) -> None:
    content = b"hello\n"  # git hash-object
    path = tmp_path / "ce013625030ba8dba906f756967f9e9ca394464a"
    path.write_bytes(content)
    hub._check(NAME, path, "")
    path.write_bytes(b"Hello\n")
    with pytest.raises(UserError, match="another hash"):
        hub._check(NAME, path, "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf://timm/absent", "the server has no such repository, or it is private; check the name, "),
        ("hf://timm/thin@v9", "the repository has no revision v9; name another after @"),
        ("hf://timm/bare", "the repository has no model.safetensors, and no other file is read; "),
        ("hf://thin", "is no name on the Hub; write hf://OWNER/NAME, or hf://OWNER/NAME@REVISION"),
        ("hf://timm/thin/x", "is no name on the Hub; "),
    ],
)
def test_what_is_not_there_is_one_line(
    repository: Repository, name: str, message: str, tmp_path: Path
) -> None:
    assert refused(name).startswith(f"{name}: {message}")
    given = [*RUN, name, "--run-dir", str(tmp_path / "run")]
    assert train.main(given) == 2
    assert not (tmp_path / "run").exists()


def test_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    point_at("http://127.0.0.1:9", monkeypatch)
    assert refused() == (
        f"{NAME}: the server cannot be reached, and the file is not in the cache; try again with a connection"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert refused() == f"{NAME}: HF_HUB_OFFLINE is set, and the file is not in the cache; unset it once"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "hugging" in name else find(name))
    assert refused().startswith(
        f"{NAME}: needs huggingface_hub, which the extra `hub` brings: run `pip install "
    )


def test_the_revision_is_pinned(repository: Repository) -> None:
    """The commit that a run began with is taken again, whatever the branch now is."""
    assert hub.fetch(f"{NAME}@v1").commit == COMMIT
    assert hub.fetch(NAME, COMMIT).commit == COMMIT
    assert resolve({"init_from": f"{NAME}@v1"}).init_from == f"{NAME}@v1"
    with pytest.raises(UserError, match="is a URL"):
        resolve({"init_from": "https://huggingface.co/timm/thin"})


def test_convert_and_parity_take_a_name(
    repository: Repository, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert __main__.main(["convert", NAME, str(tmp_path / "thin.pth")]) == 0
    assert repository.content is not None
    expected = safetensors.numpy.load(repository.content)
    found = torch.load(tmp_path / "thin.pth", weights_only=True)
    assert found.keys() == expected.keys()
    assert all((found[name].numpy() == array).all() for name, array in expected.items())
    assert __main__.main(["parity", NAME]) == 0
    assert "all agree" in capsys.readouterr().out
