"""Parameters of `swat`: what is left out of which values, and for how many steps."""

from dataclasses import dataclass

from graphpass.errors import ConfigError
from graphpass.feedback import check_feedback

STRUCTURES = ("none", "filter", "channel")
DISTRIBUTIONS = ("given", "momentum")


@dataclass(frozen=True, slots=True)
class Params:
    """Parameters of SWAT.

    Attributes:
        sparsity: share of the weights, activations or channels that is left out, in [0, 1).
        structure: "none", "filter" or "channel".
        threshold_from: number of values that the threshold is taken from; 0 for all.
        refresh: steps from one choice to the next (paper: 1 for CIFAR, 1000 for ImageNet).
        freeze_after: step from which on the weights that are used stay; None for never.
        mask_gradient: whether weights that are not used get no gradient; of "none" and "filter".
        distribution: "given", or "momentum" for layers that exchange density every `refresh` steps;
            of "none", for forward product, input and weight gradient together.
        feedback: whether a weight gradient is given later what it was not given (error feedback).
    """

    sparsity: float = 0.9
    structure: str = "none"
    threshold_from: int = 65536
    refresh: int = 1
    freeze_after: int | None = None
    mask_gradient: bool = False
    distribution: str = "given"
    feedback: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ConfigError: if a value is out of range.
        """
        number = isinstance(self.sparsity, int | float) and not isinstance(self.sparsity, bool)
        checks = {
            "sparsity": (number and 0 <= self.sparsity < 1, "a number in [0, 1)"),
            "structure": (self.structure in STRUCTURES, " or ".join(map(repr, STRUCTURES))),
            "threshold_from": (
                type(self.threshold_from) is int and self.threshold_from >= 0,
                "an integer >= 0",
            ),
            "refresh": (type(self.refresh) is int and self.refresh >= 1, "an integer >= 1"),
            "freeze_after": (
                self.freeze_after is None
                or (type(self.freeze_after) is int and self.freeze_after >= 1),
                "None or an integer >= 1",
            ),
            "mask_gradient": (isinstance(self.mask_gradient, bool), "True or False"),
            "distribution": (
                self.distribution in DISTRIBUTIONS,
                " or ".join(map(repr, DISTRIBUTIONS)),
            ),
        }
        for name, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"method 'swat': {name}={getattr(self, name)!r}; give {wanted}")
        check_feedback("swat", self.feedback)
        if self.feedback and self.mask_gradient:
            raise ConfigError(
                "method 'swat': feedback=True gives weights what mask_gradient=True takes from "
                "them; give one of the two"
            )
        for name, given, legal in (
            ("mask_gradient=True", self.mask_gradient, ("none", "filter")),
            ("distribution='momentum'", self.distribution == "momentum", ("none",)),
        ):
            if given and self.structure not in legal:
                raise ConfigError(
                    f"method 'swat': {name} with structure={self.structure!r}; give structure="
                    f"{' or '.join(map(repr, legal))}"
                )
