"""The networks of the JAX engine: names, shapes and counts, loading, how they are called. Their numbers are
held against NumPy's and PyTorch's in `test_parity.py`.
"""

from __future__ import annotations

import warnings
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import jax_resnet
import torch_oracle
from jax_resnet import resnet
from jax_resnet.resnet import MODELS, BasicBlock, Bottleneck, ResNet
from jax_resnet.state_dict import (
    apply,
    from_torch_layout,
    load_state_dict,
    parameter_count,
    split,
    state_dict,
    to_torch_layout,
)
from tests.helpers.comparing import (
    assert_all_close,
    assert_close,
    quick_jit,
    random_state,
)
from tests.tolerances import (
    FLOAT32_NETWORK,
    FLOAT64_NETWORK,
)

CLASSES, BATCH = 5, 4


class Member(NamedTuple):
    """A thin network, and images so large that batch norm never divides by the deviation of few values."""

    name: str
    options: dict[str, Any]
    in_channels: int = 3
    size: tuple[int, int] = (64, 64)

    def build(self, dtype: str = "float64", seed: int = 0) -> Any:
        return self.builder(jax_resnet)(
            CLASSES, self.in_channels, **self.options, rngs=nnx.Rngs(seed), dtype=jnp.dtype(dtype)
        )

    def build_reference(self) -> torch.nn.Module:
        model = self.builder(torch_oracle)(CLASSES, self.in_channels, **self.options).double()
        torch_oracle.load_state_dict(model, random_state(shapes_of(model)))
        return model

    def images(self) -> Any:
        return np.random.default_rng(1).normal(size=(BATCH, *self.size, self.in_channels))

    def builder(self, engine: Any) -> Any:
        family, _, n = self.name.partition(":")
        return partial(getattr(engine, family), *([int(n)] if n else []))


# Every block, stem, shortcut, stride and option; 1, 3 and 5 channels; even, odd and oblong images.
MEMBERS = {
    "basic": Member("resnet18", {"width": 4, "stage_sizes": (1, 1, 1, 1)}, 3, (47, 66)),
    "bottleneck": Member("resnet50", {"width": 4, "stage_sizes": (1, 2), "small_images": True}, 3, (17, 24)),
    "stride-in-1x1": Member(
        "resnet101",
        {"width": 4, "stage_sizes": (1, 1), "small_images": True, "stride_in_1x1": True},
        1,
        (16, 17),
    ),
    "small-images": Member(
        "resnet34", {"width": 4, "stage_sizes": (1, 2), "small_images": True}, 5, (33, 35)
    ),
    "no-batch-norm": Member(
        "resnet50", {"width": 4, "stage_sizes": (1, 2), "batch_norm": False}, 3, (32, 45)
    ),
    "option-A": Member("resnet_cifar:1", {"width": 3}, 3, (32, 33)),
    "option-A-no-batch-norm": Member("resnet_cifar:1", {"width": 4, "batch_norm": False}, 1, (32, 32)),
    "cnn": Member("cnn", {"image_size": (33, 40), "width": 3}, 3, (33, 40)),
}
# One block, no more than it takes to call a network.
SMALLEST = Member("resnet18", {"width": 2, "stage_sizes": (1,), "small_images": True}, size=(8, 8))

Shapes = dict[str, tuple[int, ...]]


def shapes_of(model: torch.nn.Module) -> Shapes:
    """Read by PyTorch's own state_dict, which works on the meta device too, where no memory is taken."""
    own = model.state_dict().items()
    return {name: tuple(tensor.shape) for name, tensor in own if not name.endswith("num_batches_tracked")}


# Names, shapes, counts


def abstract_shapes(model: nnx.Module) -> Shapes:
    """Of a model made by `nnx.eval_shape`, which has shapes but no arrays; in PyTorch's layout."""
    parts = split(model)
    leaves = {**parts.params, **parts.batch_stats}
    return {name: to_torch_layout(np.broadcast_to(0, leaf.shape)).shape for name, leaf in leaves.items()}


def abstract(name: str, classes: int, in_channels: int = 3, **options: Any) -> nnx.Module:
    return nnx.eval_shape(lambda: MODELS[name](classes, in_channels, **options, rngs=nnx.Rngs(0)))


