"""How far two right answers may be apart, each with its reason; measured where a reason gives a number.

All are relative to the largest magnitude of the tensor compared (`comparing.assert_close`). A tolerance is what the
arithmetic allows with a few times to spare, never what a failing test would need.
"""

# float64 rounds at 1.1e-16. Sums of some thousand products, taken in another order, differ by 1e-15 to 1e-14.
FLOAT64_LAYER = 1e-12

# Two evaluations of one network by PyTorch itself, training mode, batch 4 of 64x64: logits 1e-12, gradients 3e-12,
# since batch norm divides by deviations of few values. Thin networks here are at 1e-13.
FLOAT64_NETWORK = 1e-10

# float32 rounds at 6e-8. One layer is off by 2e-7 (batch norm) to 3e-6 (long sums of a convolution).
FLOAT32_LAYER = 1e-5

# A dozen such layers on top of each other, and batch norm between them: 1e-6 to 1e-5 was measured, logits and
# gradients. TF32 (10 bits of fraction) would be off by 1e-3.
FLOAT32_NETWORK = 1e-4

# A trained ResNet-20 in evaluation mode: 20 layers, logits of magnitude 20; 2e-6 was measured.
FLOAT32_TRAINED = 1e-4

# bfloat16 rounds at 2^-9 = 0.002 in every operation of every layer, and gradients pass twice as many.
BFLOAT16_LAYER = 1e-2
BFLOAT16_NETWORK = 5e-2
BFLOAT16_GRADIENT = 2e-1
