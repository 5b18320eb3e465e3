"""PyTorch's weight files and safetensors files: read as a state dict {name: tensor}, and written.

A file of `torch.save` is a pickle, which can run any code when it is read. Here it is read with
`weights_only=True`, which builds tensors and plain containers. Of the other types, those of `BESIDE` become
objects without content, and every other one is refused.
"""

from __future__ import annotations

import io
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

KEYS = (
    *("state_dict", "model_state_dict", "model", "model_state", "net", "network", "module", "app"),
    *("weights", "params", "teacher", "student"),
    *("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema_model_state_dict"),
    *("ema_model", "ema", "ema_state", "params_ema"),
)
"""The keys under which training scripts keep a state dict, and below them the running averages.

Among them are those of timm (`state_dict`, `state_dict_ema`), torchvision (`model`, `model_ema`), Lightning
(`state_dict`), PyTorch's tutorials (`model_state_dict`), DeepSpeed (`module`) and pycls (`model_state`).
"""

FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
)
DTYPES = (
    *FLOATS,
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool, torch.complex64),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
)
"""The types of numbers that both kinds of file hold."""


class _Object:
    """Stand-in for an object beside the weights; it has none of its content."""

    def __new__(cls, *args: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dict:
    """Stand-in for a kind of dict. PyTorch's reader fills in few kinds, `OrderedDict` among them."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class _List:
    """Stand-in for a kind of list."""

    def __new__(cls, *args: Any) -> Any:
        return []


_OBJECTS = {
    "argparse": "Namespace",
    "builtins": "bool bytes dict float frozenset int list range slice str",
    "datetime": "date datetime time timedelta timezone",
    "numpy": "dtype ndarray",
    **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), "scalar _reconstruct"),
    "omegaconf.base": "ContainerMetadata Metadata",
    "omegaconf.dictconfig": "DictConfig",
    "omegaconf.listconfig": "ListConfig",
    "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode PathNode StringNode",
    **dict.fromkeys(("pathlib", "pathlib._local"), "PosixPath PurePosixPath PureWindowsPath WindowsPath"),
    "torch.torch_version": "TorchVersion",
    "types": "SimpleNamespace",
    "typing": "Any",
}
_DICTS = (
    "collections.defaultdict",
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "yacs.config.CfgNode",
)
BESIDE: dict[str, type] = {
    **{f"{module}.{name}": _Object for module, names in _OBJECTS.items() for name in names.split()},
    **dict.fromkeys(_DICTS, _Dict),
    "collections.deque": _List,
}
"""{the type of an object that training scripts save beside the weights: what is built in its place}.

None of these types is ever called, and none needs to be installed.
"""


def read(path: Path, key: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a file, on the CPU, names and dtypes as they are.

    Args:
        path: a safetensors file or one of `torch.save`, told apart by the first bytes: a state dict, or a
            dict that holds one under a key of `KEYS`; such dicts may be nested.
        key: which to take where there are several: a key of the file, `outer/inner` for a nested one, or
            a prefix of names, without its dot, which is then removed.

    Raises:
        ValueError: a file that is damaged, is no state dict or holds several; objects that only code from the
            file could build; a tensor without plain values. One line, without the path.
        OSError: the file cannot be opened.
    """
    content = path.read_bytes()
    saved: Any
    if is_safetensors(path):
        try:
            saved = safetensors.torch.load(content)
        except Exception as error:  # the library's own type, and KeyError for a dtype that it does not know
            text = _shorten(str(error)) or type(error).__name__
            raise ValueError(f"no safetensors file, or a damaged one ({text})") from None
    else:
        saved = _load(content)
    state = _state_dict(saved, key)
    for name, tensor in state.items():
        if fault := _fault(tensor):
            raise ValueError(f"{name} is {fault}")
    return {name: tensor.detach() for name, tensor in state.items()}


def is_safetensors(path: Path) -> bool:
    """True if a file begins as safetensors files do: 8 bytes of a length, then a JSON object."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def serialize(state: Mapping[str, Tensor], *, as_safetensors: bool) -> bytes:
    """Return the safetensors file, else the file of `torch.save`, that holds a state dict; inverts `read`.

    Tensors that share memory are written separately.
    """
    # A clone is contiguous and its storage is no larger than itself: torch.save writes whole storages
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
    }
    if as_safetensors:
        # Some readers ask for the entry `format`
        return bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor that `read` gave; types that NumPy lacks as float32, which is exact."""
    narrow = tensor.dtype in FLOATS[3:]
    return np.asarray((tensor.float() if narrow else tensor).resolve_neg().resolve_conj().numpy())


def _load(content: bytes) -> Any:
    """Return what `torch.save` saved, if no code from the file is needed for it."""
    beside: list[Any] = [(stand_in, name) for name, stand_in in BESIDE.items()]
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(beside):
            warnings.simplefilter("ignore")  # what it warns of is an error here, reported in one line
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files end in almost any type: KeyError, EOFError, RuntimeError, ...
        text = str(error)
    if "TorchScript archive" in text:
        raise ValueError("a TorchScript archive, which holds code; save the model's state_dict() instead")
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        raise ValueError(
            f"it holds a {refused[1]}, which only code from the file could build, and none is run; "
            "save the model's state_dict() alone"
        )
    if "torch.distributed.tensor" in text:
        raise ValueError("it holds parts of tensors on several devices; save the full state dict instead")
    raise ValueError(f"no safetensors file and none of torch.save, or a damaged one ({_shorten(text)})")


def _state_dict(saved: Any, key: str | None) -> dict[str, Tensor]:
    """Return the state dict in what was saved: the one that `key` names, or the only one."""
    candidates = dict(_nested(saved)) or {"": saved}
    if key is not None and key in candidates:
        state = candidates[key]
    elif key is not None and isinstance(saved, Mapping) and isinstance(saved.get(key), Mapping):
        state = saved[key]
    elif len(candidates) > 1:
        raise ValueError(f"it holds several state dicts: name one with --key, of {', '.join(candidates)}")
    else:
        (state,) = candidates.values()
        if key is not None and isinstance(state, Mapping):
            start = f"{key}."
            state = {str(n).removeprefix(start): v for n, v in state.items() if str(n).startswith(start)}
            if not state:
                raise ValueError(f"it has no key and no prefix {key}, which --key names; leave --key out")
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"no state dict: it holds {type(state).__name__}, not names and tensors")
    kinds = {name: type(value).__name__.lstrip("_") for name, value in state.items()}
    others = [f"{name} ({kinds[name]})" for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        inner = any(isinstance(value, Mapping) for value in state.values())
        remedy = "; where one of them is the state dict, name it with --key" if inner else ""
        raise ValueError(f"no state dict: these are no tensors: {', '.join(others[:4])}{more}{remedy}")
    return {str(name): tensor for name, tensor in state.items()}


def _nested(saved: Any) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield each state dict that lies under `KEYS`, with its key: `outer/inner` for a nested one."""
    for key in KEYS if isinstance(saved, Mapping) else ():
        inner = saved.get(key)
        if isinstance(inner, Mapping):
            deeper = list(_nested(inner))
            if deeper:
                yield from ((f"{key}/{name}", state) for name, state in deeper)
            elif any(isinstance(value, Tensor) for value in inner.values()):
                yield key, inner


def _fault(tensor: Tensor) -> str | None:
    """Return what a tensor is instead of plain values, and the remedy; None if it has plain values."""
    if type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return f"a {type(tensor).__name__}; save a plain tensor instead"
    if tensor.is_meta:
        return "a meta tensor, which has a shape and no values; save the model after its weights are loaded"
    if tensor.layout != torch.strided:
        return "a sparse tensor; save its to_dense() instead"
    if tensor.is_quantized:
        return "a quantized tensor; save its dequantize() instead"
    if tensor.is_nested:
        return "a nested tensor; save plain tensors instead"
    if tensor.dtype not in DTYPES:
        return f"of type {str(tensor.dtype).removeprefix('torch.')}; save it as float32 instead"
    return None


def _shorten(text: str) -> str:
    """Return the first sentence, in one line: PyTorch's messages have paragraphs."""
    return " ".join(text.split()).partition(". ")[0][:200]