def test_the_table_of_models_is_the_references() -> None:
    assert set(MODELS) == set(torch_oracle.MODELS)
    assert next(iter(MODELS)) == "resnet101"
    assert all(MODELS[name] is getattr(jax_resnet, name) for name in MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_counts_are_the_references(name: str) -> None:
    classes = 1000 if name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152") else 10
    model = abstract(name, classes)
    with torch.device("meta"):
        reference = torch_oracle.MODELS[name](classes)
    assert abstract_shapes(model) == shapes_of(reference)
    assert parameter_count(model).total == torch_oracle.parameter_count(reference).total


def test_resnet101_has_as_many_parameters_as_torchvisions() -> None:
    assert parameter_count(abstract("resnet101", 1000)) == (44_549_160, 44_549_160, 0)
    only_fc = parameter_count(abstract("resnet101", 1000), frozen=lambda name: not name.startswith("fc."))
    assert only_fc == (44_549_160, 2_049_000, 42_500_160)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20"])
@pytest.mark.parametrize("in_channels", [1, 5])
def test_without_batch_norm_names_shapes_and_counts_are_the_references(name: str, in_channels: int) -> None:
    model = abstract(name, 7, in_channels, batch_norm=False)
    with torch.device("meta"):
        reference = torch_oracle.MODELS[name](7, in_channels, batch_norm=False)
    assert abstract_shapes(model) == shapes_of(reference)
    assert not split(model).batch_stats


def test_weights_do_not_depend_on_the_precision_and_do_on_the_seed() -> None:
    member = Member("resnet_cifar:1", {"width": 2})
    float32, bfloat16, other = (
        member.build("float32"),
        member.build("bfloat16"),
        member.build("float32", seed=1),
    )
    with jax.enable_x64(True):
        float64 = member.build("float64")
    expected = state_dict(float32)
    assert_all_close("float64", state_dict(float64), expected, 0)
    assert_all_close("bfloat16", state_dict(bfloat16), expected, 0)
    drawn = [name for name, value in expected.items() if value.ndim > 1]
    assert not any((state_dict(other)[name] == expected[name]).any() for name in drawn)
    assert len({expected[name].flat[0] for name in drawn}) == len(drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem": "tiny"}, "stem must be .* not 'tiny'"),
        ({"shortcut": "A"}, "shortcut must be .* not 'A'"),
        ({"block": BasicBlock, "shortcut": "B"}, "shortcut must be .* not 'B'"),
        ({"stage_sizes": ()}, "stage_sizes"),
        ({"stage_sizes": (1, 0)}, "stage_sizes"),
    ],
)
def test_unknown_parts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResNet(**{"block": Bottleneck, "stage_sizes": (1,), "num_classes": 2, "rngs": nnx.Rngs(0), **options})


@pytest.mark.parametrize(("name", "last"), [("basic", "bn2"), ("bottleneck", "bn3"), ("option-A", "bn2")])
def test_residual_scale_is_the_initial_weight_of_each_blocks_last_norm(name: str, last: str) -> None:
    plain = MEMBERS[name]
    member = plain._replace(options={**plain.options, "residual_scale": 0.25})
    expected = state_dict(plain.build("float32"))
    ends = [key for key in expected if key.startswith("layer") and key.endswith(f"{last}.weight")]
    expected |= {key: np.full_like(expected[key], 0.25) for key in ends}
    assert_all_close("scaled", state_dict(member.build("float32")), expected, 0)
    reference = torch_oracle.state_dict(
        member.builder(torch_oracle)(CLASSES, member.in_channels, **member.options)
    )
    scaled = [key for key, value in reference.items() if (value == 0.25).all()]
    assert sorted(scaled) == sorted(ends)
    assert len(ends) == sum(key.endswith("conv2.weight") for key in expected)


# Loading


def test_layouts_there_and_back() -> None:
    rng = np.random.default_rng(0)
    for shape in [(2, 3, 4, 5), (2, 3), (4,), ()]:
        array = rng.normal(size=shape)
        for there, back in [(to_torch_layout, from_torch_layout), (from_torch_layout, to_torch_layout)]:
            changed = there(array)
            np.testing.assert_array_equal(back(changed), array)
            assert changed.flags.c_contiguous
            assert not np.shares_memory(changed, array)
    assert to_torch_layout(np.empty((7, 5, 3, 64))).shape == (64, 3, 7, 5)
    assert to_torch_layout(np.empty((512, 10))).shape == (10, 512)


@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS)
def test_the_references_state_dict_there_and_back_is_exact(member: Member) -> None:
    reference = member.build_reference()
    wanted = torch_oracle.state_dict(reference)
    with jax.enable_x64(True):
        model = member.build()
        load_state_dict(model, wanted)
        found = state_dict(model)
    assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(wanted, np.float64)
    assert_all_close("loaded", found, wanted, 0)
    fresh = member.builder(torch_oracle)(CLASSES, member.in_channels, **member.options).double()
    torch_oracle.load_state_dict(fresh, found)
    assert_all_close("returned", torch_oracle.state_dict(fresh), wanted, 0)


