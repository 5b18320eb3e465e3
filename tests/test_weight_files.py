"""Weight files of torchvision and timm in both engines, and the engines' files in PyTorch, exactly.

Both libraries' ResNets have the state dict of `torch_oracle`, whose names `test_torch_oracle.py` writes down
from the publications, with PyTorch's count of batches beside every batch norm. What an engine says of names
that are missing, unexpected or of another shape: `test_resnet.py` and `test_numpy_resnet.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import save_file

import jax_resnet
import numpy_ref
import torch_oracle
from experiment.__main__ import main
from experiment.files import weights
from tests.helpers.comparing import assert_all_close, random_state

# Full depth, every name there is; narrow, so that it takes no time.
NETWORKS = {"resnet101": {"width": 4}, "resnet18": {"width": 4}, "resnet20": {"width": 4}}
CLASSES = 10


def jax_model(name: str) -> Any:
    return jax_resnet.MODELS[name](CLASSES, 3, **NETWORKS[name], rngs=nnx.Rngs(0))


def numpy_model(name: str) -> Any:
    return numpy_ref.MODELS[name](CLASSES, 3, **NETWORKS[name], rng=np.random.default_rng(0))


ENGINES = {"jax": (jax_resnet, jax_model), "numpy": (numpy_ref, numpy_model)}


def torch_model(name: str) -> torch.nn.Module:
    """As from torchvision or timm: with counts of batches, int64."""
    model = torch_oracle.MODELS[name](CLASSES, 3, **NETWORKS[name])
    shapes = {key: array.shape for key, array in torch_oracle.state_dict(model).items()}
    torch_oracle.load_state_dict(model, random_state(shapes))
    for key, tensor in model.state_dict().items():
        if key.endswith("num_batches_tracked"):
            tensor.fill_(1234)
    return model


def save_safetensors(model: torch.nn.Module, path: Path) -> None:
    """As the hubs' files are made."""
    save_file(model.state_dict(), path, {"format": "pt"})


def converted(save: Callable[[torch.nn.Module, Path], None]) -> Callable[[torch.nn.Module, Path], None]:
    """A file of torch.save, brought to a safetensors file by the command."""

    def run(model: torch.nn.Module, path: Path) -> None:
        save(model, path.with_suffix(".pth"))
        assert main(["convert", str(path.with_suffix(".pth")), str(path)]) == 0

    return run


def compiled(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The names that torch.compile gives under DataParallel."""
    return {f"module._orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}


def save_averaged(model: torch.nn.Module, path: Path) -> None:
    """An average of weights in training, with its count, in a safetensors file."""
    state = {f"module.{name}": tensor for name, tensor in compiled(model).items()}
    save_file({"n_averaged": torch.tensor(3), **state}, path)


FILES: dict[str, Callable[[torch.nn.Module, Path], None]] = {
    "safetensors": save_safetensors,
    "safetensors, an average of a compiled network": save_averaged,
    "checkpoint of timm, compiled": converted(
        lambda model, path: torch.save(
            {"state_dict": compiled(model), "args": argparse.Namespace(lr=0.1), "metric": np.float64(1)}, path
        )
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_of_pytorchs_loads_as_it_is(name: str, kind: str, engine: str, tmp_path: Path) -> None:
    reference = torch_model(name)
    FILES[kind](reference, tmp_path / "a.safetensors")
    found, rest = weights.load_network(tmp_path / "a.safetensors")
    assert rest == (["n_averaged"] if "average" in kind else [])
    assert found["bn1.num_batches_tracked"].dtype == np.int64
    assert found["bn1.num_batches_tracked"] == 1234
    package, build = ENGINES[engine]
    model = build(name)
    package.load_state_dict(model, found)
    assert_all_close(name, package.state_dict(model), torch_oracle.state_dict(reference), 0)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_engines_file_loads_in_pytorch(name: str, suffix: str, engine: str, tmp_path: Path) -> None:
    """By PyTorch's own strict loading, as torchvision and timm do it, which wants every name and no other."""
    package, build = ENGINES[engine]
    model = build(name)
    wanted = random_state({key: array.shape for key, array in package.state_dict(model).items()})
    package.load_state_dict(model, wanted)
    weights.save(tmp_path / "a.safetensors", package.state_dict(model), {})
    if suffix == ".pth":
        assert main(["convert", str(tmp_path / "a.safetensors"), str(tmp_path / "a.pth")]) == 0
        state = torch.load(tmp_path / "a.pth", weights_only=True)
    else:
        state = {key: torch.tensor(array) for key, array in weights.load(tmp_path / "a.safetensors").items()}
    reference = torch_model(name)
    reference.load_state_dict(state)
    expected = {key: array.astype(np.float32) for key, array in wanted.items()}
    assert_all_close(name, torch_oracle.state_dict(reference), expected, 0)
