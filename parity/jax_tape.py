"""The operations of a jaxpr computed one by one, forward and backward, with every value kept."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from parity.nesting import is_plain
from parity.trace import Array, ParityError

MARK = "parity|"
"""Begins the names that an adapter gives to modules, in `checkpoint_name` and `named_scope`."""

_SAME = {"convert_element_type", "copy", "copy_p", "broadcast_in_dim", "squeeze", "expand_dims"}
_SAME |= {"stop_gradient", "optimization_barrier", "sharding_constraint", "reduce_precision"}
_LIBRARIES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}", os.path.dirname(__file__))


@dataclasses.dataclass(eq=False)
class Cell:
    """A variable of the jaxpr while it is computed."""

    array: Any
    name: str = ""  # of the value or input that it is; "" for what depends on no input
    parameters: frozenset[str] = frozenset()  # from which it is made, if it depends on no input
    wants_gradient: bool = False
    gradient: Any = None
    rounded: str = ""  # the lower precision that the model rounds it to, where the twin does not


@dataclasses.dataclass
class Record:
    """A value in the making."""

    cell: Cell
    fields: dict[str, Any]


_COMPILED: dict[Any, Operation] = {}  # of all models: JAX keeps what it compiles for the same key


class Operation:
    """One operation and its VJP, compiled once for all runs.

    An operation with a function inside is not compiled in float64: that function has the model's types.

    Attributes:
        forward: takes the operands, returns the results.
        backward: takes the operands and the gradients of the floating-point results, returns the gradients
            of the operands `wanted`.
    """

    def __init__(self, compute: Callable[..., list[Any]], wanted: Sequence[int], compiled: bool) -> None:
        def backward(arrays: Sequence[Any], cotangents: Sequence[Any]) -> Any:
            def of_wanted(*floats: Any) -> list[Any]:
                every = list(arrays)
                for i, array in zip(wanted, floats, strict=True):
                    every[i] = array
                return [out for out in compute(*every) if is_float(out)]

            return jax.vjp(of_wanted, *(arrays[i] for i in wanted))[1](list(cotangents))

        jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # quick to compile
        self.forward = jit(compute) if compiled else compute
        self.backward = jit(backward) if compiled else backward


class Tape:
    """Computes a jaxpr operation by operation, keeps every value, and goes back through it."""

    def __init__(
        self,
        float64: bool,
        gradients: bool,
        replace: Mapping[str, Array],
        replace_gradients: Mapping[str, Array],
        attributes: Mapping[str, Mapping[str, Any]],
        compiled: dict[Any, Operation],
    ) -> None:
        """
        Args:
            float64: casts to another floating type become casts to float64.
            gradients: prepare for `backward`.
            replace, replace_gradients: see `Model.run`.
            attributes: of modules, by path.
            compiled: operations with functions inside, such as custom derivatives, from earlier runs.
        """
        self.compiled = compiled
        self.float64, self.gradients = float64, gradients
        self.replace, self.replace_gradients = replace, replace_gradients
        self.attributes = attributes
        self.records: list[Record] = []
        self.used: dict[str, None] = {}  # parameters in the order of their first use beside a value
        self._names: Counter[str] = Counter()
        self._steps: list[tuple[Operation, list[Any], list[Cell], list[Cell]]] = []
        self._by_cell: dict[int, Record] = {}
        self._by_name: dict[str, Record] = {}

    def evaluate(
        self, jaxpr: Jaxpr, consts: Sequence[Cell], arguments: Sequence[Cell], scope: str
    ) -> list[Cell]:
        """Compute a jaxpr; `scope` is the module in which it stands."""
        cells = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *arguments], strict=True))

        def read(variable: Any) -> Cell:
            return Cell(variable.val) if isinstance(variable, Literal) else cells[variable]

        for equation in jaxpr.eqns:
            operands = [read(variable) for variable in equation.invars]
            module = _module_of(equation, scope)
            outs = self._inlined(equation, operands, module)
            if outs is None:
                outs = self._operation(equation, operands, module)
            cells.update(zip(equation.outvars, outs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _inlined(self, equation: Any, operands: list[Cell], module: str) -> list[Cell] | None:
        """The results of an operation that contains others, which are computed; None for any other."""
        name, params = equation.primitive.name, equation.params
        if name in ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2", "custom_lin"):
            inner = params.get("jaxpr", params.get("call_jaxpr"))
            if isinstance(inner, ClosedJaxpr):
                return self.evaluate(inner.jaxpr, [Cell(c) for c in inner.consts], operands, module)
            if inner is not None:
                return self.evaluate(inner, [], operands, module)
        if name == "cond":
            branch = params["branches"][int(np.clip(int(operands[0].array), 0, len(params["branches"]) - 1))]
            return self.evaluate(branch.jaxpr, [Cell(c) for c in branch.consts], operands[1:], module)
        if name == "while":
            return self._while(params, operands, module)
        if name == "scan":
            return self._scan(params, operands, module)
        return None

    def _while(self, params: Mapping[str, Any], operands: list[Cell], module: str) -> list[Cell]:
        test, body = params["cond_jaxpr"], params["body_jaxpr"]
        split = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        test_consts, body_consts, carry = (
            operands[: split[0]],
            operands[split[0] : split[1]],
            operands[split[1] :],
        )
        consts = [[Cell(c) for c in closed.consts] for closed in (test, body)]
        for _ in range(100_000):
            tried = Tape(self.float64, False, {}, {}, {}, self.compiled)
            if not bool(tried.evaluate(test.jaxpr, consts[0], [*test_consts, *carry], module)[0].array):
                return carry
            carry = self.evaluate(body.jaxpr, consts[1], [*body_consts, *carry], module)
        raise ParityError("the JAX model has a while loop of more than 100,000 steps")

    def _scan(self, params: Mapping[str, Any], operands: list[Cell], module: str) -> list[Cell]:
        body, length = params["jaxpr"], params["length"]
        split = params["num_consts"], params["num_consts"] + params["num_carry"]
        consts, carry, xs = operands[: split[0]], operands[split[0] : split[1]], operands[split[1] :]
        steps = range(length)[:: -1 if params["reverse"] else 1]
        body_consts = [Cell(c) for c in body.consts]
        results: dict[int, list[Cell]] = {}
        for step in steps:
            rows = [self._apply("slice", lambda a, step=step: [a[step]], [x], (step,))[0] for x in xs]
            outs = self.evaluate(body.jaxpr, body_consts, [*consts, *carry, *rows], module)
            carry, results[step] = outs[: len(carry)], outs[len(carry) :]
        stacked = [
            self._apply("stack", lambda *a: [jnp.stack(a)], [results[step][k] for step in range(length)])[0]
            for k in range(len(body.jaxpr.outvars) - len(carry))
        ]
        return [*carry, *stacked]

    def _operation(self, equation: Any, operands: list[Cell], module: str) -> list[Cell]:
        """Compute one operation and record its result."""
        primitive, params = equation.primitive, dict(equation.params)
        name = primitive.name
        if name == "name" and params["name"].startswith(MARK):
            self._mark_module(params["name"], operands[0])
            return operands
        if self.float64 and name in ("convert_element_type", "reduce_precision"):
            target = params.get("new_dtype", np.float64)
            if is_float(operands[0].array) and jnp.issubdtype(target, jnp.floating):
                cell = operands[0] if self.gradients else dataclasses.replace(operands[0])
                cell.rounded = _lower_precision(params) or cell.rounded
                return [cell]
            if jnp.issubdtype(target, jnp.floating):
                params["new_dtype"] = np.dtype(np.float64)
        preferred = params.get("preferred_element_type")
        if self.float64 and preferred is not None and jnp.issubdtype(preferred, jnp.floating):
            params["preferred_element_type"] = np.dtype(np.float64)
        bound = primitive.get_bind_params(params)

        def compute(*arrays: Any) -> list[Any]:
            outs = primitive.bind(*arrays, **bound)
            return list(outs) if primitive.multiple_results else [outs]

        if self.float64 and isinstance(params.get("call_jaxpr"), ClosedJaxpr):
            compute = _widened(_function_name(equation), params["call_jaxpr"].in_avals, compute)
        inner = "call_jaxpr" in params or "jaxpr" in params
        key = id(equation) if inner else tuple(sorted(params.items()))
        outs = self._apply(name, compute, operands, key, promote=self.float64)
        if name in _SAME:
            for out in outs:
                out.name = next((operand.name for operand in operands if operand.name), "")
                out.rounded = next((operand.rounded for operand in operands if operand.rounded), "")
            return outs
        read = [operand for operand in operands if operand.name or operand.parameters]
        weights = [p for o in read if not o.name for p in o.parameters]
        for index, out in enumerate(outs):
            if not any(operand.name for operand in operands):
                continue
            self.used.update(dict.fromkeys(weights))
            if is_float(out.array):
                custom = name in ("custom_jvp_call", "custom_vjp_call")
                kind = _function_name(equation) if custom else name
                attributes = plain(params)
                if any(operand.rounded for operand in read):
                    attributes["rounded"] = sorted({o.rounded for o in read if o.rounded})
                if custom and (name == "custom_vjp_call" or not hasattr(jax.nn, kind)):  # not jax.nn.relu
                    attributes["custom_derivative"] = True
                self._record(out, kind, module, read, weights, _where(equation), attributes, index)
            else:
                out.name = next(operand.name for operand in operands if operand.name)
        return outs

    def _apply(
        self,
        name: str,
        compute: Callable[..., list[Any]],
        operands: list[Cell],
        key: Any = None,
        promote: bool = False,
    ) -> list[Cell]:
        """Compute one operation; `key` tells it from others of its name."""
        arrays = [operand.array for operand in operands]
        if promote and any(is_float(a) and a.dtype == np.float64 for a in arrays if hasattr(a, "dtype")):
            arrays = [cast_to(a, np.float64) if is_float(a) else a for a in arrays]
        parameters = (
            frozenset().union(*(operand.parameters for operand in operands)) if operands else frozenset()
        )
        parameters = frozenset() if any(operand.name for operand in operands) else parameters
        wanted = [i for i, operand in enumerate(operands) if operand.wants_gradient and is_float(arrays[i])]
        inner = isinstance(key, int)
        full_key = name, key, len(arrays), tuple(wanted), self.float64 and inner
        cache = self.compiled if inner else _COMPILED
        if full_key not in cache:
            cache[full_key] = Operation(compute, wanted, compiled=not (inner and self.float64))
        operation = cache[full_key]
        results = operation.forward(*arrays)
        if not (self.gradients and wanted):
            outs = [Cell(out, parameters=parameters, wants_gradient=bool(wanted)) for out in results]
        else:
            outs = [Cell(out, parameters=parameters, wants_gradient=is_float(out)) for out in results]
            self._steps.append((operation, arrays, [operands[i] for i in wanted], outs))
        if name in ("slice", "stack") and outs and any(operand.name for operand in operands):
            for out in outs:
                out.name = next(operand.name for operand in operands if operand.name)
        return outs

    def _record(
        self,
        cell: Cell,
        operation: str,
        module: str,
        read: Sequence[Cell],
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
        record = Record(cell, fields)
        self.records.append(record)
        self._by_cell[id(cell)] = self._by_name[cell.name] = record
        self._replace(cell)

    def _replace(self, cell: Cell) -> None:
        if cell.name in self.replace:
            cell.array = jnp.asarray(self.replace[cell.name], cell.array.dtype)

    def _mark_module(self, mark: str, cell: Cell) -> None:
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
        for operation, arrays, operands, outs in reversed(self._steps):
            outs = [out for out in outs if is_float(out.array)]
            given = [
                self.replace_gradients.get(out.name) if id(out) in self._by_cell else None for out in outs
            ]
            if all(out.gradient is None and array is None for out, array in zip(outs, given, strict=True)):
                continue
            cotangents = []
            for out, array in zip(outs, given, strict=True):
                gradient = out.gradient if array is None else jnp.asarray(array, out.array.dtype)
                if gradient is None:
                    gradient = jnp.zeros(out.array.shape, out.array.dtype)
                cotangents.append(gradient)
            for operand, gradient in zip(operands, operation.backward(arrays, cotangents), strict=True):
                gradient = gradient.astype(operand.array.dtype)
                operand.gradient = gradient if operand.gradient is None else operand.gradient + gradient


def _module_of(equation: Any, scope: str) -> str:
    """The module in which an operation stands: the innermost marked one, else the path of named scopes.

    Libraries name their modules with `jax.named_scope`. `scope` is the module of the function that holds the
    operation.
    """
    parts = str(equation.source_info.name_stack).split("/")
    marks = [part for part in parts if MARK in part]
    if marks:
        return marks[-1].partition(MARK)[2].rstrip(")") or scope
    found = (re.fullmatch(r"(?:\w+\()*([\w.-]*)\)*", part) for part in parts)  # jvp(name)
    names = [match[1] for match in found if match is not None]
    return ".".join(name for name in (scope, *names) if name)


def _where(equation: Any) -> str:
    """File and line of the user's own code that made an operation."""
    traceback = equation.source_info.traceback
    for frame in traceback.frames if traceback is not None else ():
        if not any(library in frame.file_name for library in _LIBRARIES) and not frame.file_name.startswith(
            "<"
        ):
            return f"{os.path.basename(frame.file_name)}:{frame.line_num}"
    return ""


