"""How far two right answers may be apart, each with its reason; measured where a reason gives a number.

A tolerance is relative to the largest magnitude of the tensor compared (`comparing.assert_close`), unless it
says otherwise. It is what the arithmetic allows with a few times to spare, never what a failing test needs.
"""

# float64 rounds at 1.1e-16. Sums of some hundred products, taken in another order, differ by 1e-15 to 1e-14.
FLOAT64_LAYER = 1e-12

# Two evaluations of ResNet-101 by PyTorch itself, training mode, batch 4 of 64x64: logits 1e-12, gradients
# 3e-12, since batch norm divides by deviations of few values. The thin networks here: 1e-14, gradients 3e-14.
FLOAT64_NETWORK = 1e-10

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
