"""Models in JAX: any pure function, Flax NNX, Flax Linen.

A model is traced once to a jaxpr, the list of its operations. The operations are then computed one by one,
each with its own VJP (`jax.vjp`), which gives every intermediate value and the gradient with respect to it.
This needs no cooperation of the model, and a value can be replaced between two operations.
Calls, `jit` and `remat` are opened; loops (`scan`, `while`, `cond`) are unrolled. Custom derivatives stay
as the user wrote them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from parity.trace import Array, Inputs, Model, ParityError, Trace, Value

Tree = Any
_MARK = "parity|"  # begins the names that an adapter gives to modules
_SAME = {"convert_element_type", "copy", "copy_p", "broadcast_in_dim", "squeeze", "expand_dims"}
_SAME |= {"stop_gradient", "optimization_barrier", "sharding_constraint", "reduce_precision"}
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", os.path.dirname(__file__))
_PLAIN = (bool, int, float, str, type(None))


@dataclasses.dataclass(eq=False)
class _Cell:
    """A variable of the jaxpr while it is computed."""

    array: Any
    name: str = ""  # of the value or input that it is; "" for what depends on no input
    parameters: frozenset[str] = frozenset()  # from which it is made, if it depends on no input
    wants_gradient: bool = False
    gradient: Any = None


@dataclasses.dataclass
class _Record:
    """A value in the making."""

    cell: _Cell
    fields: dict[str, Any]


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

    def precision(self) -> str:
        """See `Model`."""
        types = Counter(
            str(np.asarray(a).dtype) if not hasattr(a, "dtype") else str(a.dtype)
            for a in self._params.values()
            if _is_float(a)
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
            cast = (lambda a: _cast(a, dtype)) if float64 else jnp.asarray
            args, kwargs = _arguments(inputs, lambda a: _cast(np.asarray(a), dtype))
            params, state = ({k: cast(v) for k, v in tree.items()} for tree in (self._params, self._state))
            jaxpr, out_tree = self._trace(params, state, args, kwargs)
            tape = _Tape(
                float64, cotangents is not None, replace or {}, replace_gradients or {}, self._attributes
            )
            named = _named_inputs(args, kwargs)
            cells = [
                _Cell(a, parameters=frozenset([n]), wants_gradient=_is_float(a)) for n, a in params.items()
            ]
            parameter_cells = dict(zip(params, cells, strict=True))
            cells += [_Cell(a) for a in state.values()]
            input_cells = {name: _Cell(a, name=name, wants_gradient=_is_float(a)) for name, a in named}
            cells += input_cells.values()
            outs = tape.evaluate(jaxpr.jaxpr, [_Cell(c) for c in jaxpr.consts], cells, "")
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
                state={n: _numpy(c.array) for n, c in new_state.items() if _is_float(c.array)},
                state_before={n: _numpy(a) for n, a in state.items() if _is_float(a)},
            )

    def _trace(self, params: Tree, state: Tree, args: Any, kwargs: Any) -> tuple[ClosedJaxpr, Any]:
        """The jaxpr of the model and the structure of its result; kept for the next run."""
        avals = [(a.shape, str(a.dtype)) for a in jax.tree.leaves((params, args, kwargs))]
        key = (str(avals), str(jax.tree.structure((args, kwargs))))
        if key not in self._traced:
            try:
                jaxpr, shape = jax.make_jaxpr(self._apply, return_shape=True)(params, state, args, kwargs)
            except ParityError:
                raise
            except Exception as error:
                fault = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                raise ParityError(f"the JAX model does not run on these inputs: {fault}") from error
            self._traced[key] = jaxpr, jax.tree.structure(shape)
        return self._traced[key]


class _Tape:
    """Computes a jaxpr operation by operation, keeps every value, and goes back through it."""

    def __init__(
        self,
        float64: bool,
        gradients: bool,
        replace: Mapping[str, Array],
        replace_gradients: Mapping[str, Array],
        attributes: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.float64, self.gradients = float64, gradients
        self.replace, self.replace_gradients = replace, replace_gradients
        self.attributes = attributes
        self.records: list[_Record] = []
        self.used: dict[str, None] = {}  # parameters in the order of their first use beside a value
        self._names: Counter[str] = Counter()
        self._steps: list[tuple[list[_Cell], Callable[..., Any], list[_Cell]]] = []
        self._by_cell: dict[int, _Record] = {}
        self._by_name: dict[str, _Record] = {}

    def evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[_Cell], arguments: Sequence[_Cell], scope: str
    ) -> list[_Cell]:
        """Compute a jaxpr; `scope` is the module in which it stands."""
        cells = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(variable: Any) -> _Cell:
            return _Cell(variable.val) if isinstance(variable, Literal) else cells[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            module = _module_of(equation) or scope
            outs = self._inlined(equation, operands, module)
            if outs is None:
                outs = self._operation(equation, operands, module)
            cells.update(zip(equation.outvars, outs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _inlined(self, equation: Any, operands: list[_Cell], module: str) -> list[_Cell] | None:
        """The results of an operation that contains others, which are computed; None for any other."""
        name, params = equation.primitive.name, equation.params
        if name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_lin"):
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            if isinstance(inner, ClosedJaxpr):
                return self.evaluate(inner.jaxpr, [_Cell(c) for c in inner.consts], operands, module)
            if inner is not None:
                return self.evaluate(inner, [], operands, module)
        if name == "cond":
            branch = params["branches"][int(np.clip(int(operands[0].array), 0, len(params["branches"]) - 1))]
            return self.evaluate(branch.jaxpr, [_Cell(c) for c in branch.consts], operands[1:], module)
        if name == "while":
            return self._while(params, operands, module)
        if name == "scan":
            return self._scan(params, operands, module)
        return None

    def _while(self, params: Mapping[str, Any], operands: list[_Cell], module: str) -> list[_Cell]:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test_consts, body_consts, carry = (
            operands[: split[0]],
            operands[split[0] : split[1]],
            operands[split[1] :],
        )
        consts = [[_Cell(c) for c in closed.consts] for closed in (test, body)]
        for _ in range(100_000):
            tried = _Tape(self.float64, False, {}, {}, {})
            if not bool(tried.evaluate(test.jaxpr, consts[0], [*test_consts, *carry], module)[0].array):
                return carry
            carry = self.evaluate(body.jaxpr, consts[1], [*body_consts, *carry], module)
        raise ParityError("the JAX model has a while loop of more than 100,000 steps")

    def _scan(self, params: Mapping[str, Any], operands: list[_Cell], module: str) -> list[_Cell]:
        body, length = params["jaxpr"], params["length"]
        split = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :]
        steps = range(length)[:: -1 if params["reverse"] else 1]
        body_consts = [_Cell(c) for c in body.consts]
        results: dict[int, list[_Cell]] = {}
        for step in steps:
            rows = [self._apply("slice", lambda a, step=step: [a[step]], [x])[0] for x in xs]
            outs = self.evaluate(body.jaxpr, body_consts, [*consts, *carry, *rows], module)
            carry, results[step] = outs[: len(carry)], outs[len(carry) :]
        stacked = [
            self._apply("stack", lambda *a: [jnp.stack(a)], [results[step][k] for step in range(length)])[0]
            for k in range(len(body.jaxpr.outvars) - len(carry))
        ]
        return [*carry, *stacked]

    def _operation(self, equation: Any, operands: list[_Cell], module: str) -> list[_Cell]:
        """Compute one operation and record its result."""
        primitive, params = equation.primitive, dict(equation.params)
        name = primitive.name
        if name == "name" and params["name"].startswith(_MARK):
            self._mark_module(params["name"], operands[0])
            return operands
        if self.float64 and name in ("convert_element_type", "reduce_precision"):
            target = params.get("new_dtype", np.float64)
            if _is_float(operands[0].array) and jnp.issubdtype(target, jnp.floating):
                return [dataclasses.replace(operands[0])] if not self.gradients else operands
            if jnp.issubdtype(target, jnp.floating):
                params["new_dtype"] = np.dtype(np.float64)
        preferred = params.get("preferred_element_type")
        if self.float64 and preferred is not None and jnp.issubdtype(preferred, jnp.floating):
            params["preferred_element_type"] = np.dtype(np.float64)
        bound = primitive.get_bind_params(params)

        def compute(*arrays: Any) -> list[Any]:
            outs = primitive.bind(*arrays, **bound)
            return list(outs) if primitive.multiple_results else [outs]

        outs = self._apply(name, compute, operands, promote=self.float64)
        if name in _SAME:
            for out in outs:
                out.name = next((operand.name for operand in operands if operand.name), "")
            return outs
        read = [operand for operand in operands if operand.name or operand.parameters]
        weights = [p for o in read if not o.name for p in o.parameters]
        for index, out in enumerate(outs):
            if not any(operand.name for operand in operands):
                continue
            self.used.update(dict.fromkeys(weights))
            if _is_float(out.array):
                kind = (
                    name if name not in ("custom_jvp_call", "custom_vjp_call") else _function_name(equation)
                )
                self._record(out, kind, module, read, weights, _where(equation), _plain(params), index)
            else:
                out.name = next(operand.name for operand in operands if operand.name)
        return outs

    def _apply(
        self, name: str, compute: Callable[..., list[Any]], operands: list[_Cell], promote: bool = False
    ) -> list[_Cell]:
        """Compute one operation, with its VJP if gradients are wanted."""
        arrays = [operand.array for operand in operands]
        if promote and any(_is_float(a) and a.dtype == np.float64 for a in arrays if hasattr(a, "dtype")):
            arrays = [_cast(a, np.float64) if _is_float(a) else a for a in arrays]
        parameters = (
            frozenset().union(*(operand.parameters for operand in operands)) if operands else frozenset()
        )
        parameters = frozenset() if any(operand.name for operand in operands) else parameters
        wanted = [i for i, operand in enumerate(operands) if operand.wants_gradient and _is_float(arrays[i])]
        if not (self.gradients and wanted):
            outs = [
                _Cell(out, parameters=parameters, wants_gradient=bool(wanted)) for out in compute(*arrays)
            ]
        else:

            def of_wanted(*floats: Any) -> list[Any]:
                every = list(arrays)
                for i, array in zip(wanted, floats, strict=True):
                    every[i] = array
                return compute(*every)

            results, pullback = jax.vjp(of_wanted, *(arrays[i] for i in wanted))
            outs = [_Cell(out, parameters=parameters, wants_gradient=_is_float(out)) for out in results]
            self._steps.append(([operands[i] for i in wanted], pullback, outs))
        if name in ("slice", "stack") and outs and any(operand.name for operand in operands):
            for out in outs:
                out.name = next(operand.name for operand in operands if operand.name)
        return outs

    def _record(
        self,
        cell: _Cell,
        operation: str,
        module: str,
        read: Sequence[_Cell],
        weights: Sequence[str],
        where: str,
        attributes: Mapping[str, Any],
        index: int,
    ) -> None:
        cell.name = self._unique(".".join(part for part in (module, operation) if part))
        fields = {
            "name": cell.name,
            "operation": operation,
            "inputs": tuple(dict.fromkeys(c.name for c in read if c.name)),
            "parameters": tuple(dict.fromkeys(weights)),
            "module": module,
            "where": where,
            "attributes": dict(attributes),
            "array": cell.array,
        }
        record = _Record(cell, fields)
        self.records.append(record)
        self._by_cell[id(cell)] = self._by_name[cell.name] = record
        self._replace(cell)

    def _replace(self, cell: _Cell) -> None:
        if cell.name in self.replace:
            cell.array = jnp.asarray(self.replace[cell.name], cell.array.dtype)

    def _mark_module(self, mark: str, cell: _Cell) -> None:
        """Give the value that a module returns the name of the module."""
        _, path, kind = mark.split("|")
        record = self._by_name.get(cell.name)
        if record is None or record.fields.get("is_module"):
            return
        inner = record.fields
        name = self._unique(path or kind)
        if name in self.replace:
            cell.array = jnp.asarray(self.replace[name], cell.array.dtype)
        inside = [r.fields for r in self.records if _within(r.fields["module"], path)] if path else []
        inner.update(
            name=name,
            is_module=True,
            operation=kind,
            module=path,
            parameters=tuple(dict.fromkeys(itertools.chain.from_iterable(f["parameters"] for f in inside)))
            or inner["parameters"],
            attributes={**inner["attributes"], **self.attributes.get(path, {})},
        )
        record.cell.name = cell.name = name
        self._by_name[name] = record

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        return name if self._names[name] == 1 else f"{name}.{self._names[name]}"

    def backward(self) -> None:
        """Go through the operations from the last to the first and add up the gradients."""
        for operands, pullback, outs in reversed(self._steps):
            given = [
                self.replace_gradients.get(out.name) if id(out) in self._by_cell else None for out in outs
            ]
            if all(out.gradient is None and array is None for out, array in zip(outs, given, strict=True)):
                continue
            cotangents = []
            for out, array in zip(outs, given, strict=True):
                gradient = out.gradient if array is None else jnp.asarray(array, out.array.dtype)
                if not _is_float(out.array):
                    gradient = np.zeros(out.array.shape, jax.dtypes.float0)
                elif gradient is None:
                    gradient = jnp.zeros(out.array.shape, out.array.dtype)
                cotangents.append(gradient)
            for operand, gradient in zip(operands, pullback(cotangents), strict=True):
                gradient = gradient.astype(operand.array.dtype)
                operand.gradient = gradient if operand.gradient is None else operand.gradient + gradient


def jax_model(f: Callable[..., Any], params: Tree, state: Tree = None) -> Model:
    """A pure function f(params, *inputs) -> output, or f(params, state, *inputs) -> (output, state).

    Args:
        f: any function of JAX; a Haiku or Equinox model in that form. A dictionary of inputs is passed by
            keyword.
        params: a tree of arrays, differentiated.
        state: a tree of arrays, such as running statistics.

    Example:
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
        attributes.update({paths[key]: _plain(vars(part)) for key, part in parts.items()})
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
        attributes[path] = _plain(vars(part))
        with jax.named_scope(f"{_MARK}{path}"):
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
            with jax.named_scope(f"{_MARK}{path}"):
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
        return checkpoint_name(leaf, f"{_MARK}{path}|{kind}") if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(mark, output)


