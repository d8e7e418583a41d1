"""How a candidate, a method with its parameters, is shown to a reader."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from graphpass.method import Method, methods


def text_of(method: Method, params: Any) -> str:
    """Return a candidate as `pixels(keep=0.25)`: what differs from the defaults."""
    return short_text(method.name, asdict(params))


def short_text(name: str, params: Mapping[str, Any]) -> str:
    """Return the same by the method's name; of an unknown method, all parameters."""
    method = methods().get(name)
    default = {} if method is None else asdict(method.params())
    given = [f"{k}={v}" for k, v in params.items() if k not in default or v != default[k]]
    return f"{name}({', '.join(given)})" if given else name
