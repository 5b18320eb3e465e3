"""A network as an ONNX graph, built from its state dict; nothing is traced, and PyTorch is not needed.

The graph reads like the network: convolution, batch norm, relu; each block is relu(branch + shortcut).
Initializers have torchvision's names. Which layers there are follows from the names of the tensors; strides
are those of `torch_oracle/resnet.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

OPSET, IR_VERSION = 17, 8  # of ONNX 1.12, 2022: most runtimes read it
EPSILON = 1e-5  # of batch norm
INPUT, OUTPUT, BATCH = "image", "logits", "N"


def build(
    state: Mapping[str, np.ndarray],
    image_shape: tuple[int, int, int],
    *,
    stride_in_1x1: bool,
    metadata: Mapping[str, Any],
) -> bytes:
    """Return the content of an ONNX file: normalized images [N, C, H, W] to logits [N, num_classes].

    All is float32; N is free.

    Args:
        state: a state dict of a ResNet or of the CNN, under torchvision's names.
        image_shape: H, W and C.
        stride_in_1x1: of bottlenecks: the stride is that of the first convolution, not of the second.
        metadata: values for the file's metadata, as JSON.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph(state)
    if "conv.weight" in state:
        x = graph.relu(graph.conv("conv", INPUT))
    else:
        x = graph.resnet(stride_in_1x1=stride_in_1x1)
    graph.node("Gemm", [graph.node("Flatten", [x], axis=1), *graph.tensors("fc")], OUTPUT, transB=1)
    height, width, channels = image_shape
    made = helper.make_graph(
        graph.nodes,
        "network",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [BATCH, channels, height, width])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [BATCH, len(state["fc.weight"])])],
        graph.initializers,
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    helper.set_model_props(model, {name: json.dumps(value) for name, value in metadata.items()})
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


class _Graph:
    """Nodes and initializers; methods add to them and return the name of what they compute."""

    def __init__(self, state: Mapping[str, np.ndarray]) -> None:
        self.state = state
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, kind: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add an operator with one output."""
        from onnx import helper

        output = output or f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, array: np.ndarray) -> str:
        """Add an initializer."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def tensors(self, layer: str, kinds: tuple[str, ...] = ("weight", "bias")) -> list[str]:
        """Add the tensors of a layer that it has, as float32."""
        names = [f"{layer}.{kind}" for kind in kinds if f"{layer}.{kind}" in self.state]
        return [self.constant(name, self.state[name].astype(np.float32)) for name in names]

    def conv(self, layer: str, x: str, stride: int = 1) -> str:
        """A convolution, padded by half its kernel."""
        height, width = self.state[f"{layer}.weight"].shape[2:]
        pads = [height // 2, width // 2] * 2
        return self.node("Conv", [x, *self.tensors(layer)], layer, strides=[stride, stride], pads=pads)

    def norm(self, layer: str, x: str) -> str:
        """Batch norm by the running statistics; x itself in a network without it."""
        if f"{layer}.weight" not in self.state:
            return x
        kinds = ("weight", "bias", "running_mean", "running_var")
        return self.node("BatchNormalization", [x, *self.tensors(layer, kinds)], layer, epsilon=EPSILON)

    def relu(self, x: str, output: str = "") -> str:
        """max(x, 0)."""
        return self.node("Relu", [x], output)

    def resnet(self, *, stride_in_1x1: bool) -> str:
        """Stem, blocks and global average pooling. A 3x3 stem has no stride, and no pooling after it."""
        small_stem = self.state["conv1.weight"].shape[2] == 3
        x = self.relu(self.norm("bn1", self.conv("conv1", INPUT, 1 if small_stem else 2)))
        if not small_stem:
            x = self.node("MaxPool", [x], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        matches = (re.match(r"layer(\d+)\.(\d+)\.", name) for name in self.state)
        blocks = sorted({(int(match[1]), int(match[2])) for match in matches if match})
        for stage, index in blocks:
            x = self.block(f"layer{stage}.{index}", x, 2 if stage > 1 and index == 0 else 1, stride_in_1x1)
        return self.node("GlobalAveragePool", [x], "pool")

    def block(self, block: str, x: str, stride: int, stride_in_1x1: bool) -> str:
        """relu(branch(x) + shortcut(x))."""
        count = 3 if f"{block}.conv3.weight" in self.state else 2
        strided = 2 if count == 3 and not stride_in_1x1 else 1
        branch = x
        for i in range(1, count + 1):
            branch = self.norm(
                f"{block}.bn{i}", self.conv(f"{block}.conv{i}", branch, stride if i == strided else 1)
            )
            branch = branch if i == count else self.relu(branch)
        total = self.node("Add", [branch, self.shortcut(block, x, stride, count)])
        return self.relu(total, block)

    def shortcut(self, block: str, x: str, stride: int, count: int) -> str:
        """A convolution and batch norm; option A, which has no tensors; or x."""
        if f"{block}.downsample.0.weight" in self.state:
            return self.norm(f"{block}.downsample.1", self.conv(f"{block}.downsample.0", x, stride))
        into = self.state[f"{block}.conv1.weight"].shape[1]
        out = len(self.state[f"{block}.conv{count}.weight"])
        return x if (stride, into) == (1, out) else self.option_a(block, x, stride, out - into)

    def option_a(self, block: str, x: str, stride: int, extra: int) -> str:
        """Every `stride`-th row and column, and zeros for `extra` channels, half before and half after."""
        rows = [
            self.constant(f"{block}.{name}", np.array(values))
            for name, values in (
                ("starts", [0, 0]),
                ("ends", [np.iinfo(np.int64).max] * 2),
                ("axes", [2, 3]),
                ("steps", [stride, stride]),
            )
        ]
        channels = [0, extra // 2, 0, 0, 0, extra - extra // 2, 0, 0]
        pads = self.constant(f"{block}.pads", np.array(channels))
        return self.node("Pad", [self.node("Slice", [x, *rows]), pads])


def run(content: bytes, image: np.ndarray) -> np.ndarray:
    """Return the logits [N, num_classes] that ONNX Runtime computes, on the CPU.

    Args:
        content: of an ONNX file that `build` made.
        image: float32 [N, C, H, W], normalized.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: image.astype(np.float32)})
    return np.asarray(logits)