def _module_of(equation: Any) -> str:
    """The innermost marked module in which an operation stands."""
    marks = [part for part in str(equation.source_info.name_stack).split("/") if _MARK in part]
    return marks[-1].partition(_MARK)[2].rstrip(")") if marks else ""


def _where(equation: Any) -> str:
    """File and line of the user's own code that made an operation."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not any(library in frame.file_name for library in _LIBRARIES) and not frame.file_name.startswith(
            "<"
        ):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


def _function_name(equation: Any) -> str:
    """The name of a function with derivatives of its own: relu, silu, ..."""
    inner = equation.params.get("call_jaxpr")
    name = getattr(getattr(getattr(inner, "jaxpr", inner), "debug_info", None), "func_name", "")
    return str(name) or equation.primitive.name


def _plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, words and shapes among attributes."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, _PLAIN) or (isinstance(value, tuple | list) and all(map(is_plain, value)))

    return {k: v for k, v in attributes.items() if not k.startswith("_") and is_plain(v)}


def _within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _flat(tree: Tree) -> tuple[dict[str, Any], Any]:
    """The arrays of a tree by dotted name, and its structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [_dotted(path) for path, _ in leaves]
    return {name or "value": leaf for name, (_, leaf) in zip(names, leaves, strict=True)}, structure


