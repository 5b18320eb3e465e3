"""PyTorch's weight files and safetensors files: each as a state dict {name: tensor}, and back.

A file of `torch.save` is a pickle, which can run any code when it is read. Here it is read with
`weights_only=True`, which builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

SAFETENSORS = ".safetensors"
TORCH = (".pth", ".pt", ".th")
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""The keys under which training scripts (timm's, PyTorch's tutorials, torchvision's) keep the state dict."""


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, on the CPU, dtypes as they are.

    Arguments:
        path: a safetensors file, or one of `torch.save` (`.pth`, `.pt`, `.th`): a state dict, or a dict that
            holds it under a key of `WRAPPERS`. The prefix `module.`, which DataParallel puts before every
            name, is taken off.

    Raises:
        ValueError: an unknown suffix; a file that is damaged, is no state dict, or holds objects that only
            code from the file could build. One line, without the path.
        OSError: the file cannot be opened.
    """
    _check_suffix(path.suffix)
    content = path.read_bytes()
    if path.suffix == SAFETENSORS:
        try:
            return safetensors.torch.load(content)
        except Exception as error:  # the library's own type, and KeyError for a dtype that it does not know
            raise ValueError(f"no safetensors file, or a damaged one ({_one_line(error)})") from None
    return _state_dict(_load(content))


def serialize(state: Mapping[str, Tensor], suffix: str) -> bytes:
    """The file that holds a state dict, of the kind that `suffix` tells; the inverse of `read`.

    Tensors that share memory are written each on its own. Raises ValueError for an unknown suffix.
    """
    _check_suffix(suffix)
    # A clone is contiguous and its storage is no larger than itself: torch.save writes whole storages
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    if suffix == SAFETENSORS:
        # Some readers ask for the entry `format`
        return bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def _check_suffix(suffix: str) -> None:
    if suffix not in (SAFETENSORS, *TORCH):
        raise ValueError(f"suffix must be one of {', '.join((SAFETENSORS, *TORCH))}, not {suffix!r}")


def _load(content: bytes) -> Any:
    """What `torch.save` saved, if it can be had without running code from the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns of is an error here, told in one line
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # a damaged file ends in almost any type: KeyError, EOFError, RuntimeError, ...
        text = str(error)
    if "TorchScript archive" in text:
        raise ValueError("a TorchScript archive, which holds code; save the model's state_dict() instead")
    if wanted := re.search(r"GLOBAL ([\w.]+)", text):
        raise ValueError(
            f"it holds a {wanted[1]}, which only code from the file could build, and none is run; "
            "save the model's state_dict() alone"
        )
    raise ValueError(f"no file of torch.save that holds only tensors, or a damaged one ({_shorten(text)})")


def _state_dict(saved: Any) -> dict[str, Tensor]:
    """The state dict in what was saved, without wrapper and prefix."""
    for key in WRAPPERS:
        if isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
            saved = saved[key]
            break
    if not isinstance(saved, Mapping) or not saved:
        raise ValueError(f"no state dict: it holds {type(saved).__name__}, not names and tensors")
    others = [f"{name} ({type(v).__name__})" for name, v in saved.items() if not isinstance(v, Tensor)]
    if others:
        raise ValueError(f"no state dict: these are no tensors: {', '.join(others)}")
    prefix = "module." if all(str(name).startswith("module.") for name in saved) else ""
    return {str(name).removeprefix(prefix): tensor.detach() for name, tensor in saved.items()}


def _one_line(error: Exception) -> str:
    return _shorten(str(error)) or type(error).__name__


def _shorten(text: str) -> str:
    """The first sentence, in one line: PyTorch's go on for paragraphs."""
    return " ".join(text.split()).partition(". ")[0][:200]
