"""The tolerances that test files share, each with its reason, measured where a number is given.

A tolerance is relative to the largest magnitude of the tensor compared (`comparing.assert_close`), unless it
says otherwise. It is a few times the rounding error of correct arithmetic, never fitted to a failing test.
"""

import math

import numpy as np

# float64 rounds at 1.1e-16. Sums of some hundred products, taken in another order, differ by 1e-15 to 1e-14.
FLOAT64_LAYER = 1e-12

# Two evaluations of ResNet-101 by PyTorch itself, training mode, batch 4 of 64x64: logits 1e-12, gradients
# 3e-12, since batch norm divides by deviations of few values. The thin networks here: 1e-14, gradients 3e-14,
# or 1e-12 of one that nearly cancels.
FLOAT64_NETWORK = 1e-10

# The gradients of ResNet-101 at full width: three times further apart than the logits in PyTorch itself.
FLOAT64_DEEP_GRADIENT = 1e-9

# 1,000 steps of one common sequence of gradients: each rounds a few times, and nothing magnifies it.
FLOAT64_OPTIMIZER = 1e-12

# 100 steps of a thin ResNet. Changing the last bit of one weight changes the losses by 1e-15 with Adam at
# 1e-3, and by 2e-11 with SGD at 0.1, whose steps are large enough for chaos to begin. Parameters and moments
# are further apart: Adam makes whole steps of gradients that are nothing but rounding.
FLOAT64_TRAJECTORY = {"adam": 1e-11, "adabound": 1e-11, "sgd": 1e-9}
FLOAT64_TRAINED = 1e-8

# 50 steps by the CIFAR recipe, SGD 0.1 on batches of 128: what the project promises of it. A thin ResNet left
# alone for all 50: 4e-15. ResNet-20, whose runs do not stay together, each step from PyTorch's state: 1e-12.
FLOAT64_RECIPE = 1e-8

# The means of an epoch of that recipe in float32, relative: what the project promises of it.
RECIPE_EPOCH = 0.03

# float32 rounds at 6e-8. Batch norm, pooling, the loss and all that works element by element, at unit scale:
# 1e-7 to 2e-7.
FLOAT32_ELEMENTWISE = 1e-6


def float32_sum(length: int) -> float:
    """Convolutions and linear layers: the roundings of a sum of so many products are as good as random, so
    they grow with the square root; measured 0.7e-6 to 2.6e-6 in the layers of ResNets."""
    return 4 * float(np.finfo(np.float32).eps) * math.sqrt(length)


# Whole networks in float32 lose what batch norm magnifies: PyTorch's own worst gradient in ResNet-101 is off
# by a quarter. So its error is the measure, the larger of its two layouts': an engine's is divided by it. The
# errors of PyTorch's two layouts differ by a factor of 1 to 2, in the worst tensor of 3 to 11. Each tensor's
# ratio is the geometric mean over five seeds: see `tests.parity.compare.mean_ratios`. The engines' worst: 1.1
# and 1.8.
FLOAT32_RATIO = 1.5  # geometric mean over all tensors
FLOAT32_RATIO_WORST = 8

# float32 rounds at 6e-8. One layer is off by 2e-7 (batch norm) to 3e-6 (long sums of a convolution).
FLOAT32_LAYER = 1e-5

# Some ten such layers on top of each other, and batch norm between them: 1e-6, gradients 1e-5. TF32, with ten
# bits of fraction, would be off by 1e-3.
FLOAT32_NETWORK = 1e-4

# A trained ResNet-20 in evaluation mode, 20 layers: 1e-6.
FLOAT32_TRAINED = 1e-4

# bfloat16 rounds at 2^-9 = 0.002 in every operation: one layer 0.005, a thin network 0.01 to 0.03.
BFLOAT16_LAYER = 1e-2
BFLOAT16_NETWORK = 5e-2

# The whole gradient as one vector (`comparing.assert_all_near`): 0.026 for the three blocks compared, 0.025
# in PyTorch under autocast. Single tensors of it, sums that nearly cancel, are off by a quarter in both.
BFLOAT16_GRADIENT = 1e-1