def two_stages(dtype: str = "float32") -> Any:
    return Member("resnet18", {"width": 2, "stage_sizes": (1, 1), "small_images": True}).build(dtype)


def state_for(model: nnx.Module) -> dict[str, np.ndarray]:
    return random_state({name: value.shape for name, value in state_dict(model).items()})


def test_a_state_dict_is_a_copy() -> None:
    model = two_stages()
    before = state_dict(model)
    before["fc.weight"] += 1
    before["bn1.running_mean"] += 1
    assert (state_dict(model)["fc.weight"] != before["fc.weight"]).all()
    loaded = state_for(model)
    load_state_dict(model, loaded)
    loaded["bn1.running_mean"] += 1
    assert (state_dict(model)["bn1.running_mean"] < loaded["bn1.running_mean"]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["float64", "float32", "bfloat16"])
def test_loading_keeps_the_types_of_the_model(dtype: str, given: str) -> None:
    model = two_stages(dtype)
    state = {name: value.astype(jnp.dtype(given)) for name, value in state_for(model).items()}
    load_state_dict(model, state)
    found = state_dict(model)
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    rounded = {name: value.astype(np.float32) for name, value in state.items()}
    assert_all_close("loaded", found, rounded, 0)


def test_loading_reads_linear_as_fc_and_passes_over_counts_of_batches() -> None:
    model = two_stages()
    state = state_for(model)
    renamed = {name.replace("fc.", "linear."): value for name, value in state.items()}
    load_state_dict(model, {**renamed, "bn1.num_batches_tracked": np.array(7)})
    assert_all_close("loaded", state_dict(model), state, FLOAT32_NETWORK)
    with pytest.raises(ValueError, match=r"fit: unexpected linear\.bias$"):
        load_state_dict(model, {**state, "linear.bias": np.zeros(CLASSES)})


def test_loading_lists_every_fault_in_one_error_and_changes_nothing() -> None:
    model = two_stages()
    before = state_dict(model)
    state = state_for(model)
    del state["bn1.bias"], state["layer2.0.conv1.weight"]
    state |= {"layer9.0.conv1.weight": np.zeros(1), "extra": np.zeros(2)}
    state["fc.weight"] = state["fc.weight"].T
    state["conv1.weight"] = state["conv1.weight"].transpose(2, 3, 1, 0)
    with pytest.raises(ValueError, match="does not fit") as caught:
        load_state_dict(model, state)
    assert str(caught.value) == (
        "the state dict does not fit: conv1.weight has shape [3, 3, 3, 2], not [2, 3, 3, 3]; "
        "fc.weight has shape [4, 5], not [5, 4]; missing bn1.bias; missing layer2.0.conv1.weight; "
        "unexpected extra; unexpected layer9.0.conv1.weight"
    )
    assert_all_close("after", state_dict(model), before, 0)


# Forward


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet20", "cnn"])
@pytest.mark.parametrize("in_channels", [1, 3, 5])
def test_logits_of_any_channels_and_size_are_at_least_float32(name: str, in_channels: int) -> None:
    size = (33, 71)
    options = {"image_size": size} if name == "cnn" else {}
    x = jax.ShapeDtypeStruct((2, *size, in_channels), jnp.uint8)
    for dtype in ("bfloat16", "float32"):
        model = abstract(name, 7, in_channels, **options, dtype=jnp.dtype(dtype))
        parts = split(model)
        logits, stats = jax.eval_shape(partial(apply, parts.train), parts.params, parts.batch_stats, x)
        assert (logits.shape, logits.dtype) == ((2, 7), np.float32)
        assert {name: value.shape for name, value in stats.items()} == {
            name: value.shape for name, value in parts.batch_stats.items()
        }


def test_stages_come_in_order() -> None:
    graph, state = nnx.split(abstract("resnet50", 5, width=4, stage_sizes=(1, 2, 1, 1)))
    found: list[tuple[Any, ...]] = []

    def run(state: nnx.State, x: jax.Array) -> None:
        model: Any = nnx.merge(graph, state)
        stages = model.stages(x)
        found.extend((name, *value.shape) for name, value in stages.items())

    jax.eval_shape(run, state, jax.ShapeDtypeStruct((2, 33, 71, 3), jnp.float32))
    # 33 -> 17 -> 9 and 71 -> 36 -> 18 in the stem; every later stage takes the half, rounded up
    assert found == [
        ("stem", 2, 9, 18, 4),
        ("layer1", 2, 9, 18, 16),
        ("layer2", 2, 5, 9, 32),
        ("layer3", 2, 3, 5, 64),
        ("layer4", 2, 2, 3, 128),
        ("pool", 2, 128),
        ("logits", 2, 5),
    ]


