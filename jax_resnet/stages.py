"""The output of each stage of a network: plain arrays in, plain arrays out.

The same function is in `stages.py` of the other two packages, so that the three can be compared without their
types.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_resnet.resnet import MODELS
from jax_resnet.state_dict import load_state_dict


def run_stages(
    model: str,
    weights: Mapping[str, np.ndarray],
    image: np.ndarray,
    num_classes: int,
    *,
    train: bool = False,
    precision: str = "float32",
    **options: Any,
) -> dict[str, np.ndarray]:
    """Return the output of every stage, in order: stem, layer1, ..., pool [N, C] and logits [N, num_classes].

    Args:
        model: name in `MODELS`.
        weights: a state dict under torchvision's names, in PyTorch's layout.
        image: [N, H, W, C], normalized.
        num_classes: number of logits.
        train: batch norm uses the batch's statistics instead of the running ones.
        precision: "float32" or "float64". Matrix products have it too: no TF32, no bfloat16.
        options: keyword arguments of the model's builder.

    Returns:
        {stage: array}, maps as [N, H', W', C'].

    Raises:
        ValueError: the state dict does not fit; it lists the names.
    """
    with jax.enable_x64(precision == "float64"), jax.default_matmul_precision("highest"):
        dtype = jnp.dtype(precision)
        network = MODELS[model](num_classes, image.shape[-1], **options, rngs=nnx.Rngs(0), dtype=dtype)
        load_state_dict(network, weights)
        if train:
            network.train()
        else:
            network.eval()
        graph, state = nnx.split(network)
        outputs = _run(graph, state, image.astype(precision))
    # jit sorts the names alphabetically, which is not the order of the network
    order = ("stem", *(name for name in outputs if name.startswith("layer")), "conv", "pool", "logits")
    return {name: np.asarray(outputs[name]) for name in order if name in outputs}


@partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, x: jax.Array) -> dict[str, jax.Array]:
    """The stages; not inside `run_stages`, so that a second call for a network compiles nothing."""
    network: Any = nnx.merge(graph, state)
    return dict(network.stages(x))
