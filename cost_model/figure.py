"""A figure of a machine, which does not go without its source."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it comes from.

    Attributes:
        value: positive and finite.
        source: address of a published data sheet, "measured on ...", or "assumed: ..." where there
            is neither, with the reason.
    """

    value: float
    source: str

    def __post_init__(self) -> None:
        """Check range and source.

        Raises:
            ValueError: if the value is not positive and finite, or the source is of no such kind.
        """
        if not (math.isfinite(self.value) and self.value > 0):
            raise ValueError(f"a hardware figure must be positive and finite, got {self.value!r}")
        if not self.source.startswith(("https://", "measured on ", "assumed: ")):
            raise ValueError(
                "the source of a hardware figure is an https:// address, 'measured on ...' or "
                f"'assumed: ...', got {self.source!r}"
            )
