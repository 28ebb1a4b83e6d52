"""Layers whose weight another module computes with, instead of calling the layer.

`F.linear(x, self.qkv.weight, bias)`, as timm's BEiT and EVA have it, would get the empty weight of a quantised layer.
Such code is found by reading the source of each module's class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

# What the name of a function ends in that multiplies by a weight.
_PRODUCTS = ("linear", "matmul", "mm", "mv", "einsum", "embedding")
# Methods of a module that run once, before there are codes.
_SETUP = ("__init__", "init_weights", "_init_weights", "reset_parameters", "fix_init_weight")


def weight_readers(model: nn.Module) -> dict[nn.Module, str]:
    """Return the children whose weight their parent computes with, and the name of the parent's class."""
    found: dict[nn.Module, str] = {}
    for parent in model.modules():
        for name in read_weights(type(parent)):
            child = parent._modules.get(name)
            if child is not None:
                found[child] = type(parent).__name__
    return found


def read_weights(cls: type[nn.Module]) -> frozenset[str]:
    """Return the names of the children `c` of which the code of `cls` has `self.c.weight` in a product."""
    bases = [base for base in cls.__mro__ if issubclass(base, nn.Module)]
    return frozenset().union(*(_own_reads(base) for base in bases))  # type: ignore[arg-type]  # classes hash


@cache
def _own_reads(cls: type[nn.Module]) -> frozenset[str]:
    if cls.__module__.partition(".")[0] == "torch":
        return frozenset()  # torch's own modules are known by class
    return frozenset(name for product in _products(cls) for name in _children_read(product))


def _products(cls: type[nn.Module]) -> Iterator[ast.AST]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):
        return  # made at run time: there is no source to read
    methods = (
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name not in _SETUP
    )
    for method in methods:
        yield from (node for node in ast.walk(method) if _is_product(node))


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


def _children_read(product: ast.AST) -> Iterator[str]:
    for node in ast.walk(product):
        if (
            isinstance(node, ast.Attribute)
            and node.attr == "weight"
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
            and node.value.value.id == "self"
        ):
            yield node.value.attr
