"""Models in JAX: any pure function, Flax NNX, Flax Linen.

A model is traced once to a jaxpr, the list of its operations. The operations are then computed one by one,
each with its own VJP (`jax.vjp`), which gives every intermediate value and the gradient with respect to it.
This needs no cooperation of the model, and a value can be replaced between two operations.
Calls, `jit` and `remat` are opened; loops (`scan`, `while`, `cond`) are unrolled. Custom derivatives stay
as the user wrote them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr

from parity.jax_tape import MARK, Cell, Operation, Record, Tape, cast_to, is_float, plain
from parity.nesting import arguments, named_arguments
from parity.trace import Array, Inputs, Model, ParityError, Trace, Value

Tree = Any


class JaxModel(Model):
    """A pure function f(params, state, *inputs) -> (output, state). See `jax_model`."""

    framework = "jax"

    def __init__(
        self,
        apply: Callable[..., tuple[Tree, Tree]],
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        attributes: dict[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """
        Args:
            apply: f(params, state, inputs as args, inputs as kwargs) -> (output, flat state).
            params: arrays by name.
            state: arrays by name.
            attributes: plain attributes of modules by path, filled while `apply` is traced.
        """
        self._apply, self._params, self._state = apply, dict(params), dict(state)
        self._attributes = {} if attributes is None else attributes
        self._traced: dict[Any, tuple[ClosedJaxpr, Any]] = {}
        self._compiled: dict[Any, Operation] = {}
        self._cast: dict[bool, tuple[dict[str, Any], ...]] = {}  # parameters and state, by `float64`

    def precision(self) -> str:
        """See `Model`."""
        types = Counter(
            str(np.asarray(a).dtype) if not hasattr(a, "dtype") else str(a.dtype)
            for a in self._params.values()
            if is_float(a)
        )
        return types.most_common(1)[0][0] if types else "float32"

    def run(
        self,
        inputs: Inputs,
        *,
        float64: bool = False,
        cotangents: Mapping[str, Array] | None = None,
        replace: Mapping[str, Array] | None = None,
        replace_gradients: Mapping[str, Array] | None = None,
    ) -> Trace:
        """See `Model`."""
        wide = float64 or self.precision() == "float64"
        dtype = jnp.float64 if float64 else jnp.dtype(self.precision())
        with jax.enable_x64(wide):
            args, kwargs = arguments(inputs, lambda a: cast_to(np.asarray(a), dtype))
            if float64 not in self._cast:
                trees = self._params, self._state
                self._cast[float64] = tuple(
                    {k: _given(v, dtype if float64 else None) for k, v in tree.items()} for tree in trees
                )
            params, state = self._cast[float64]
            jaxpr, out_tree = self._trace(params, state, args, kwargs, float64)
            tape = Tape(
                float64,
                cotangents is not None,
                replace or {},
                replace_gradients or {},
                self._attributes,
                self._compiled,
            )
            named = named_arguments(args, dict(sorted(kwargs.items())))  # the order of the jaxpr
            cells = [
                Cell(a, parameters=frozenset([n]), wants_gradient=is_float(a)) for n, a in params.items()
            ]
            parameter_cells = dict(zip(params, cells, strict=True))
            cells += [Cell(a) for a in state.values()]
            input_cells = {name: Cell(a, name=name, wants_gradient=is_float(a)) for name, a in named.items()}
            cells += input_cells.values()
            outs = tape.evaluate(jaxpr.jaxpr, [Cell(c) for c in jaxpr.consts], cells, "")
            _drop_common_line(tape.records)
            output, new_state = jax.tree.unflatten(out_tree, outs)
            outputs = _named_outputs(output)
            if cotangents is not None:
                for name, cell in outputs.items():
                    cell_gradient = jnp.asarray(cotangents[name], cell.array.dtype)
                    cell.gradient = cell_gradient if cell.gradient is None else cell.gradient + cell_gradient
                tape.backward()
            floats = {name: cell for name, cell in input_cells.items() if cell.wants_gradient}
            order = [name for name in tape.used if name in parameter_cells]
            order += [name for name in parameter_cells if name not in tape.used]
            with_gradients = cotangents is not None
            return Trace(
                values=[_value(record, with_gradients) for record in tape.records],
                outputs={name: _numpy(cell.array) for name, cell in outputs.items()},
                output_values={
                    name: cell.name if cell.name not in input_cells else "" for name, cell in outputs.items()
                },
                inputs={name: _numpy(cell.array) for name, cell in floats.items()},
                input_gradients={n: _gradient(c) for n, c in floats.items()} if with_gradients else {},
                parameters={name: _numpy(parameter_cells[name].array) for name in order},
                parameter_gradients={
                    name: _gradient(parameter_cells[name])
                    for name in order
                    if with_gradients and parameter_cells[name].wants_gradient
                },
                state={n: _numpy(c.array) for n, c in new_state.items() if is_float(c.array)},
                state_before={n: _numpy(a) for n, a in state.items() if is_float(a)},
            )

    def _trace(
        self, params: Tree, state: Tree, args: Any, kwargs: Any, float64: bool
    ) -> tuple[ClosedJaxpr, Any]:
        """The jaxpr of the model and the structure of its result; kept for the next run."""
        avals = [(a.shape, str(a.dtype)) for a in jax.tree.leaves((params, args, kwargs))]
        key = (str(avals), str(jax.tree.structure((args, kwargs))))

        def apply(params: list[Any], state: list[Any], args: Any, kwargs: Any) -> tuple[Tree, Tree]:
            # Lists, since JAX sorts a dictionary by its keys.
            named = (
                dict(zip(names, arrays, strict=True))
                for names, arrays in zip(names_of, (params, state), strict=True)
            )
            return self._apply(*named, args, kwargs)

        names_of = list(params), list(state)
        arrays = list(params.values()), list(state.values())
        if key not in self._traced:
            try:
                jaxpr, shape = jax.make_jaxpr(apply, return_shape=True)(*arrays, args, kwargs)
            except ParityError:
                raise
            except Exception as error:
                fault = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                twin = " in float64, in which it is compared" if float64 else ""
                raise ParityError(f"the JAX model does not run on these inputs{twin}: {fault}") from error
            self._traced[key] = jaxpr, jax.tree.structure(shape)
        return self._traced[key]


def jax_model(f: Callable[..., Any], params: Tree, state: Tree = None) -> Model:
    """A pure function f(params, *inputs) -> output, or f(params, state, *inputs) -> (output, state).

    Args:
        f: any function of JAX; a Haiku or Equinox model in that form. A dictionary of inputs is passed by
            keyword.
        params: a tree of arrays, differentiated.
        state: a tree of arrays, such as running statistics.

    Examples:
        >>> parity.jax_model(lambda params, x: x @ params["w"], {"w": np.ones((3, 2), np.float32)})
    """
    leaves, structure = _flat(params)
    state_leaves, state_structure = _flat(state)

    def apply(flat: Any, flat_state: Any, args: Any, kwargs: Any) -> tuple[Tree, Tree]:
        tree = jax.tree.unflatten(structure, list(flat.values()))
        if state is None:
            return f(tree, *args, **kwargs), {}
        output, after = f(
            tree, jax.tree.unflatten(state_structure, list(flat_state.values())), *args, **kwargs
        )
        return output, _flat(after)[0]

    return JaxModel(apply, leaves, state_leaves)


def nnx_model(module: Any, **kwargs: Any) -> Model:
    """A Flax NNX module, in the mode (`train()`, `eval()`) in which it is.

    Args:
        module: an `nnx.Module`. It is not changed: a copy is run.
        kwargs: further arguments of its `__call__`.
    """
    from flax import nnx

    for path, part in nnx.iter_modules(module):
        if isinstance(part, nnx.Dropout) and part.rate > 0 and not part.deterministic:
            raise ParityError(
                f"{_dotted(path) or 'the model'} is a Dropout that is active: two models draw other numbers. "
                "Call model.eval(), or set its rate to 0 and keep train mode"
            )
    graph, *states = nnx.split(module, nnx.Param, ...)
    params, rest = states
    flat_params, params_structure = _flat(params)
    flat_rest, rest_structure = _flat(rest)
    attributes: dict[str, Mapping[str, Any]] = {}

    def apply(flat: Any, flat_state: Any, args: Any, inputs: Any) -> tuple[Tree, Tree]:
        model = nnx.merge(
            graph,
            jax.tree.unflatten(params_structure, list(flat.values())),
            jax.tree.unflatten(rest_structure, list(flat_state.values())),
        )
        paths = {id(part): _dotted(path) for path, part in nnx.iter_modules(model)}
        parts = {id(part): part for _, part in nnx.iter_modules(model)}
        attributes.update({paths[key]: plain(vars(part)) for key, part in parts.items()})
        with _wrapped({type(part) for part in parts.values()}, paths):
            output = model(*args, **inputs, **kwargs)
        return output, _flat(nnx.state(model, nnx.Not(nnx.Param)))[0]

    return JaxModel(apply, flat_params, flat_rest, attributes)


def linen_model(module: Any, variables: Mapping[str, Any], **kwargs: Any) -> Model:
    """A Flax Linen module with its variables.

    Args:
        module: a `flax.linen.Module`.
        variables: {"params": ..., "batch_stats": ..., ...}. All but "params" are state that may change.
        kwargs: further arguments of its `__call__`, such as train=True or deterministic=True.
    """
    import flax.linen as nn

    params, state = variables.get("params", {}), {k: v for k, v in variables.items() if k != "params"}
    attributes: dict[str, Mapping[str, Any]] = {}

    def intercept(call: Callable[..., Any], args: Any, inputs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return call(*args, **inputs)
        part, path = context.module, ".".join(context.module.path)
        attributes[path] = plain(vars(part))
        with jax.named_scope(f"{MARK}{path}"):
            return _marked(call(*args, **inputs), path, type(part).__name__)

    def f(params: Any, state: Any, *args: Any, **inputs: Any) -> Any:
        with nn.intercept_methods(intercept):
            return module.apply({"params": params, **state}, *args, mutable=list(state), **inputs, **kwargs)

    model = jax_model(f, params, state)
    assert isinstance(model, JaxModel)
    model._attributes = attributes
    return model


@contextlib.contextmanager
def _wrapped(types: set[type], paths: Mapping[int, str]) -> Iterator[None]:
    """Context in which the modules of a model name the values that they return."""
    called = [kind for kind in types if any("__call__" in vars(base) for base in kind.__mro__[:-1])]
    originals = {kind: vars(kind).get("__call__") for kind in called}

    def wrap(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
            if id(self) not in paths:
                return call(self, *args, **kwargs)
            path = paths[id(self)]
            with jax.named_scope(f"{MARK}{path}"):
                return _marked(call(self, *args, **kwargs), path, type(self).__name__)

        return wrapper

    try:
        for kind in originals:
            setattr(kind, "__call__", wrap(getattr(kind, "__call__")))  # noqa: B004, B009, B010
        yield
    finally:
        for kind, original in originals.items():
            if original is None:
                delattr(kind, "__call__")
            else:
                setattr(kind, "__call__", original)  # noqa: B010


def _marked(output: Tree, path: str, kind: str) -> Tree:
    """The output of a module, each of its arrays marked with the module's path."""

    def mark(leaf: Any) -> Any:
        return checkpoint_name(leaf, f"{MARK}{path}|{kind}") if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(mark, output)


