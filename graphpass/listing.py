"""The methods there are: what `python -m graphpass methods` and the README show of the registry."""

from rich.table import Table

from codegen.kernel import kernels
from graphpass.method import Method, methods
from graphpass.site import ConvGeometry, Gradient, Site
from graphpass.state import no_state

COLUMNS = (
    "method",
    "what it computes",
    "gradients",
    "unbiased",
    "keeps state",
    "adds on ResNet-20",
    "by",
    "fast on CPU, GPU",
    "from",
)
_PLAIN = "torch, vendor's library"
_KNOWN = {True: "yes", False: "no", None: "not measured"}
# Of ResNet-20, a middle layer at batch 128: channels and output pixels.
_X, _WEIGHT = (128, 32, 16, 16), (32, 32, 3, 3)


def rows() -> list[tuple[str, ...]]:
    """Return one row a method, in the order of `COLUMNS`.

    What a method adds is its prior: noise over the batch's own (tau) and squared bias over the
    squared gradient, with its default parameters in every layer but the first.
    """
    return [
        (
            f"`{name}`",
            method.summary,
            ", ".join(method.gradients),
            "yes" if method.unbiased else "no",
            _state(method),
            _added(method),
            _computed_by(method),
            f"{_KNOWN[method.fast_on_cpu]}, {_KNOWN[method.fast_on_gpu]}",
            method.source,
        )
        for name, method in methods().items()
    ]


def markdown() -> str:
    """Return the table as it stands in the README."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table() -> Table:
    """Return the table for a terminal."""
    shown = Table(title="methods", show_lines=True)
    for column in COLUMNS:
        shown.add_column(column, no_wrap=column == "method")
    for row in rows():
        shown.add_row(*row)
    return shown


def _state(method: Method) -> str:
    """Return whether it keeps tensors from step to step: always, by some parameters, or never."""
    if any(method.state(_site(gradient), method.params()) for gradient in method.gradients):
        return "yes"
    return "no" if method.state is no_state else "by option"


def _added(method: Method) -> str:
    cells = []
    for gradient in method.gradients:
        prior = None if method.prior is None else method.prior(_site(gradient), method.params())
        if prior is not None:
            figures = [f"tau {prior.tau:.2g}"] if prior.tau or not prior.bias else []
            figures += [f"bias {prior.bias:.2g}"] if prior.bias else []
            cells.append(f"{gradient}: {', '.join(figures)}")
    return "; ".join(cells) or "not measured"


def _computed_by(method: Method) -> str:
    """Return in which languages there are kernels of ours for its products."""
    kinds = set(method.kernels) | {
        term.kind
        for gradient in method.gradients
        for term in method.cost(_site(gradient), method.params())
        # What only moves data has the number of its bytes.
        if "bytes" not in term.sizes
    }
    ours = [kernel for name, kernel in kernels().items() if name in kinds]
    cpp = any(kernel.emit_cpp is not None for kernel in ours)
    triton = ours and all(kernel.emit_triton is not None for kernel in ours)
    return ", ".join([*(["C++"] if cpp else [_PLAIN]), *(["Triton"] if triton else [])])


def _site(gradient: Gradient) -> Site:
    shapes = (_X, _WEIGHT, _X)
    return Site(
        "layer", "layer", gradient, "convolution", "node", None, 1, shapes,
        _WEIGHT if gradient is Gradient.WEIGHT else _X, "float32", 4,
        ConvGeometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
    )  # fmt: skip
