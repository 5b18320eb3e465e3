"""`python -m experiment convert`: PyTorch's files and safetensors files, there and back; what it refuses."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import torch_oracle.weights
from experiment.__main__ import main
from experiment.commands import convert
from torch_oracle.weights import BESIDE, KEYS, read, serialize


def tensors() -> dict[str, Tensor]:
    """One of every kind that state dicts hold: a matrix, a scalar, an empty one, several types."""
    draw = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 2, 2, generator=draw),
        "bn1.num_batches_tracked": torch.tensor(2**40),
        "half.weight": torch.randn(3, 5, generator=draw).bfloat16(),
        "double.weight": torch.randn(2, generator=draw, dtype=torch.float64),
        "mask": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 3),
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


def run(*paths: Path) -> int:
    return main(["convert", *map(str, paths)])


# There and back


@pytest.mark.parametrize("suffix", convert.TORCH)
def test_there_and_back_is_exact(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin, middle, end = tmp_path / f"a{suffix}", tmp_path / "b.safetensors", tmp_path / f"c{suffix}"
    torch.save(tensors(), begin)
    assert run(begin, middle) == 0
    assert_same(load_file(middle), tensors())
    assert run(middle, end) == 0
    assert_same(torch.load(end, weights_only=True), tensors())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([begin.name, middle.name, end.name])
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{middle}: 6 tensors, 68 numbers", f"{end}: 6 tensors, 68 numbers"]
    assert err == ""


def arguments() -> argparse.Namespace:
    """What a script of timm or torchvision saves as `args`."""
    return argparse.Namespace(
        lr=0.1,
        betas=(0.9, 0.999),
        device=torch.device("cuda"),
        output=Path("out"),
        kind=float,
        seeds=range(3),
    )


def training() -> dict[str, Any]:
    """The state of SGD, a SequentialLR and a GradScaler, as torchvision's script saves them.

    Written down, since the first optimizer made in a process takes seconds.
    """
    group = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "foreach": None, "params": [0]}
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [group]}
    schedules = [{"start_factor": 0.01, "last_epoch": 1, "_last_lr": [0.1]}, {"T_max": 85, "eta_min": 0.0}]
    schedule = {"_milestones": [5], "last_epoch": 1, "_last_lr": [0.1], "_schedulers": schedules}
    scaler = {"scale": 65536.0, "growth_factor": 2.0, "_growth_tracker": 3}
    return {"optimizer": optimizer, "lr_scheduler": schedule, "scaler": scaler}


WAYS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "ordered": OrderedDict,
    "parameters": lambda state: {
        name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        for name, tensor in state.items()
    },
    "PyTorch's imagenet example": lambda state: {
        "epoch": 3,
        "arch": "resnet18",
        "state_dict": state,
        "best_acc1": torch.tensor(91.73),
        **training(),
    },
    "timm's": lambda state: {
        "epoch": 3,
        "arch": "resnet50d",
        "state_dict": state,
        "version": 2,
        "args": arguments(),
        "metric": np.float64(77.1),
        **training(),
    },
    "torchvision's": lambda state: {"model": state, "epoch": 1, "args": arguments(), **training()},
    "without an average": lambda state: {
        "model": state,
        "model_ema": None,
        "args": types.SimpleNamespace(a=1),
    },
    "PyTorch's tutorial": lambda state: {"epoch": 1, "model_state_dict": state, "loss": torch.tensor(1.0)},
    "pytorch-cifar's": lambda state: {"net": state, "acc": 95.5, "epoch": 1},
    "pycls's": lambda state: {"model_state": state, "cfg": "a: 1"},
    "Lightning's": lambda state: {
        "epoch": 1,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5), "dirpath": Path("a")}},
        "hyper_parameters": arguments(),
    },
    "distributed, in one file": lambda state: {"app": {"model": state, "optim": {"state": {}}}},
    "DeepSpeed's": lambda state: {"module": state, "param_shapes": [{"a": torch.Size([2])}]},
    "DataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "twice": lambda state: {f"module.module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "DataParallel's checkpoint": lambda state: {
        "state_dict": OrderedDict((f"module._orig_mod.{name}", tensor) for name, tensor in state.items())
    },
    "objects beside": lambda state: {
        "state_dict": state,
        "scores": defaultdict(list, {"top1": [np.float32(0.5)], "top5": []}),
        "nested": defaultdict(dict, {"a": defaultdict(float, {"b": 1.0})}),
        "last": deque([1, 2], maxlen=3),
        "when": datetime.datetime.now(datetime.UTC),
        "took": [datetime.timedelta(hours=1), datetime.date(2020, 1, 1), datetime.time(1)],
        "paths": {Path("a/b"), PurePosixPath("c")},
        "generators": [torch.get_rng_state(), ("MT19937", np.arange(4, dtype=np.uint32), 4, 0, 0.0)],
        "numbers": [np.int64(3), np.bool_(True), np.str_("a"), np.arange(3), np.array(["a", None], object)],
        "version": torch.__version__,
        "kinds": [int, str, frozenset({1}), slice(1, 2), b""],
    },
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_saving_is_read(
    way: str, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(WAYS[way](tensors()), tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    assert run(tmp_path / "a.pth", tmp_path / "a.safetensors") == 0
    assert set(torch.serialization.get_safe_globals()) == before
    assert_same(load_file(tmp_path / "a.safetensors"), tensors())
    assert capsys.readouterr().out.count("\n") == 1


def test_what_is_read_needs_no_gradient(tmp_path: Path) -> None:
    torch.save(WAYS["parameters"](tensors()), tmp_path / "a.pth")
    assert not any(tensor.requires_grad for tensor in read(tmp_path / "a.pth").values())


def with_pickle(instructions: bytes) -> bytes:
    """A file of torch.save in the older format, whose object is built by these instructions of pickle."""
    start = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(x, 2) for x in start) + b"\x80\x02" + instructions + pickle.dumps([], 2)


@pytest.mark.parametrize("build", [b"R", b"\x81"], ids=["called", "new"])
@pytest.mark.parametrize("name", BESIDE)
def test_each_type_beside_the_weights_is_passed_over(name: str, build: bytes, tmp_path: Path) -> None:
    """Also where it is not installed; a dict, a list and an object with content of its own."""
    module, _, kind = name.rpartition(".")
    content = {"_Object": b"}b", "_Dict": b"K\x01K\x02s}b", "_List": b"K\x01a"}[BESIDE[name].__name__]
    made = f"c{module}\n{kind}\n)".encode() + build + content
    (tmp_path / "a.pth").write_bytes(with_pickle(b"}" + b"X\x01\0\0\0a" + made + b"s."))
    with pytest.raises(ValueError, match=r"these are no tensors: a \((Object|OrderedDict|list)\)"):
        read(tmp_path / "a.pth")


def test_a_module_of_that_name_keeps_its_prefix(tmp_path: Path) -> None:
    state = {"module.weight": torch.ones(2), "fc.weight": torch.ones(3)}
    torch.save(state, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "a.safetensors") == 0
    assert_same(load_file(tmp_path / "a.safetensors"), state)


@cache
def network() -> dict[str, Tensor]:
    """The state dict of a thin ResNet-8."""
    torch.manual_seed(0)
    return dict(torch_oracle.MODELS["resnet8"](3, width=2).state_dict())


def under(*prefixes: str, network: Callable[[], dict[str, Tensor]] = network) -> dict[str, Tensor]:
    """The network's tensors under each of these prefixes; those of the second are other numbers."""
    return {
        f"{prefix}{name}": tensor + i
        for i, prefix in enumerate(prefixes)
        for name, tensor in network().items()
    }


