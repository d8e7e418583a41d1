"""How a candidate, a method with its parameters at a site, is named."""

import json
from dataclasses import asdict
from typing import Any

from graphpass.method import Method
from graphpass.noise import Key
from graphpass.site import Site


def key_of(site: Site, method: Method, params: Any) -> Key:
    """Return the key of a candidate in a `NoiseTable`."""
    return site.id, method.name, json.dumps(asdict(params), sort_keys=True)


def text_of(method: Method, params: Any) -> str:
    """Return a candidate as `pixels(keep=0.25)`: what differs from the defaults."""
    default = asdict(method.params())
    given = {name: value for name, value in asdict(params).items() if value != default[name]}
    inner = ", ".join(f"{name}={value}" for name, value in given.items())
    return f"{method.name}({inner})" if inner else method.name