def test_batch_norm_over_one_value_is_refused_in_training_only() -> None:
    parts = split(abstract("resnet18", 3, width=2, stage_sizes=(1, 1, 1, 1)))
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match=r"more than 1 value per channel .* \(1, 1, 1, 16\)"):
        jax.eval_shape(partial(apply, parts.train), parts.params, parts.batch_stats, x)
    logits, _ = jax.eval_shape(partial(apply, parts.eval), parts.params, parts.batch_stats, x)
    assert logits.shape == (1, 3)


# How a model is called


def test_a_model_is_called_eagerly_under_nnx_jit_and_apart_alike() -> None:
    with jax.enable_x64(True):
        model = SMALLEST.build()
        load_state_dict(model, state_for(model))
        x = SMALLEST.images()
        begin = state_dict(model)
        parts = split(model)
        apart = {
            "train": jax.jit(partial(apply, parts.train))(parts.params, parts.batch_stats, x),
            "eval": jax.jit(partial(apply, parts.eval))(parts.params, parts.batch_stats, x),
        }
        jitted = nnx.jit(lambda model, x: model(x))
        calls = {"eager": lambda: model(x), "nnx.jit": lambda: jitted(model, x)}
        for how, call in calls.items():
            for mode, (logits, stats) in apart.items():
                load_state_dict(model, begin)
                getattr(model, mode)()
                assert_close(f"{how} {mode} logits", call(), logits, FLOAT64_NETWORK)
                after = {**{k: v for k, v in begin.items() if "running" not in k}, **stats}
                assert_all_close(f"{how} {mode}", state_dict(model), after, FLOAT64_NETWORK)
        assert_all_close("eval", apart["eval"][1], {k: v for k, v in begin.items() if "running" in k}, 0)
        moved = [bool((value != begin[name]).all()) for name, value in apart["train"][1].items()]
    assert moved == [True] * 2 * 3


def test_apply_is_pure() -> None:
    parts = split(SMALLEST.build("float32"))
    params, stats = dict(parts.params), dict(parts.batch_stats)
    before = {name: np.array(value) for name, value in {**params, **stats}.items()}
    x = SMALLEST.images().astype(np.float32)
    first = apply(parts.train, params, stats, x)
    second = apply(parts.train, params, stats, x)
    assert_close("logits", second[0], first[0], 0)
    assert_all_close("statistics", second[1], first[1], 0)
    assert_all_close("what went in", {**params, **stats}, before, 0)
    assert any((first[1][name] != stats[name]).any() for name in stats)


def weighting() -> np.ndarray:
    return np.random.default_rng(2).normal(size=(BATCH, CLASSES))


def flat(state: Any) -> dict[str, np.ndarray]:
    leaves = nnx.to_flat_state(state)
    return {".".join(map(str, path)): to_torch_layout(leaf.get_value()) for path, leaf in leaves}


def test_nnx_grad_works_on_the_model_itself() -> None:
    model = SMALLEST.build("float32")
    x = SMALLEST.images().astype(np.float32)
    gradients = nnx.jit(nnx.grad(lambda model, x: (model(x) * weighting()).sum()))(model, x)
    parts = split(model)

    def loss(params: dict[str, jax.Array]) -> jax.Array:
        return (apply(parts.train, params, parts.batch_stats, x)[0] * weighting()).sum()

    expected = jax.jit(jax.grad(loss))(parts.params)
    assert_all_close(
        "gradient of",
        flat(gradients),
        {name: to_torch_layout(value) for name, value in expected.items()},
        FLOAT32_NETWORK,
    )


# Networks with custom parts


class Calls(nnx.Variable[Any]):
    """Number of calls of a block."""


class CustomBlock(BasicBlock):
    """A block with random streams, a counter and a sown value, which its first call adds."""

    def __init__(self, *arguments: Any, rngs: nnx.Rngs, **options: Any) -> None:
        super().__init__(*arguments, rngs=rngs, **options)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.calls = Calls(jnp.zeros((), jnp.int32))

    def __call__(self, x: jax.Array, keep: jax.Array | None = None) -> jax.Array:
        self.calls.set_value(self.calls.get_value() + 1)
        y = self.dropout(super().__call__(x, keep))
        self.sow(nnx.Intermediate, "sown", y.mean())
        return y


