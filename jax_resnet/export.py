"""The network and the training step as StableHLO, by `jax.export`: files that need JAX and nothing else.

    network(weights, image) -> logits
    training_step(state, image, label, lr) -> (state, metrics)

Weights and state are flat dicts of arrays, so that no type of this package is in the file. Names and layouts
are torchvision's, as in a safetensors file of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jax_resnet.engine import Engine
from jax_resnet.state import TrainState
from jax_resnet.state_dict import FROM_TORCH, TO_TORCH, to_torch_layout
from jax_resnet.step import eval_step
from jax_resnet.strategies.blockwise import jit_for_cpu

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
Arrays = dict[str, Any]


def export_network(engine: Engine, image_shape: tuple[int, int, int]) -> bytes:
    """Return the serialized network in evaluation mode.

    Its arguments are the weights {torchvision name: array} and images uint8 [N, H, W, C] of any N, which it
    normalizes; it returns logits [N, num_classes].

    Args:
        engine: whose network it is; its weights are not in the file.
        image_shape: height, width and channels of the images.

    Examples:
        >>> network = jax.export.deserialize(bytearray(export_network(engine, (32, 32, 3))))
        >>> logits = network.call(safetensors.numpy.load_file("weights.safetensors"), image)
    """
    with engine._precision():
        initial = engine.init()
        statistics = initial.batch_stats.keys()

        def network(weights: Arrays, image: jax.Array) -> jax.Array:
            native = {name: _transposed(array, FROM_TORCH) for name, array in weights.items()}
            params = {name: array for name, array in native.items() if name not in statistics}
            batch_stats = {name: native[name] for name in statistics}
            return eval_step(engine.network, params, batch_stats, image)

        weights = _specs({**initial.params, **initial.batch_stats})
        (batch,) = export.symbolic_shape("N")
        image = jax.ShapeDtypeStruct((batch, *image_shape), jnp.uint8)
        return _serialized(network, weights, image)


def export_step(engine: Engine, image_shape: tuple[int, int, int], batch_size: int) -> bytes:
    """Return the serialized training step.

    Its arguments are the state {name: array}, as `flat_state` makes it, images uint8 [N, H, W, C], labels
    int32 [N] and the learning rate. It returns the state after the step, under the same names, and
    {"loss", "logits", "grad_norm", ...}.

    Args:
        engine: whose step it is, with its optimizer and its options.
        image_shape: height, width and channels of the images.
        batch_size: N.
    """
    with engine._precision():
        initial = engine.init()
        names, structure = leaf_names(initial), jax.tree.structure(initial)

        def training_step(
            state: Arrays, image: jax.Array, label: jax.Array, lr: jax.Array
        ) -> tuple[Arrays, dict[str, jax.Array]]:
            native = [_transposed(state[name], FROM_TORCH) for name in names]
            batch = {"image": image, "label": label}
            output = engine._step(jax.tree.unflatten(structure, native), batch, lr)
            leaves = (_transposed(leaf, TO_TORCH) for leaf in jax.tree.leaves(output.state))
            log = output.log()
            del log["label"]
            return dict(zip(names, leaves, strict=True)), log

        return _serialized(
            training_step,
            _specs(dict(zip(names, jax.tree.leaves(initial), strict=True))),
            jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.uint8),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32),
            jax.ShapeDtypeStruct((), engine.network.dtype),
        )


def flat_state(state: TrainState) -> dict[str, np.ndarray]:
    """Return a state as {name: array}: `params/conv1.weight`, `opt_state/mu/conv1.weight`, `step`, ..."""
    leaves = map(to_torch_layout, jax.tree.leaves(state))
    return dict(zip(leaf_names(state), leaves, strict=True))


def leaf_names(state: TrainState) -> list[str]:
    """Return the name of each leaf, in JAX's order: its path.

    Positions in optax's tuples are left out, unless two leaves would have one name.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]

    def without(kinds: tuple[type, ...]) -> list[str]:
        named = (tuple(key for key in path if not isinstance(key, kinds)) for path in paths)
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path in named]

    names = without((jax.tree_util.SequenceKey,))
    return names if len(set(names)) == len(names) else without(())


def run_network(content: bytes, weights: Mapping[str, np.ndarray], image: np.ndarray) -> np.ndarray:
    """Return the logits [N, num_classes] that the content of a file of `export_network` gives."""
    call = jit_for_cpu(export.deserialize(bytearray(content)).call)
    with jax.enable_x64(any(array.dtype == np.float64 for array in weights.values())):
        return np.asarray(call(dict(weights), image))


class StepRunner:
    """The training step of a file of `export_step`, and the state that it leaves.

    Args:
        content: of the file.
        state: {name: array}, as `flat_state` makes it.

    Attributes:
        state: after the last step.
        leaves: [(name, shape, type)] of the state, in JAX's order.
    """

    def __init__(self, content: bytes, state: Mapping[str, np.ndarray]) -> None:
        exported = export.deserialize(bytearray(content))
        self._call = jit_for_cpu(exported.call)
        self.state: Arrays = dict(state)
        arguments, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
        self._lr_dtype = arguments[3].dtype
        self.leaves = [(name, spec.shape, str(spec.dtype)) for name, spec in arguments[0].items()]

    def take(self, batch: Mapping[str, np.ndarray], lr: float) -> dict[str, Any]:
        """Take a step; return {"loss", "logits", "params.NAME", "optimizer.mu.NAME", ...}."""
        with jax.enable_x64(self._lr_dtype == np.float64):
            rate = np.asarray(lr, self._lr_dtype)
            self.state, log = self._call(self.state, batch["image"], batch["label"], rate)
            tree = {
                name.replace("opt_state/", "optimizer/").replace("/", "."): np.asarray(array)
                for name, array in self.state.items()
            }
            return {"loss": np.asarray(log["loss"]), "logits": np.asarray(log["logits"]), **tree}


def _specs(arrays: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, in PyTorch's layout, and types."""
    return {name: jax.eval_shape(lambda x: _transposed(x, TO_TORCH), array) for name, array in arrays.items()}


def _transposed(array: jax.Array, orders: Mapping[int, tuple[int, ...]]) -> jax.Array:
    return array.transpose(orders[array.ndim]) if array.ndim in orders else array


def _serialized(function: Any, *arguments: Any) -> bytes:
    return bytes(export.export(jax.jit(function), platforms=PLATFORMS)(*arguments).serialize())