def _dotted(path: Sequence[Any]) -> str:
    words = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))).strip(".") for k in path]
    return ".".join(word for word in words if word not in ("value", "raw_value"))


def _arguments(inputs: Inputs, convert: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), {name: convert(array) for name, array in inputs.items()}
    if isinstance(inputs, tuple | list):
        return tuple(convert(array) for array in inputs), {}
    return (convert(inputs),), {}


def _named_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The inputs by name, in the order of the jaxpr's arguments."""
    names = ["input"] if len(args) == 1 and not kwargs else [f"input.{i}" for i in range(len(args))]
    return [*zip(names, args, strict=True), *((f"input.{k}", kwargs[k]) for k in sorted(kwargs))]


def _named_outputs(output: Tree) -> dict[str, _Cell]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(output, is_leaf=lambda leaf: isinstance(leaf, _Cell))
    cells = {".".join(filter(None, ("output", _dotted(path)))): cell for path, cell in leaves}
    return {name: cell for name, cell in cells.items() if _is_float(cell.array)}


def _is_float(array: Any) -> bool:
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return isinstance(array, float)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def _cast(array: Any, dtype: Any) -> Any:
    """A floating-point array in another precision; any other array as it is."""
    return (
        jnp.asarray(array, dtype) if _is_float(array) else jnp.asarray(array) if not _is_key(array) else array
    )


def _is_key(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _numpy(array: Any) -> Array:
    """A NumPy array of its own; bfloat16 as float32."""
    own: Array = np.array(array)
    return own if own.dtype in (np.float32, np.float64, np.float16) else own.astype(np.float32)


def _gradient(cell: _Cell) -> Array:
    return np.zeros(cell.array.shape) if cell.gradient is None else _numpy(cell.gradient)


def _value(record: _Record, gradients: bool) -> Value:
    fields = dict(record.fields)
    array = _numpy(fields.pop("array"))
    gradient = record.cell.gradient
    return Value(
        value=array, gradient=None if gradient is None or not gradients else _numpy(gradient), **fields
    )
