"""ResNets in Flax, AdaBound for optax, and a jitted training step.

model = jax_resnet.resnet101(num_classes=10, rngs=nnx.Rngs(0))
tx = jax_resnet.adabound(1e-3)
"""

from jax_resnet.adabound import adabound as adabound
from jax_resnet.adabound import adabound_bounds as adabound_bounds
from jax_resnet.adabound import adaboundw as adaboundw
from jax_resnet.adabound import amsbound as amsbound
from jax_resnet.adabound import scale_by_adabound as scale_by_adabound
from jax_resnet.adabound import scale_by_amsbound as scale_by_amsbound
from jax_resnet.adabound import scale_by_sgdbound as scale_by_sgdbound
from jax_resnet.adabound import sgdbound as sgdbound
from jax_resnet.engine import Engine as Engine
from jax_resnet.optimizers import amsgrad as amsgrad
from jax_resnet.optimizers import make_optimizer as make_optimizer
from jax_resnet.optimizers import scale_by_amsgrad as scale_by_amsgrad
from jax_resnet.resnet import CNN as CNN
from jax_resnet.resnet import MODELS as MODELS
from jax_resnet.resnet import BasicBlock as BasicBlock
from jax_resnet.resnet import Bottleneck as Bottleneck
from jax_resnet.resnet import ResNet as ResNet
from jax_resnet.resnet import cnn as cnn
from jax_resnet.resnet import resnet8 as resnet8
from jax_resnet.resnet import resnet18 as resnet18
from jax_resnet.resnet import resnet20 as resnet20
from jax_resnet.resnet import resnet32 as resnet32
from jax_resnet.resnet import resnet34 as resnet34
from jax_resnet.resnet import resnet44 as resnet44
from jax_resnet.resnet import resnet50 as resnet50
from jax_resnet.resnet import resnet56 as resnet56
from jax_resnet.resnet import resnet101 as resnet101
from jax_resnet.resnet import resnet110 as resnet110
from jax_resnet.resnet import resnet152 as resnet152
from jax_resnet.resnet import resnet_cifar as resnet_cifar
from jax_resnet.resnet import resnet_imagenet as resnet_imagenet
from jax_resnet.state_dict import load_state_dict as load_state_dict
from jax_resnet.state_dict import parameter_count as parameter_count
from jax_resnet.state_dict import state_dict as state_dict
