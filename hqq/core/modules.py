"""The one module walker: finding, naming, matching and replacing the modules of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from hqq.core.quantized_module import QuantizedModule
from hqq.errors import ConfigError

# Components of a name that say where a layer is, not what it is.
_POSITION_WORDS = ("model", "layers")


def named_sites(model: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Return every module of `model`, the root included, with all names it is registered under, in model order.

    A quantised layer is one module: what it is made of is not listed.
    """
    sites: dict[nn.Module, list[str]] = {}
    for name, module in _walk(model, ""):
        sites.setdefault(module, []).append(name)
    return {module: tuple(names) for module, names in sites.items()}


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if isinstance(module, QuantizedModule):
        return
    for child_name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def named_leaves(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (first name, module) of the modules that contain no others; a quantised layer is a leaf."""
    for module, names in named_sites(model).items():
        if is_leaf(module):
            yield names[0], module


def is_leaf(module: nn.Module) -> bool:
    """Whether `module` contains no other module (or is a quantised layer)."""
    return isinstance(module, QuantizedModule) or not any(
        child is not None for child in module._modules.values()
    )


def find_module(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module called `name` ("" is the root), or None."""
    module: nn.Module | None = model
    for part in name.split(".") if name else ():
        module = module._modules.get(part) if module is not None else None
    return module


def replace_module(model: nn.Module, names: Iterable[str], new: nn.Module) -> None:
    """Put `new` in the place of the modules called `names`.

    Raises ConfigError for the root, which nothing in the model refers to, or for a name that does not exist.
    """
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent = find_module(model, parent_name)
        if not name or parent is None or child not in parent._modules:
            raise ConfigError(
                f"got module name {name!r}; expected the name of a module inside {type(model).__name__}"
            )
        setattr(parent, child, new)


def name_modules(model: nn.Module) -> None:
    """Give every module its first name as the attribute `name`, which the ecosystem around hqq reads."""
    for module, names in named_sites(model).items():
        if not isinstance(getattr(type(module), "name", None), property):
            module.name = names[0]  # type: ignore[assignment]


def linear_tag(name: str) -> str:
    """Return what kind of layer `name` is: "model.layers.3.self_attn.q_proj" gives "self_attn.q_proj".

    A name of positions only (as in nn.Sequential) is its own tag.
    """
    parts = [part for part in name.split(".") if part not in _POSITION_WORDS and not part.isnumeric()]
    return ".".join(parts) or name


def matches(name: str, pattern: str) -> bool:
    """Whether `pattern` is the name or the tag of the module called `name`, or a glob that fits one of them.

    In a glob, `*` also matches dots, as in "model.layers.[0-3].*" and "*.down_proj".
    """
    tag = linear_tag(name)
    return pattern in (name, tag) or fnmatchcase(name, pattern) or fnmatchcase(tag, pattern)


def skip_rule(name: str, rules: Iterable[str]) -> str | None:
    """Return the first of `rules` that applies to the module called `name`, or None.

    A rule is a full name, one component of it, any part of it ("down_proj", as transformers 4.x reads skip_modules),
    or a glob. A number is a whole component: "1" does not mean "10".
    """
    parts = name.split(".")
    for rule in rules:
        if rule in parts or matches(name, rule) or (rule and not rule.isnumeric() and rule in name):
            return rule
    return None