def leaves(state: Any) -> dict[str, np.ndarray]:
    """Arrays in the variables of a state, by name."""
    arrays = {}
    for path, variable in nnx.to_flat_state(state):
        for i, leaf in enumerate(jax.tree.leaves(variable)):
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            name = f"{'.'.join(map(str, path))}[{i}]"
            arrays[name] = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return arrays


@cache
def trained(compiled_blocks: bool, remat: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The losses of two calls in training, the second one's with a gradient, and all state after them."""
    options: dict[str, Any] = {"width": 2, "stem": "small", "remat": remat, "rngs": nnx.Rngs(0, dropout=1)}
    graph, state = nnx.split(ResNet(CustomBlock, (1,), CLASSES, **options))

    def loss(model: Any) -> jax.Array:
        return jnp.square(model(jnp.ones((2, 4, 4, 3)))).sum()

    @quick_jit
    def run(state: Any) -> Any:
        model = nnx.merge(graph, state)
        return (loss(model), nnx.value_and_grad(loss)(model)[0]), nnx.state(model)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using 'Module.sow", DeprecationWarning)
        if not compiled_blocks:
            patch.setattr(resnet, "run_block", lambda block, x, remat, keep: block(x))
        losses, state = run(state)
    return np.array(losses), leaves(state)


@pytest.mark.parametrize("remat", [False, True])
def test_all_state_of_a_custom_block_comes_back(remat: bool) -> None:
    """State and losses equal those of direct calls of the block."""
    losses, state = trained(True, remat)
    expected_losses, expected = trained(False, False)
    assert losses[0] != losses[1], "dropout drew the same mask again"
    assert_close("losses", losses, expected_losses, FLOAT32_NETWORK)
    assert_all_close("state", state, expected, FLOAT32_NETWORK)
    assert state["layer1.0.calls[0]"] == 2
    assert {name for name in state if "sown" in name} == {"layer1.0.sown[0]", "layer1.0.sown[1]"}


def test_what_blocks_sow_is_captured() -> None:
    def run() -> Any:
        model = ResNet(CustomBlock, (1,), CLASSES, width=2, stem="small", rngs=nnx.Rngs(0))
        return nnx.capture(model, nnx.Intermediate)(jnp.ones((2, 4, 4, 3)))[1]

    ((path, variable),) = nnx.to_flat_state(nnx.eval_shape(run))
    assert path == ("layer1", 0, "sown")
    assert [leaf.shape for leaf in jax.tree.leaves(variable)] == [()]


def test_a_custom_block_needs_no_last_norm() -> None:
    class Plain(nnx.Module):
        expansion = 1

        def __init__(self, in_channels: int, width: int, *, rngs: nnx.Rngs, **options: Any) -> None:
            self.conv = nnx.Conv(in_channels, width, (1, 1), rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.conv(x)

    def run() -> Any:
        model = ResNet(Plain, (1,), CLASSES, width=2, stem="small", rngs=nnx.Rngs(0))  # type: ignore[arg-type]
        return model(jnp.ones((2, 4, 4, 3)))

    assert nnx.eval_shape(run).shape == (2, CLASSES)


HEADS: dict[str, Any] = {
    "linear": lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(1)),
    "sequential": lambda: nnx.Sequential(nnx.Linear(4, 3, rngs=nnx.Rngs(1)), nnx.relu),
    "bfloat16": lambda: nnx.Linear(4, 3, dtype=jnp.bfloat16, rngs=nnx.Rngs(1)),
    "identity": nnx.Sequential,
    "function": lambda: nnx.static(nnx.identity),
}


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_head_and_a_new_stem(head: str, x64: bool, dtype: str) -> None:
    """Logits are of the type that the head gives, at least float32; never float64 for the lack of a type."""
    with jax.enable_x64(x64):
        model = nnx.eval_shape(lambda: two_stages(dtype))
        model.fc = HEADS[head]() if head == "function" else nnx.eval_shape(HEADS[head])
        model.conv1 = nnx.eval_shape(lambda: nnx.Conv(3, 2, (3, 3), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
        graph, state = nnx.split(model)
        x = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.uint8)
        logits = jax.eval_shape(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert (logits.shape, logits.dtype) == ((2, 4 if head in ("identity", "function") else 3), jnp.float32)


@pytest.mark.parametrize(
    ("shape", "name"), [((2, 3, 32, 32), "resnet8"), ((2, 3, 32, 32), "cnn"), ((2, 16, 16, 3), "cnn")]
)
def test_an_image_of_the_wrong_layout_or_size_is_refused(shape: tuple[int, ...], name: str) -> None:
    model = abstract(name, CLASSES)
    with pytest.raises(ValueError, match=r"^expected channels last, \[N, .*, got \[2, "):
        model(jnp.zeros(shape))