def _lower_precision(params: Mapping[str, Any]) -> str:
    """The precision that a conversion or `reduce_precision` rounds to; "" for float32 and above."""
    if "mantissa_bits" in params:
        bits = {(8, 10): "TF32", (5, 10): "float16", (8, 7): "bfloat16"}
        return bits.get((params["exponent_bits"], params["mantissa_bits"]), "")
    name = str(np.dtype(params["new_dtype"]))
    return name if name in ("float16", "bfloat16") else ""


def _function_name(equation: Any) -> str:
    """The name of a function with derivatives of its own: relu, silu, ..."""
    inner = equation.params.get("call_jaxpr")
    name = getattr(getattr(getattr(inner, "jaxpr", inner), "debug_info", None), "func_name", "")
    return str(name) or equation.primitive.name


def _widened(name: str, avals: Sequence[Any], compute: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    """A function with its own derivatives and fixed types, made to accept float64 operands.

    Those of `jax.nn`, such as `relu`, are called again in float64; any other computes in its own type.
    """

    def widened(*arrays: Any) -> list[Any]:
        if all(array.dtype == aval.dtype for array, aval in zip(arrays, avals, strict=True)):
            return compute(*arrays)
        if hasattr(jax.nn, name) and len(arrays) == 1:
            return [getattr(jax.nn, name)(*arrays)]
        outs = compute(*(cast_to(a, aval.dtype) for a, aval in zip(arrays, avals, strict=True)))
        return [cast_to(out, np.float64) for out in outs]

    return widened


def plain(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers, words and shapes among attributes."""
    return {k: v for k, v in attributes.items() if not k.startswith("_") and is_plain(v)}


def _within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def is_float(array: Any) -> bool:
    """True for floating-point arrays and Python floats."""
    dtype = getattr(array, "dtype", None)
    if dtype is None:
        return isinstance(array, float)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def cast_to(array: Any, dtype: Any) -> Any:
    """A floating-point array in another precision; any other array as it is."""
    return (
        jnp.asarray(array, dtype) if is_float(array) else jnp.asarray(array) if not _is_key(array) else array
    )


def _is_key(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
