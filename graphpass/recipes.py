"""Recipes: what papers of approximate training do, by name, as options for the backend.

    torch.compile(model, backend="approx", options=graphpass.recipe("crs-topk", keep=0.5))

A recipe is data: a template of options, in which "$name" stands for a parameter with a default.
Where layers are to have different values, a template names a distribution, and the recipe needs
the model. The first layer stays exact where its paper says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from torch import nn

from cost_model.sparsity import erk_densities
from graphpass.errors import ConfigError
from graphpass.options import Options
from graphpass.schedule import Schedule

_ALL_BUT_FIRST = Schedule("all but the first layer", first_layer=2)


@dataclass(frozen=True, slots=True)
class Recipe:
    """A template of options.

    Attributes:
        name: what it is called.
        source: the paper, and where in it.
        methods: entries of the option `methods`, for the modules that are approximated.
        parameters: names and defaults of what a user may set.
        schedule: which layers on which steps.
        distribution: None where all layers have the same parameters; "erk" to give each layer its
            own `sparsity`, by Erdos-Renyi-Kernel.
    """

    name: str
    source: str
    methods: tuple[Mapping[str, Any], ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = _ALL_BUT_FIRST
    distribution: str | None = None

    def __hash__(self) -> int:
        """Hash the name; mappings have no hash of their own."""
        return hash(self.name)


def _products(name: str, *gradients: str, **params: Any) -> tuple[Mapping[str, Any], ...]:
    return tuple({"name": name, "gradient": gradient, **params} for gradient in gradients)


_GA = "Wang, Nelaturu, Amarasinghe 2019, Accelerated CNN training through gradient approximation"
_CRS = "Adelman, Silberstein 2018, Faster NN training with approximate tensor operations"
_SWAT = "Raihan, Aamodt 2020, Sparse weight activation training"

RECIPES = MappingProxyType(
    {
        recipe.name: recipe
        for recipe in (
            *(
                Recipe(
                    schedule,
                    f"{_GA}, schedule {schedule}",
                    _products("$method", "weight"),
                    {"method": "zero"},
                    Schedule.named(schedule),
                )
                for schedule in ("ga-1", "ga-2", "ga-3", "ga-cnn2")
            ),
            Recipe(
                "agp",
                "Ye et al. 2020, Accelerating CNN training by pruning activation gradients",
                _products("prune", "weight", "input", p="$p"),
                {"p": 0.99},
            ),
            Recipe(
                "crs-topk",
                f"{_CRS}, sections 3 and 4: sampled forward; gradients are those of that product",
                (
                    *_products("crs_unscaled", "forward", keep="$keep"),
                    *_products("crs_unscaled", "input", "weight", keep="$keep", axis="channels"),
                ),
                {"keep": 0.5},
            ),
            Recipe(
                "crs-backward",
                f"{_CRS}, section 5: gradients of the sampled product, which are sampled again",
                (
                    *_products("crs_unscaled", "forward", keep="$keep"),
                    *_products(
                        "crs_unscaled", "input", "weight",
                        keep="$keep", axis="channels", again="$backward",
                    ),
                ),
                {"keep": 0.4, "backward": 0.2},
            ),
            Recipe(
                "crs-nps",
                f"{_CRS}, equation 1: sampled by norm and scaled, so without bias",
                _products("crs", "input", "weight", keep="$keep"),
                {"keep": 0.5},
            ),
            *(
                Recipe(
                    name,
                    f"{_SWAT}, {where}",
                    _products(
                        "swat", "forward", "input", "weight",
                        sparsity="$sparsity", structure=structure, refresh="$refresh",
                        threshold_from="$threshold_from",
                    ),
                    {"sparsity": sparsity, "refresh": 1, "threshold_from": 65536},
                    distribution=distribution,
                )
                for name, where, structure, sparsity, distribution in (
                    ("swat-u", "table 2, uniform", "none", 0.9, None),
                    ("swat-erk", "table 2, Erdos-Renyi-Kernel", "none", 0.9, "erk"),
                    ("swat-structured", "table 4, channels of each filter", "filter", 0.5, None),
                    ("swat-channels", "section 3.3.1, for all filters", "channel", 0.5, None),
                )
            ),
            Recipe(
                "swat-m",
                f"{_SWAT}, table 2, momentum; by the rule of Dettmers, Zettlemoyer 2019",
                _products(
                    "swat", "forward", "input", "weight",
                    sparsity="$sparsity", distribution="momentum", refresh="$refresh",
                    threshold_from="$threshold_from",
                ),
                # An epoch of CIFAR-10 at batch 128.
                {"sparsity": 0.9, "refresh": 390, "threshold_from": 65536},
            ),
            Recipe(
                "int8",
                "Banner et al. 2018, Scalable methods for 8-bit training; both gradients",
                _products("int8", "weight", "input"),
            ),
            Recipe(
                "int8-forward",
                "Wu et al. 2018, Training and inference with integers; forward too",
                _products("int8", "weight", "input", "forward"),
            ),
            Recipe(
                "bf16",
                "Micikevicius et al. 2018, Mixed precision training, in single products",
                _products("bf16", "weight", "input", "forward"),
            ),
        )
    }
)  # fmt: skip


def recipe(name: str, model: nn.Module | None = None, **parameters: Any) -> dict[str, Any]:
    """Return the options of a recipe, as `torch.compile(options=...)` takes them.

    Args:
        name: a name of `RECIPES`.
        model: the model that is compiled, where the recipe gives each layer its own parameters.
        **parameters: of the recipe, in place of their defaults.

    Raises:
        ConfigError: if there is no such recipe or parameter, a value is not legal, or the recipe
            needs the model.
    """
    if name not in RECIPES:
        near = get_close_matches(str(name), RECIPES, n=3)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ConfigError(f"unknown recipe {name!r}: legal are {', '.join(RECIPES)}{hint}")
    found = RECIPES[name]
    unknown = sorted(set(parameters) - set(found.parameters))
    if unknown:
        legal = ", ".join(found.parameters) or "none"
        raise ConfigError(f"recipe {name!r} has no parameter {unknown[0]!r}: legal are {legal}")
    values = {**found.parameters, **parameters}
    if found.distribution is None:
        methods = {"*": _filled(found, values)}
    elif model is None:
        raise ConfigError(f"recipe {name!r} needs the model: give recipe({name!r}, model)")
    else:
        methods = _by_layer(found, values, model)
    return Options(methods=methods, schedule=found.schedule).to_dict()


def _filled(found: Recipe, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the template with values in place of names."""
    filled = [
        {key: values[text[1:]] if _is_name(text) else text for key, text in entry.items()}
        for entry in found.methods
    ]
    for entry in filled:
        _check(entry)
    return filled


def _check(entry: Mapping[str, Any]) -> None:
    from graphpass.method import get_method

    method = get_method(entry["name"])
    method.make_params({k: v for k, v in entry.items() if k not in {"name", "gradient"}})


def _is_name(text: object) -> bool:
    return isinstance(text, str) and text.startswith("$")


def _by_layer(
    found: Recipe, values: Mapping[str, Any], model: nn.Module
) -> dict[str, list[dict[str, Any]]]:
    """Return entries for each layer; those that would keep all of their weights have none.

    Raises:
        ConfigError: if there is no layer.
    """
    weights = {
        name: tuple(module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear)
    }
    if not weights:
        raise ConfigError(f"recipe {found.name!r}: the model has no convolution or linear layer")
    _filled(found, values)
    densities = erk_densities(list(weights.values()), 1 - values["sparsity"])
    return {
        name: _filled(found, {**values, "sparsity": round(1 - density, 6)})
        for name, density in zip(weights, densities, strict=True)
        if density < 1
    }
