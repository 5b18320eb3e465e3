"""ResNets in Flax, AdaBound for optax, and a jitted training step.

model = jax_resnet.resnet101(num_classes=10, rngs=nnx.Rngs(0))
tx = jax_resnet.adabound(1e-3)
"""

from jax_resnet.adabound import (
    adabound,
    adabound_bounds,
    adaboundw,
    amsbound,
    scale_by_adabound,
    scale_by_amsbound,
    scale_by_sgdbound,
    sgdbound,
)
from jax_resnet.engine import Engine
from jax_resnet.optimizers import amsgrad, make_optimizer, scale_by_amsgrad
from jax_resnet.resnet import (
    CNN,
    MODELS,
    BasicBlock,
    Bottleneck,
    ResNet,
    cnn,
    resnet8,
    resnet18,
    resnet20,
    resnet32,
    resnet34,
    resnet44,
    resnet50,
    resnet56,
    resnet101,
    resnet110,
    resnet152,
    resnet_cifar,
    resnet_imagenet,
)
from jax_resnet.state_dict import load_state_dict, parameter_count, state_dict

__all__ = [
    "CNN",
    "MODELS",
    "BasicBlock",
    "Bottleneck",
    "Engine",
    "ResNet",
    "adabound",
    "adabound_bounds",
    "adaboundw",
    "amsbound",
    "amsgrad",
    "cnn",
    "load_state_dict",
    "make_optimizer",
    "parameter_count",
    "resnet8",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet34",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet101",
    "resnet110",
    "resnet152",
    "resnet_cifar",
    "resnet_imagenet",
    "scale_by_adabound",
    "scale_by_amsbound",
    "scale_by_amsgrad",
    "scale_by_sgdbound",
    "sgdbound",
    "state_dict",
]
