"""The layers of a ResNet in plain NumPy, forward and backward by hand: NHWC arrays, PyTorch's conventions.

Every layer has `forward(x, train=False) -> y` and `backward(dy) -> dx`. `dy` is the gradient of a loss L with
respect to the output, dL/dy; `dx` is dL/dx; the gradients of the parameters are added to their `.grad`. What
backward needs is saved by forward until `free_saved()`; inside `no_grad()` nothing is saved. So a layer
serves one thread at a time.

These are the readable forms. `numpy_ref.fast` has the same layers in the forms that training uses; the tests
hold them equal. The derivations use one rule, the chain rule: dL/da = sum over all b that a enters, dL/db *
db/da.
"""

from numpy_ref.layers.activation import Flatten, ReLU, Sigmoid
from numpy_ref.layers.convolution import (
    Conv2d,
    LoopConv2d,
    OptionA,
    col2im,
    im2col,
    output_size,
    pad2d,
    taps,
    unpad2d,
)
from numpy_ref.layers.linear import Linear
from numpy_ref.layers.loss import check_labels, cross_entropy
from numpy_ref.layers.module import (
    Array,
    Layer,
    Pair,
    Parameter,
    Sequential,
    check_channels,
    draw,
    no_grad,
    pair,
    promote,
    sum_type,
)
from numpy_ref.layers.normalization import BatchNorm, NoNorm, check_count
from numpy_ref.layers.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d, Pool2d

__all__ = [
    "Array",
    "AvgPool2d",
    "BatchNorm",
    "Conv2d",
    "Flatten",
    "GlobalAvgPool2d",
    "Layer",
    "Linear",
    "LoopConv2d",
    "MaxPool2d",
    "NoNorm",
    "OptionA",
    "Pair",
    "Parameter",
    "Pool2d",
    "ReLU",
    "Sequential",
    "Sigmoid",
    "check_channels",
    "check_count",
    "check_labels",
    "col2im",
    "cross_entropy",
    "draw",
    "im2col",
    "no_grad",
    "output_size",
    "pad2d",
    "pair",
    "promote",
    "sum_type",
    "taps",
    "unpad2d",
]