def _flat(tree: Tree) -> tuple[dict[str, Any], Any]:
    """The arrays of a tree by dotted name, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_dotted(path) for path, _ in leaves]
    if len(set(names)) < len(names):
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
    return {name or "value": leaf for name, (_, leaf) in zip(names, leaves, strict=True)}, structure


def _dotted(path: Sequence[Any]) -> str:
    words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))).strip(".") for k in path]
    if len(words) > 1 and words[-1] in ("value", "raw_value"):  # the leaf of an NNX variable
        words = words[:-1]
    return ".".join(word for word in words if word)


def _named_outputs(output: Tree) -> dict[str, Cell]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(output, is_leaf=lambda leaf: isinstance(leaf, Cell))
    cells = {".".join(filter(None, ("output", _dotted(path)))): cell for path, cell in leaves}
    return {name: cell for name, cell in cells.items() if is_float(cell.array)}


def _given(array: Any, dtype: Any) -> Any:
    """A parameter or state as a JAX array; floating-point numbers in `dtype`, if that is not None.

    An integer that was made from a Python integer is that again: where float64 is enabled it is an int64.
    """
    if getattr(array, "weak_type", False) and array.shape == () and array.dtype.kind == "i":
        array = int(array)
    return jnp.asarray(array) if dtype is None else cast_to(array, dtype)


def _drop_common_line(records: Sequence[Record]) -> None:
    """Remove the user's line if all modules have the same one: it calls a library's model, no stage of it."""
    fields = [record.fields for record in records]
    modules = {field["module"] for field in fields if field["module"]}
    if len(modules) > 1 and len({field["where"] for field in fields if field["where"]}) == 1:
        for field in fields:
            field["where"] = ""


def _numpy(array: Any) -> Array:
    """A NumPy array of its own; bfloat16 as float32."""
    own: Array = np.asarray(array)  # without a copy: JAX never changes an array
    return own if own.dtype in (np.float32, np.float64, np.float16) else own.astype(np.float32)


def _gradient(cell: Cell) -> Array:
    return np.zeros(cell.array.shape) if cell.gradient is None else _numpy(cell.gradient)


def _value(record: Record, gradients: bool) -> Value:
    fields = dict(record.fields)
    array = _numpy(fields.pop("array"))
    gradient = record.cell.gradient
    return Value(
        value=array, gradient=None if gradient is None or not gradients else _numpy(gradient), **fields
    )
