"""ResNets in Flax NNX: the ImageNet family, the CIFAR family, and a small CNN to show the parts in use.

    basic block       y = relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x))                   figure 5
    bottleneck        y = relu(bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))) + shortcut(x)) figure 5
    ImageNet family   7x7 stem, max pooling; four stages of widths w, 2w, 4w, 8w, w = 64        table 1
    CIFAR family      3x3 stem; three stages of widths w, 2w, 4w, w = 16; 6n + 2 layers         section 4.2

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385. Images are
[N, H, W, C] with H and W of 32 or more, logits [N, num_classes] in at least float32. The same names are in
`numpy_ref/resnet.py` and `torch_oracle/resnet.py`; a state dict has torchvision's names and layout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from jax_resnet.layers import (
    BatchNorm,
    Conv2d,
    Linear,
    OptionA,
    constant,
    global_average_pool,
    max_pool2d,
    parameter_dtype,
    relu,
)


class ResidualBlock(nnx.Module):
    """y = relu(branch(x) + shortcut(x))."""

    downsample: nnx.List[Any] | OptionA | None

    def branch(self, x: jax.Array) -> jax.Array:
        """The residual branch."""
        raise NotImplementedError

    def shortcut(self, x: jax.Array) -> jax.Array:
        """`downsample` where the shape changes; elsewhere the identity. [N, H, W, I] to [N, H', W', O]."""
        if self.downsample is None:
            return x
        for layer in self.downsample if isinstance(self.downsample, nnx.List) else [self.downsample]:
            x = layer(x)
        return x

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """y = relu(branch(x) + shortcut(x)); with stochastic depth relu(keep * branch(x) + shortcut(x)).

        Args:
            x: [N, H, W, I].
            keep: [N], the factor of each example's branch: 0 drops it (Huang et al. 2016, arXiv 1603.09382).
        """
        if keep is not None:
            kept = keep.astype(x.dtype)[:, None, None, None]
            return relu(kept * self.branch(x) + self.shortcut(x))
        return relu(self.branch(x) + self.shortcut(x))


class BasicBlock(ResidualBlock):
    """Two 3x3 convolutions and a shortcut (figure 5, left). [N, H, W, I] to [N, H', W', width]."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        conv = partial(Conv2d, bias=not batch_norm, rngs=rngs, dtype=dtype)
        norm = partial(BatchNorm, group=batch_norm_group, dtype=dtype) if batch_norm else _no_norm
        self.conv1 = conv(in_channels, width, 3, stride=stride, padding=1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, padding=1)
        self.bn2 = norm(width)
        self.downsample = make_shortcut(shortcut, in_channels, width, stride, conv, norm)

    @property
    def last_norm(self) -> BatchNorm | None:
        """The batch norm that ends the residual branch."""
        return self.bn2

    def branch(self, x: jax.Array) -> jax.Array:
        """bn2(conv2(relu(bn1(conv1(x)))))."""
        y = relu(_apply(self.bn1, self.conv1(x)))
        return _apply(self.bn2, self.conv2(y))


