"""The layers that training spends its time in, in fast forms. `numpy_ref.layers` says what they compute.

A training step of a ResNet moves more bytes than it multiplies numbers, so these forms touch memory less:

- **Blocks.** A pass over a large array reads it from main memory, which is far slower than the arithmetic.
  Work goes by blocks of rows that stay in the processor's cache until all operations on them are done.
- **Fused passes.** Batch norm, the sum with the shortcut and ReLU are one pass (`BatchNormAddRelu`).
- **Reused buffers.** Every large array comes from `memory.empty`.
- **No patches saved.** Convolutions build the patches of `im2col` a block at a time, and again in backward: a
  copy within the cache is cheaper than to write nine times the image to memory and to read it back. With
  `keep_patches` they are saved, as in the plain form.
- **Only products that meet the image.** On 2x2 images, most of a padded kernel lies outside.
- **Fewer products.** Winograd's convolution, where channels and pixels are many.
"""

from numpy_ref.fast.batch_norm_add_relu import BatchNormAddRelu as BatchNormAddRelu
from numpy_ref.fast.block import FusedBlock as FusedBlock
from numpy_ref.fast.convolution import Conv2d as Conv2d
from numpy_ref.fast.convolution import choose_algorithm as choose_algorithm
from numpy_ref.fast.normalization import BatchNorm as BatchNorm
from numpy_ref.fast.option_a import OptionA as OptionA
from numpy_ref.fast.pooling import MaxPool2d as MaxPool2d
