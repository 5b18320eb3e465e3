"""Causes of the labeled faults: an identifier and one line each. A label names one of these."""

from __future__ import annotations

CAUSES = {
    # Convolution and pooling
    "same-padding": "SAME puts the odd pixel of padding last; the reference pads both sides alike",
    "ceil-mode": "the number of windows is rounded down instead of up, or the reverse",
    "count-include-pad": "the average divides by the window's size with or without the padding",
    "pool-padding-value": "max pooling pads with 0 instead of minus infinity",
    "pool-kind": "an average where the reference takes the maximum, or the reverse",
    "stride-placement": "the stride is on another convolution of the block",
    "dilation": "the kernel's dilation is missing",
    "output-padding": "a transposed convolution pads or crops another end of its output",
    "groups": "another number of groups, or channels dealt out to the groups in another order",
    "kernel-transposed": "a kernel with two of its axes exchanged",
    "kernel-flipped": "a kernel mirrored in height and width",
    # Normalization
    "epsilon": "another constant is added to the variance",
    "momentum-convention": "momentum is the share of the old statistics instead of the new, or the reverse",
    "biased-running-variance": "the running variance takes the biased batch variance",
    "unbiased-variance": "the batch is normalized with the unbiased variance",
    "batch-statistics-vs-running": "running statistics in training, or batch statistics in evaluation",
    "statistics-not-updated": "running statistics stay as they were",
    "layer-norm-axes": "the mean and variance are taken over other axes",
    "norm-activation-order": "the activation and the normalization are exchanged",
    # Activations and attention
    "activation": "another activation function, or one too many or too few",
    "activation-slope": "another slope for negative inputs",
    "gelu-tanh": "the tanh approximation of GELU instead of the exact one, or the reverse",
    "softmax-axis": "softmax over another axis",
    "attention-scale": "the scores are scaled by another number",
    "mask-value": "masked scores get a number that is not small enough",
    "mask-inverted": "the mask hides what it should show",
    "mask-after-softmax": "weights are masked after the softmax, so that they no longer sum to 1",
    "position-offset": "positions are counted from another number",
    "embedding-scale": "embeddings are scaled by another number",
    # Layout, shape and connections
    "flatten-order": "axes are merged or split in another order",
    "concat-order": "two tensors are concatenated in the other order",
    "shortcut-source": "the shortcut begins at another tensor",
    "missing-shortcut": "a shortcut is not added",
    "resize-align-corners": "the corners of the grids are aligned, or not, unlike the reference",
    "resize-half-pixel": "nearest neighbors are taken from pixel centers instead of corners, or the reverse",
    "resize-antialias": "downsampling with an antialiasing filter that the reference does not have",
    # Recurrence
    "gate-order": "the gates are split in another order",
    "reset-gate-placement": "the reset gate acts before the matrix product instead of after it",
    "update-gate-convention": "the update gate is the share of the new state instead of the old",
    "sequence-reversed": "the sequence is read from its end",
    # Precision
    "bfloat16-cast": "a value is rounded to bfloat16",
    "float16-cast": "a value is rounded to float16",
    "tf32": "operands of a product are rounded to the 10 bits of TF32",
    # Gradients
    "stop-gradient": "no gradient passes",
    "wrong-custom-derivative": "a custom derivative is not that of the function",
    "batch-statistics-constant": "the batch statistics are constants in the backward pass",
    # Parameters
    "missing-bias": "a bias is not added",
    "weight-not-loaded": "a parameter or statistic keeps its initial value",
    "weights-swapped": "two parameters of one shape are exchanged",
    "weight-of-lower-precision": "a parameter was stored in a lower precision",
    # Randomness
    "dropout-active": "dropout is on where the reference has it off",
}