def middle(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The names of a network whose stages were wrapped one by one."""
    return {name.replace("layer1.", f"layer1.{part}."): tensor for name, tensor in state.items()}


def averaged() -> dict[str, Tensor]:
    """What PyTorch's own average of weights saves."""
    model = torch_oracle.MODELS["resnet8"](3, width=2)
    model.load_state_dict(network())
    return dict(torch.optim.swa_utils.AveragedModel(torch.nn.DataParallel(model)).state_dict())


def headless(prefix: str, head: str) -> dict[str, Tensor]:
    """A backbone under a prefix, its last layer elsewhere."""
    return {
        name.replace("fc.", head) if name.startswith("fc.") else f"{prefix}{name}": tensor
        for name, tensor in network().items()
    }


PREFIXED: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "none": (network, ""),
    "DataParallel": (lambda: under("module."), ""),
    "doubled": (lambda: under("module.module."), ""),
    "compiled": (lambda: under("_orig_mod."), ""),
    "compiled and parallel": (lambda: under("module._orig_mod."), ""),
    "parallel and compiled": (lambda: under("_orig_mod.module."), ""),
    "a part compiled": (lambda: middle(network(), "_orig_mod"), ""),
    "FSDP": (lambda: middle(under("_fsdp_wrapped_module."), "_fsdp_wrapped_module"), ""),
    "activations checkpointed": (lambda: middle(network(), "_checkpoint_wrapped_module"), ""),
    "Lightning": (lambda: under("model."), ""),
    "Lightning, compiled": (lambda: under("model._orig_mod."), ""),
    "Lightning, a loss with weights": (
        lambda: {**under("net."), "loss.weight": torch.ones(3), "accuracy.tp": torch.tensor(3)},
        "accuracy.tp, loss.weight",
    ),
    "an average": (averaged, "n_averaged"),
    "ema_pytorch": (
        lambda: {**under("ema_model."), "initted": torch.tensor([True]), "step": torch.tensor([3])},
        "initted, step",
    ),
    "MoCo": (lambda: {**under("module.encoder_q."), "module.queue": torch.ones(2, 9)}, "module.queue"),
    "a backbone": (lambda: under("backbone."), ""),
    "a backbone, its head beside": (lambda: headless("backbone.", "fc."), ""),
    "mmpretrain": (lambda: headless("backbone.", "head.fc."), ""),
    "Lightning, a backbone": (lambda: headless("model.backbone.", "model.classifier."), ""),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", PREFIXED)
def test_prefixes_of_wrappers_are_removed(
    case: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In both kinds of file; `--init-from` does it by the same function (`test_weight_files.py`)."""
    make, rest = PREFIXED[case]
    (tmp_path / f"a{suffix}").write_bytes(serialize(make(), as_safetensors=suffix == ".safetensors"))
    assert run(tmp_path / f"a{suffix}", tmp_path / "b.safetensors") == 0
    assert_same(load_file(tmp_path / "b.safetensors"), network())
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == ([f"left out, as they lie beside the network: {rest}"] if rest else [])


def test_every_prefix_is_that_of_a_cnn_too(tmp_path: Path) -> None:
    state = dict(torch_oracle.cnn(3, 1, image_size=(32, 32)).state_dict())
    torch.save({f"model.{name}": tensor for name, tensor in state.items()}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors") == 0
    assert_same(load_file(tmp_path / "b.safetensors"), state)


@pytest.mark.parametrize("key", [key for key in KEYS if key != "app"])
def test_every_key_is_known(key: str, tmp_path: Path) -> None:
    torch.save({"epoch": 1, key: under("module.")}, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors") == 0
    assert_same(load_file(tmp_path / "b.safetensors"), network())


SEVERAL: dict[str, tuple[Callable[[], Any], str, str]] = {
    "timm's": (
        lambda: {"state_dict": under(""), "state_dict_ema": under("", "")},
        "of state_dict, state_dict_ema",
        "state_dict",
    ),
    "torchvision's": (
        lambda: {"model": under(""), "model_ema": {"n_averaged": torch.tensor(3), **under("module.")}},
        "of model, model_ema",
        "model_ema",
    ),
    "one in another": (
        lambda: {"model": {"net": under(""), "ema": under("")}},
        "of model/net, model/ema",
        "model/net",
    ),
    "teacher and student": (
        lambda: {"teacher": under("module.backbone."), "student": under("")},
        "of teacher, student",
        "teacher",
    ),
    "ema_pytorch": (
        lambda: under("ema_model.", "online_model."),
        "under ema_model, online_model",
        "ema_model",
    ),
    "Lightning's": (
        lambda: {"state_dict": under("model._orig_mod.", "teacher._orig_mod.")},
        "under model, teacher",
        "model",
    ),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_state_dicts_one_is_asked_for(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words, key = SEVERAL[case]
    torch.save(make(), tmp_path / "a.pth")
    error = refused(capsys, tmp_path, tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert "several" in error
    assert words in error
    assert "--key" in error
    assert main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--key", key]) == 0
    assert_same(load_file(tmp_path / "b.safetensors"), network())


def test_a_key_of_no_script_is_taken_where_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"epoch": 1, "weights of mine": network()}, tmp_path / "a.pth")
    target = tmp_path / "b.safetensors"
    error = refused(capsys, tmp_path, tmp_path / "a.pth", target)
    assert "weights of mine (dict); where one of them is the state dict, name it with --key" in error
    error = refused(capsys, tmp_path, tmp_path / "a.pth", target, "--key", "model")
    assert "no prefix model, which --key names" in error
    assert main(["convert", str(tmp_path / "a.pth"), str(target), "--key", "weights of mine"]) == 0
    assert_same(load_file(target), network())


@pytest.mark.parametrize("suffix", [*convert.TORCH, *(suffix.upper() for suffix in convert.TORCH)])
def test_every_suffix(suffix: str, tmp_path: Path) -> None:
    """The content says what a file is, so that its name may be any, and one kind may become itself."""
    torch.save(network(), tmp_path / f"a{suffix}")
    assert run(tmp_path / f"a{suffix}", tmp_path / "b.SafeTensors") == 0
    assert_same(load_file(tmp_path / "b.SafeTensors"), network())
    (tmp_path / "b.SafeTensors").rename(tmp_path / "noted")
    assert run(tmp_path / "noted", tmp_path / f"c{suffix}") == 0
    assert run(tmp_path / f"c{suffix}", tmp_path / f"d{suffix}") == 0
    assert_same(torch.load(tmp_path / f"d{suffix}", weights_only=True), network())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_views_are_written_each_on_its_own(suffix: str, tmp_path: Path) -> None:
    """Tied, strided and sliced tensors, as state dicts hold them; of a slice, not the whole storage."""
    whole = torch.arange(100_000.0)
    state = {
        "slice": whole[10:14],
        "tied": whole[10:14],
        "strided": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
    }
    path = tmp_path / f"a{suffix}"
    path.write_bytes(serialize(state, as_safetensors=suffix == ".safetensors"))
    assert_same(read(path), state)
    assert path.stat().st_size < 10_000


def test_the_oracles_weights_go_through_both_kinds(tmp_path: Path) -> None:
    model = torch_oracle.resnet18(5, width=2)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "a.safetensors") == 0
    other = torch_oracle.resnet18(5, width=2)
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))  # PyTorch's own, which wants every name
    assert_same(other.state_dict(), model.state_dict())


# Mistakes


class Code:
    """Calls a function when it is unpickled, which must not happen."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_size) for path in directory.iterdir()}


def refused(capsys: pytest.CaptureFixture[str], directory: Path, *argv: object) -> str:
    """The one line that refuses, which leaves everything as it was."""
    before = listing(directory)
    assert main(["convert", *map(str, argv)]) == 2
    assert listing(directory) == before
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.fixture
def files(tmp_path: Path) -> Path:
    torch.save(tensors(), tmp_path / "good.pth")
    save_file(tensors(), tmp_path / "good.safetensors")
    (tmp_path / "link.pt").symlink_to("good.pth")
    (tmp_path / "folder.pth").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("source", "target", "parts"),
    [
        ("absent.pth", "a.safetensors", ["absent.pth: not found"]),
        ("folder.pth", "a.safetensors", ["folder.pth: is no file"]),
        (
            "good.pth",
            "a.npz",
            ["a.npz: the suffix must be one of .safetensors, .pth, .pt, .th, .pth.tar, .ckpt"],
        ),
        ("good.pth", "a", ["a: the suffix must be one of"]),
        ("good.pth", "good.safetensors", ["good.safetensors: exists", "remove it"]),
        ("good.safetensors", "good.pth", ["good.pth: exists", "remove it"]),
        ("good.safetensors", "link.pt", ["link.pt: exists"]),
        ("good.pth", "good.pth", ["good.pth: is the file to be read"]),
        ("good.pth", "link.pt", ["link.pt: is the file to be read"]),
        ("good.pth", "none/a.safetensors", ["there is no folder", "none"]),
        ("good.pth", "good.pth/a.safetensors", ["there is no folder"]),
    ],
)
def test_a_mistake_in_the_names(
    source: str, target: str, parts: list[str], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(capsys, files, files / source, files / target)
    assert [part for part in parts if part not in error] == [], error


@pytest.mark.parametrize(
    "argv", [[], ["a.pth"], ["a.pth", "b.safetensors", "c"], ["a.pth", "b.pth", "--all"]]
)
def test_a_mistake_in_the_arguments(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "convert --help" in refused(capsys, tmp_path, *argv)


ATTACKS: dict[str, tuple[Callable[[str], Any], str]] = {
    "a call": (lambda path: Code(os.mkdir, path), "posix.mkdir"),
    "a command": (lambda path: Code(os.system, f"mkdir {path}"), "posix.system"),
    "a process": (lambda path: Code(subprocess.Popen, ["mkdir", path]), "commands.Popen"),
    "a program": (lambda path: Code(exec, f"import os; os.mkdir({path!r})"), "exec"),
    "an expression": (lambda path: Code(eval, f"__import__('os').mkdir({path!r})"), "eval"),
    "an import": (lambda path: Code(importlib.import_module, "antigravity"), "importlib.import_module"),
    "an attribute": (lambda path: Code(getattr, Code(importlib.import_module, "os"), "mkdir"), "getattr"),
    "a bound call": (lambda path: partial(os.mkdir, path), "functools.partial"),
    "another pickle": (lambda path: Code(pickle.loads, pickle.dumps(Code(os.mkdir, path))), "pickle.loads"),
    "a method of a type that is passed over": (lambda path: Code(Path.mkdir, Path(path)), "getattr"),
    "the factory of a dict": (lambda path: defaultdict(partial(os.mkdir, path)), "functools.partial"),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_no_code_of_a_file_is_run(
    attack: str, zipped: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Wherever it lies: also among the arguments, whose own types are passed over."""
    make, words = ATTACKS[attack]
    content = {
        "state_dict": network(),
        "args": argparse.Namespace(lr=0.1, trap=make(str(tmp_path / "trapped"))),
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    before = set(torch.serialization.get_safe_globals())
    error = refused(capsys, tmp_path, tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert f"it holds a {words}, which only code from the file could build, and none is run" in error
    assert set(torch.serialization.get_safe_globals()) == before
    assert "antigravity" not in sys.modules


def test_what_is_passed_over_is_never_the_type_itself() -> None:
    """A factory of a dict, a state of an object: nothing of it comes to be called."""
    module_level = {
        name for name, stand_in in BESIDE.items() if stand_in.__module__ != "torch_oracle.weights"
    }
    assert module_level == set()


SPECIAL: dict[str, tuple[Callable[[], Tensor], str]] = {
    "meta": (lambda: torch.ones(2, device="meta"), "a meta tensor"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "a sparse tensor; save its to_dense()"),
    "sparse rows": (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor; save its to_dense()"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "a quantized tensor; save its dequantize()",
    ),
    "quantized by channel": (
        lambda: torch.quantize_per_channel(torch.ones(3, 3), torch.ones(3), torch.zeros(3), 0, torch.qint8),
        "a quantized tensor; save its dequantize()",
    ),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor"),
    "complex128": (lambda: torch.ones(2, dtype=torch.complex128), "of type complex128; save it as float32"),
    "float4": (
        lambda: torch.ones(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "of type float4_e2m1fn_x2",
    ),
    "bits": (lambda: torch.ones(2, dtype=torch.uint8).view(torch.bits8), "of type bits8"),
}


@pytest.mark.filterwarnings("ignore:(torch.ao.)?quanti:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_tensor_without_plain_values_is_named(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = SPECIAL[kind]
    torch.save({"fc.bias": torch.ones(3), "fc.weight": make()}, tmp_path / "a.pth")
    error = refused(capsys, tmp_path, tmp_path / "a.pth", tmp_path / "b.safetensors")
    assert f"a.pth: fc.weight is {words}" in error


@pytest.mark.parametrize("dtype", torch_oracle.weights.DTYPES, ids=str)
def test_every_type_of_number_goes_through_both_kinds(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a": torch.tensor([0, 1, 2]).to(dtype)}
    torch.save(state, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors") == 0
    assert run(tmp_path / "b.safetensors", tmp_path / "c.pth") == 0
    found = torch.load(tmp_path / "c.pth", weights_only=True)["a"]
    assert found.dtype == dtype
    assert torch.equal(found.to(torch.complex64), state["a"].to(torch.complex64))


def with_value(name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The network with one other value in a tensor, the second."""
    tensor = network()[name].to(dtype, copy=True)
    tensor.view(-1)[1] = value
    return {**network(), name: tensor}


VALUES: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "NaN": (
        lambda: with_value("layer2.0.conv1.weight", np.nan),
        "layer2.0.conv1.weight has 1 of 72 values that are NaN or infinite, the first at [0, 0, 0, 1]",
    ),
    "infinite": (lambda: with_value("fc.bias", np.inf), "fc.bias has 1 of 3 values that are NaN or infinite"),
    "-infinite": (lambda: with_value("bn1.running_mean", -np.inf), "bn1.running_mean has 1 of 2 values"),
    "bfloat16": (lambda: with_value("fc.bias", np.nan, torch.bfloat16), "fc.bias has 1 of 3 values"),
    "float16": (lambda: with_value("fc.bias", 1e6, torch.float16), "fc.bias has 1 of 3 values"),
    "float8": (lambda: with_value("fc.bias", np.nan, torch.float8_e5m2), "fc.bias has 1 of 3 values"),
    "beyond float32": (lambda: with_value("fc.bias", 1e39, torch.float64), "fc.bias has 1 of 3 values"),
    "a variance": (
        lambda: with_value("bn1.running_var", -1e-7),
        "bn1.running_var has a variance below 0, the first at [1]",
    ),
    "a NaN variance": (lambda: with_value("bn1.running_var", np.nan), "bn1.running_var has 1 of 2 values"),
    "integers": (
        lambda: with_value("fc.weight", 3, torch.int64),
        "fc.weight is of type int64, and weights are",
    ),
    "bytes": (
        lambda: with_value("conv1.weight", 3, torch.int8),
        "conv1.weight is of type int8, and weights are",
    ),
    "a mask": (lambda: with_value("bn1.bias", 1, torch.bool), "bn1.bias is of type bool, and weights are"),
    "complex": (
        lambda: with_value("fc.bias", 1, torch.complex64),
        "fc.bias is of type complex64, and weights are",
    ),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("case", VALUES)
def test_values_that_no_trained_network_has_are_named(
    case: str, suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = VALUES[case]
    (tmp_path / f"a{suffix}").write_bytes(serialize(make(), as_safetensors=suffix == ".safetensors"))
    error = refused(capsys, tmp_path, tmp_path / f"a{suffix}", tmp_path / "b.safetensors")
    assert f"a{suffix}: {words}" in error


def test_values_beside_the_network_may_be_any(tmp_path: Path) -> None:
    """No weight, bias or statistic: a count, a mask, a table that ends in infinity."""
    state = {**network(), "table": torch.tensor([np.inf]), "mask": torch.tensor([True])}
    torch.save(state, tmp_path / "a.pth")
    assert run(tmp_path / "a.pth", tmp_path / "b.safetensors") == 0
    assert_same(load_file(tmp_path / "b.safetensors"), state)


def save_code(path: Path) -> None:
    torch.save({"weight": torch.ones(2), "trap": Code(os.mkdir, str(path.with_name("trapped")))}, path)


def cut(path: Path) -> None:
    path.write_bytes(serialize(tensors(), as_safetensors=path.suffix == ".safetensors")[:-100])


CONTENTS: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "a model": ("a.pth", lambda path: torch.save(torch.nn.Linear(2, 2), path), ["Linear", "state_dict()"]),
    "NumPy arrays": ("a.pth", lambda path: torch.save({"a": np.ones(2)}, path), ["no tensors: a (Object)"]),
    "TorchScript": (
        "a.pt",
        lambda path: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path),
        ["TorchScript", "state_dict()"],
    ),
    "a list": ("a.pth", lambda path: torch.save([torch.ones(1)], path), ["no state dict", "list"]),
    "a tensor": ("a.pth", lambda path: torch.save(torch.ones(1), path), ["no state dict", "Tensor"]),
    "an empty dict": ("a.pth", lambda path: torch.save({}, path), ["no state dict"]),
    "numbers": (
        "a.pth",
        lambda path: torch.save({"fc.weight": torch.ones(1), "epoch": 3, "lr": 0.1}, path),
        ["no tensors: epoch (int), lr (float)"],
    ),
    "garbage": ("a.th", lambda path: path.write_bytes(b"hello world" * 99), ["none of torch.save"]),
    "nothing": ("a.pth", lambda path: path.write_bytes(b""), ["none of torch.save"]),
    "half a file": ("a.pth", cut, ["none of torch.save", "damaged"]),
    "half a safetensors file": ("a.safetensors", cut, ["no safetensors file", "damaged"]),
    "no safetensors file": (
        "a.safetensors",
        lambda path: path.write_bytes(b"hello"),
        ["no safetensors file"],
    ),
    "code under another name": ("a.safetensors", save_code, ["mkdir", "code"]),
    "a line of text": (
        "a.safetensors",
        lambda path: path.write_bytes(b"a" * 8 + b"{}"),
        ["no safetensors file"],
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_no_state_dict(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name, save, parts = CONTENTS[case]
    save(tmp_path / name)
    target = tmp_path / ("b.pth" if name.endswith("safetensors") else "b.safetensors")
    capfd.readouterr()
    error = refused(capfd, tmp_path, tmp_path / name, target)
    assert str(tmp_path / name) in error
    assert [part for part in parts if part not in error] == [], error
    assert len(error) < 500


def test_without_pytorch(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(capsys, files, files / "good.pth", files / "new.safetensors")
    assert "extra `test`" in error
    assert "'.[test]'" in error


def test_a_disk_that_cannot_be_written_to(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert, "write_file", fail)
    error = refused(capsys, files, files / "good.pth", files / "new.safetensors")
    assert "new.safetensors: cannot be written (No space left on device)" in error
