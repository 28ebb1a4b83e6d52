"""Layers whose weight another module computes with, instead of calling the layer.

`F.linear(x, self.qkv.weight, bias)`, as timm's BEiT and EVA have it, would get the empty weight of a quantised layer.
Such code is found by reading the source of each module's class, without the branches that the module's own settings
rule out.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

from torch import nn

# What the name of a function ends in that multiplies by a weight.
_PRODUCTS = ("linear", "matmul", "mm", "mv", "einsum", "embedding")
# Methods of a module that run once, before there are codes.
_SETUP = ("__init__", "init_weights", "_init_weights", "reset_parameters", "fix_init_weight")
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the children whose weight their parent computes with, and the name of the parent's class."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for name in _read_children(parent):
            child = parent._modules.get(name)
            if child is not None:
                found[child] = type(parent).__name__
    return found


def _read_children(module: nn.Module) -> Iterator[str]:
    """Yield the names of the children `c` of which `module` has `self.c.weight` in a product that it may come to."""
    for cls in type(module).__mro__:
        for method in _reading_methods(cls):
            for node in _reachable(method.body, module):
                if _is_product(node):
                    yield from _weights_in(node)


@cache
def _reading_methods(cls: type) -> tuple[ast.FunctionDef, ...]:
    """Return the methods in the source of `cls` that have any such product."""
    if not issubclass(cls, nn.Module) or cls.__module__.partition(".")[0] == "torch":
        return ()  # torch's own modules are known by class
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return ()  # made at run time: there is no source to read
    methods = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _SETUP
    )
    return tuple(
        method
        for method in methods
        if any(_is_product(node) and any(_weights_in(node)) for node in ast.walk(method))
    )


def _reachable(nodes: Iterable[ast.AST], module: nn.Module) -> Iterator[ast.AST]:
    """Yield `nodes` and what is in them, but for branches that the attributes of `module` rule out."""
    for node in nodes:
        yield node
        if not isinstance(node, ast.If):
            yield from _reachable(ast.iter_child_nodes(node), module)
            continue
        yield from _reachable([node.test], module)
        truth = _truth(node.test, module)
        yield from _reachable(node.body if truth is not False else (), module)
        yield from _reachable(node.orelse if truth is not True else (), module)


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """Return whether `test` holds for `module`, or None if that is not a matter of its plain attributes."""
    if isinstance(test, ast.BoolOp):
        parts = [_truth(value, module) for value in test.values]
        decisive = isinstance(test.op, ast.Or)
        return decisive if decisive in parts else None if None in parts else not decisive
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        truth = _truth(test.operand, module)
        return None if truth is None else not truth
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        sides = [_value(side, module) for side in (test.left, test.comparators[0])]
        compare = _COMPARISONS.get(type(test.ops[0]))
        by_identity = isinstance(test.ops[0], (ast.Is, ast.IsNot))
        if (
            compare is None
            or any(side is ... for side in sides)
            or not (by_identity or all(map(_is_plain, sides)))
        ):
            return None
        try:
            return compare(*sides)
        except TypeError:
            return None
    value = _value(test, module)
    return bool(value) if _is_plain(value) else None


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Return what a constant or `self.attribute` stands for, or Ellipsis for anything else."""
    if isinstance(node, ast.Constant):
        return node.value
    is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    # Whether a module trains changes; everything else is how it was built.
    if not is_own or node.attr == "training":  # type: ignore[attr-defined]
        return ...
    return getattr(module, node.attr, ...)  # type: ignore[attr-defined]


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _is_product(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    return isinstance(node, ast.Call) and _last_name(node.func).endswith(_PRODUCTS)


def _last_name(function: ast.expr) -> str:
    # `self.linear(x)` calls a module; `F.linear(x, W)` and `linear(x, W)` are products.
    if isinstance(function, ast.Attribute):
        is_own = isinstance(function.value, ast.Name) and function.value.id == "self"
        return "" if is_own else function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _weights_in(product: ast.AST) -> Iterator[str]:
    for node in ast.walk(product):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "self"
        ):
            yield node.value.attr
