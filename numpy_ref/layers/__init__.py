"""The layers of a ResNet in plain NumPy, forward and backward by hand: NHWC arrays, PyTorch's conventions.

Every layer has `forward(x, train=False) -> y` and `backward(dy) -> dx`. `dy` is the gradient of a loss L with
respect to the output, dL/dy; `dx` is dL/dx; the gradients of the parameters are added to their `.grad`. What
backward needs is saved by forward until `free_saved()`; inside `no_grad()` nothing is saved. So a layer
serves one thread at a time.

These are the readable forms. `numpy_ref.fast` has the same layers in the forms that training uses; the tests
hold them equal. The derivations use one rule, the chain rule: dL/da = sum over all b that a enters, dL/db *
db/da.
"""

from numpy_ref.layers.activation import Flatten as Flatten
from numpy_ref.layers.activation import ReLU as ReLU
from numpy_ref.layers.activation import Sigmoid as Sigmoid
from numpy_ref.layers.convolution import Conv2d as Conv2d
from numpy_ref.layers.convolution import LoopConv2d as LoopConv2d
from numpy_ref.layers.convolution import OptionA as OptionA
from numpy_ref.layers.convolution import col2im as col2im
from numpy_ref.layers.convolution import im2col as im2col
from numpy_ref.layers.convolution import output_size as output_size
from numpy_ref.layers.convolution import taps as taps
from numpy_ref.layers.linear import Linear as Linear
from numpy_ref.layers.loss import check_labels as check_labels
from numpy_ref.layers.loss import cross_entropy as cross_entropy
from numpy_ref.layers.module import Array as Array
from numpy_ref.layers.module import Layer as Layer
from numpy_ref.layers.module import Pair as Pair
from numpy_ref.layers.module import Parameter as Parameter
from numpy_ref.layers.module import Sequential as Sequential
from numpy_ref.layers.module import check_channels as check_channels
from numpy_ref.layers.module import draw as draw
from numpy_ref.layers.module import no_grad as no_grad
from numpy_ref.layers.module import promote as promote
from numpy_ref.layers.normalization import BatchNorm as BatchNorm
from numpy_ref.layers.normalization import NoNorm as NoNorm
from numpy_ref.layers.normalization import check_count as check_count
from numpy_ref.layers.normalization import group_count as group_count
from numpy_ref.layers.pooling import AvgPool2d as AvgPool2d
from numpy_ref.layers.pooling import GlobalAvgPool2d as GlobalAvgPool2d
from numpy_ref.layers.pooling import MaxPool2d as MaxPool2d
from numpy_ref.layers.pooling import Pool2d as Pool2d