class Bottleneck(ResidualBlock):
    """1x1, 3x3 and 1x1 convolutions and a shortcut (figure 5, right). [N, H, W, I] to [.., 4 * width].

    The stride sits on the 3x3 (v1.5, torchvision's) or, with `stride_in_1x1`, on the first 1x1 (the paper's).
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        conv = partial(Conv2d, bias=not batch_norm, rngs=rngs, dtype=dtype)
        norm = partial(BatchNorm, group=batch_norm_group, dtype=dtype) if batch_norm else _no_norm
        out_channels = width * self.expansion
        stride1, stride2 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = conv(in_channels, width, 1, stride=stride1)
        self.bn1 = norm(width)
        self.conv2 = conv(width, width, 3, stride=stride2, padding=1)
        self.bn2 = norm(width)
        self.conv3 = conv(width, out_channels, 1)
        self.bn3 = norm(out_channels)
        self.downsample = make_shortcut(shortcut, in_channels, out_channels, stride, conv, norm)

    @property
    def last_norm(self) -> BatchNorm | None:
        """The batch norm that ends the residual branch."""
        return self.bn3

    def branch(self, x: jax.Array) -> jax.Array:
        """bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x))))))))."""
        y = relu(_apply(self.bn1, self.conv1(x)))
        y = relu(_apply(self.bn2, self.conv2(y)))
        return _apply(self.bn3, self.conv3(y))


def _no_norm(num_features: int) -> None:
    return None


def _apply(norm: BatchNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


def make_shortcut(
    kind: str,
    in_channels: int,
    out_channels: int,
    stride: int,
    conv: Callable[..., Conv2d],
    norm: Callable[..., Any],
) -> nnx.List[Any] | OptionA | None:
    """The layers of the shortcut where the shape changes; elsewhere None, as in torchvision."""
    if kind not in ("projection", "option-A"):
        raise ValueError(f'shortcut must be "projection" or "option-A", not {kind!r}')
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "option-A":
        return OptionA(in_channels, out_channels, stride=stride)
    layers = [conv(in_channels, out_channels, 1, stride=stride), norm(out_channels)]
    return nnx.List([layer for layer in layers if layer is not None])


def run_block(
    block: nnx.Module, x: jax.Array, remat: bool = False, keep: jax.Array | None = None
) -> jax.Array:
    """block(x), or block(x, keep) where `keep` [N] is given; traced once for all blocks of a kind
    and shape: ResNet-101 traces in a third of the time.

    Variables that the block changes or adds are written back: batch statistics in training, the counts of
    random streams, whatever it sows. Nothing is written where nothing changed, so that a block in eval mode
    may be called from any transformation of JAX.

    With `remat` only x is saved for backward, which recomputes the rest (Chen et al. 2016, "Training Deep
    Nets with Sublinear Memory Cost", arXiv 1604.06174). There is then no forward mode: `jax.jvp`,
    `jax.linearize` and `jax.jacfwd` of the network raise TypeError. A Hessian-vector product is
    `jax.jvp(jax.grad(f), ...)`, which works.
    """
    graphdef, state = nnx.split(block)
    y, changed = (_call_block_twice if remat else _call_block)(graphdef, state, x, keep)
    if changed:
        nnx.update(block, changed)
    return y


@partial(jax.jit, static_argnums=0)
def _call_block(graphdef: Any, state: Any, x: jax.Array, keep: jax.Array | None) -> tuple[jax.Array, Any]:
    """block(x), and the variables that the call changed or added."""
    block = nnx.merge(graphdef, state)
    before = {path: jax.tree.leaves(variable) for path, variable in nnx.to_flat_state(nnx.state(block))}
    y = block(x) if keep is None else block(x, keep)

    def same(path: Any, variable: Any) -> bool:
        old, new = before.get(path), jax.tree.leaves(variable)
        return old is not None and len(old) == len(new) and all(map(operator.is_, old, new))

    after = nnx.to_flat_state(nnx.state(block))
    return y, nnx.from_flat_state([entry for entry in after if not same(*entry)])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _call_block_twice(
    graphdef: Any, state: Any, x: jax.Array, keep: jax.Array | None
) -> tuple[jax.Array, Any]:
    """`_call_block`, recomputed in backward.

    `jax.checkpoint` is meant for this. But on a CPU, XLA drops its barriers before the last elimination of
    common subexpressions, and so computes the block only once. Backward therefore starts from x + 0 * dy: to
    the compiler it differs from x, and it cannot be computed before dy.
    """
    return _call_block(graphdef, state, x, keep)


def _call_first(graphdef: Any, state: Any, x: jax.Array, keep: jax.Array | None) -> tuple[Any, Any]:
    return _call_block(graphdef, state, x, keep), (state, x, keep)


def _call_again(graphdef: Any, saved: Any, cotangents: Any) -> Any:
    state, x, keep = saved
    dy = cotangents[0]
    _, pullback = jax.vjp(partial(_call_block, graphdef), state, x + 0 * dy.reshape(-1)[0], keep)
    return pullback(cotangents)


_call_block_twice.defvjp(_call_first, _call_again)


Block = type[BasicBlock] | type[Bottleneck]


class Stem(nnx.Module):
    """The layers before the blocks. [N, H, W, C] to [N, H', W', width]."""

    def __init__(self, conv1: Conv2d, bn1: BatchNorm | None, kind: str, dtype: DTypeLike) -> None:
        self.conv1, self.bn1, self.kind, self.dtype = conv1, bn1, kind, dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu(_apply(self.bn1, self.conv1(x.astype(self.dtype))))
        return max_pool2d(x, 3, 2, 1) if self.kind == "imagenet" else x


class Head(nnx.Module):
    """The layers after the blocks. [N, H, W, C] to logits [N, num_classes] in at least float32.

    `fc` may be any module of [N, C], or a function: `model.fc = nnx.static(nnx.identity)`.
    """

    def __init__(self, fc: Callable[[jax.Array], jax.Array]) -> None:
        self.fc = fc

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.fc(global_average_pool(x))
        return y.astype(parameter_dtype(y.dtype))


class ResNet(nnx.Module):
    """A stem, three or four stages of residual blocks, global average pooling and a linear layer (table 1).

    Args:
        block: BasicBlock, Bottleneck, or a module class of your own. Its `expansion` is output channels over
            width, it takes the arguments of BasicBlock, and it may have variables of any type. Its
            `last_norm` is used where `residual_scale` is not 1.
        stage_sizes: number of blocks of each stage. Stage s is width * 2**s wide, and all but the first halve
            height and width.
        num_classes: the number of logits.
        in_channels: channels of the images.
        width: channels of the stem and base width of the first stage.
        stem: "imagenet", a 7x7 convolution and 3x3 max-pooling, both of stride 2; or "small", a 3x3
            convolution of stride 1.
        shortcut: "projection" (1x1 convolution, option B) or "option-A", where shapes differ.
        stride_in_1x1: put a bottleneck's stride on its first 1x1 convolution, as the paper does.
        batch_norm: without it, every convolution has a bias.
        batch_norm_group: the number of consecutive examples that batch norm takes its statistics over, see
            `layers.BatchNorm`; a batch is a multiple of it. None: the whole batch.
        residual_scale: the initial weight of the batch norm that ends each block. 1 is torchvision's; a
            small one lets blocks start close to their shortcuts (De & Smith 2020, arXiv 2002.10444).
        remat: backward recomputes the blocks, see `run_block`.
        rngs: source of the initial weights.
        dtype: compute type; parameters, statistics and logits are promote_types(dtype, float32).
    """

    def __init__(
        self,
        block: Block,
        stage_sizes: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        *,
        width: int = 64,
        stem: str = "imagenet",
        shortcut: str = "projection",
        stride_in_1x1: bool = False,
        batch_norm: bool = True,
        batch_norm_group: int | None = None,
        residual_scale: float = 1.0,
        remat: bool = False,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        if stem not in ("imagenet", "small"):
            raise ValueError(f'stem must be "imagenet" or "small", not {stem!r}')
        if not stage_sizes or min(stage_sizes) < 1:
            raise ValueError(f"stage_sizes must be positive numbers of blocks, not {stage_sizes!r}")
        if batch_norm_group is not None and not batch_norm:
            raise ValueError("batch_norm_group needs batch_norm")
        kernel, stride, padding = (7, 2, 3) if stem == "imagenet" else (3, 1, 1)
        conv = partial(Conv2d, bias=not batch_norm, rngs=rngs, dtype=dtype)
        self.conv1 = conv(in_channels, width, kernel, stride=stride, padding=padding)
        self.bn1 = BatchNorm(width, group=batch_norm_group, dtype=dtype) if batch_norm else None
        self.stem, self.num_stages, self.remat, self.dtype = stem, len(stage_sizes), remat, dtype
        make = partial(block, shortcut=shortcut, stride_in_1x1=stride_in_1x1, batch_norm=batch_norm)
        if batch_norm_group is not None:  # a block class of your own need not take it
            make = partial(make, batch_norm_group=batch_norm_group)
        channels = width
        for stage, size in enumerate(stage_sizes):
            stage_width, blocks = width * 2**stage, []
            for index in range(size):
                step = 2 if stage > 0 and index == 0 else 1
                blocks.append(make(channels, stage_width, stride=step, rngs=rngs, dtype=dtype))
                channels = stage_width * block.expansion
                norm = None if residual_scale == 1 else blocks[-1].last_norm
                if norm is not None:
                    norm.weight.set_value(constant(residual_scale, channels, parameter_dtype(dtype)))
            setattr(self, f"layer{stage + 1}", nnx.List(blocks))
        self.fc = Linear(channels, num_classes, rngs=rngs, dtype=dtype)

    def parts(self) -> Iterator[tuple[str, Any]]:
        """Yield stem, blocks and head, which make up the network, with the prefix of their arrays' names."""
        yield "", Stem(self.conv1, self.bn1, self.stem, self.dtype)
        for stage in range(1, self.num_stages + 1):
            for index, block in enumerate(getattr(self, f"layer{stage}")):
                yield f"layer{stage}.{index}.", block
        yield "", Head(self.fc)

    @property
    def num_blocks(self) -> int:
        """Number of residual blocks."""
        return sum(len(getattr(self, f"layer{stage}")) for stage in range(1, self.num_stages + 1))

    def stages(self, x: jax.Array, keep: jax.Array | None = None) -> dict[str, jax.Array]:
        """The output of every stage, in order: stem, layer1, ..., pool, logits; jit drops what is unused."""
        out, block_number = {}, 0
        x = out["stem"] = Stem(self.conv1, self.bn1, self.stem, self.dtype)(x)
        for stage in range(1, self.num_stages + 1):
            for block in getattr(self, f"layer{stage}"):
                x = run_block(block, x, self.remat, None if keep is None else keep[:, block_number])
                block_number += 1
            out[f"layer{stage}"] = x
        out["pool"] = global_average_pool(x)
        out["logits"] = Head(self.fc)(x)
        return out

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        """Images [N, H, W, C] to logits [N, num_classes].

        Args:
            x: the images.
            keep: stochastic depth in training: the factor of each residual branch, [N, num_blocks], such as
                `[[1, 0, 1 / (1 - p)]]`; see `ResidualBlock`. None keeps every branch.
        """
        return self.stages(x, keep)["logits"]


class CNN(nnx.Module):
    """One 3x3 convolution, ReLU, one linear layer. The size of its images is fixed."""

    def __init__(
        self,
        num_classes: int,
        in_channels: int = 3,
        *,
        image_size: tuple[int, int] = (32, 32),
        width: int = 8,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ) -> None:
        self.conv = Conv2d(in_channels, width, 3, padding=1, bias=True, rngs=rngs, dtype=dtype)
        self.fc = Linear(width * image_size[0] * image_size[1], num_classes, rngs=rngs, dtype=dtype)
        self.image_size, self.dtype = tuple(image_size), dtype

    def stages(self, x: jax.Array) -> dict[str, jax.Array]:
        """The output of every stage, in order: conv, logits."""
        height, width = self.image_size
        if x.shape[1:3] != (height, width):
            raise ValueError(f"expected channels last, [N, {height}, {width}, C], got {list(x.shape)}")
        y = relu(self.conv(x.astype(self.dtype)))
        # PyTorch flattens [N, C, H, W]; the rows of the linear layer must have the same order here.
        flat = y.transpose(0, 3, 1, 2).reshape(y.shape[0], -1)
        logits = self.fc(flat)
        return {"conv": y, "logits": logits.astype(parameter_dtype(logits.dtype))}

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [N, H, W, C] to logits [N, num_classes]."""
        return self.stages(x)["logits"]


def resnet_imagenet(
    block: Block,
    family_sizes: Sequence[int],
    num_classes: int,
    in_channels: int = 3,
    *,
    stage_sizes: Sequence[int] | None = None,
    small_images: bool = False,
    **options: Any,
) -> ResNet:
    """The ImageNet family (table 1). `stage_sizes` replaces the family's, `small_images` the stem."""
    sizes = family_sizes if stage_sizes is None else stage_sizes
    stem = "small" if small_images else "imagenet"
    return ResNet(block, sizes, num_classes, in_channels, stem=stem, **options)


def resnet_cifar(
    n: int, num_classes: int, in_channels: int = 3, *, width: int = 16, **options: Any
) -> ResNet:
    """The CIFAR family (section 4.2): three stages of `n` basic blocks, option-A shortcuts; 6n + 2 layers."""
    make = partial(ResNet, BasicBlock, (n, n, n), width=width, stem="small", shortcut="option-A")
    return make(num_classes, in_channels, **options)


cnn = CNN
resnet18 = partial(resnet_imagenet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(resnet_imagenet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(resnet_imagenet, Bottleneck, (3, 4, 6, 3))
resnet101 = partial(resnet_imagenet, Bottleneck, (3, 4, 23, 3))
resnet152 = partial(resnet_imagenet, Bottleneck, (3, 8, 36, 3))
resnet8 = partial(resnet_cifar, 1)
resnet20 = partial(resnet_cifar, 3)
resnet32 = partial(resnet_cifar, 5)
resnet44 = partial(resnet_cifar, 7)
resnet56 = partial(resnet_cifar, 9)
resnet110 = partial(resnet_cifar, 18)

MODELS: dict[str, Callable[..., Any]] = {
    "resnet101": resnet101,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet152": resnet152,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "cnn": cnn,
}
