"""Predicted against measured seconds: of every product, of methods, and of whole steps.

    python -m graphpass calibrate --threads 2
    python -m benchmarks.predicted
    python -m benchmarks.predicted --models resnet20 --methods int8 pixels --append

Predictions come from the calibration alone; none of its shapes is judged here. A product is timed
by itself, with other data in the caches (see `graphpass.timing`), by a method with what a step has
computed last, each distinct one of a model once. On a CPU Inductor runs images in channels_last,
whatever the model's format is, so that the products of a model in NCHW are the same: the formats
differ in steps alone. A step is forward, loss and backward; the optimizer is no part of it.
`--plans` names those of `benchmarks.plans` that are made by hand.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

import graphpass
from benchmarks.plans import PLANS
from benchmarks.timing import RESULTS, write_results
from benchmarks.training_step import layers_of
from examples.large_models import deep_resnet
from examples.models import build
from graphpass import calibration, dry_run, pricing, trial
from graphpass.capture import Analysis
from graphpass.options import Options
from graphpass.planner import make_plan
from graphpass.pricing import HardwarePricing
from graphpass.timing import fastest, fill_caches, fill_caches_but, keep_memory

MODELS = ("resnet20", "vgg19", "wrn-16-8", "resnet50", "vit")
DTYPES, FORMATS = ("fp32", "bf16"), ("channels_last", "nchw")
EXACT = "exact"
# How long each product is called again and again, and each step.
_SITE_S, _STEP_S = 0.1, 4.0


@dataclass(frozen=True, slots=True)
class Case:
    """A model, and how it is trained.

    Attributes:
        name: one of the models.
        dtype: `fp32`, or `bf16` for autocast to it.
        format: `channels_last` or `nchw`.
    """

    name: str
    dtype: str
    format: str

    def model(self) -> nn.Module:
        """Return the model."""
        model = deep_resnet(50, image_size=64) if self.name == "resnet50" else build(self.name)
        if self.format == "channels_last":
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def images(self) -> torch.Tensor:
        """Return random images, as many as memory holds of the large ones."""
        batch, size = (32, 64) if self.name == "resnet50" else (128, 32)
        images = torch.randn(batch, 3, size, size)
        last = self.format == "channels_last"
        return images.contiguous(memory_format=torch.channels_last) if last else images

    def autocast(self) -> torch.autocast:
        """Return the context that a forward pass runs in."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")


def main(argv: Sequence[str] | None = None) -> None:
    """Predict and measure, print a table, write the results.

    Raises:
        SystemExit: if this machine was not calibrated.
    """
    given = _parse(argv)
    torch.set_num_threads(given.threads)
    keep_memory()
    hardware = calibration.load(given.threads)
    if isinstance(hardware, str):
        raise SystemExit(hardware)
    path = RESULTS / f"{given.output}.json"
    known = json.loads(path.read_text()) if given.append and path.exists() else {}
    sites, steps = known.get("sites", []), known.get("steps", [])
    console = Console()
    for name in given.models:
        for dtype in given.dtypes:
            case = Case(name, dtype, FORMATS[0])
            if "sites" in given.parts:
                sites = _merged(sites, site_rows(case, given.threads, given.methods))
                _write(given.output, sites, steps)
            for form in given.formats if "steps" in given.parts else ():
                for plan in (EXACT, *given.plans):
                    row = step_row(Case(name, dtype, form), given.threads, plan)
                    console.print(row)
                    steps = _merged(steps, [row])
                    # A step takes a minute: what is measured is kept whatever becomes of the next.
                    _write(given.output, sites, steps)
    console.print(_table(summary(sites, steps)))


def _write(name: str, sites: list[dict[str, Any]], steps: list[dict[str, Any]]) -> None:
    write_results(name, {"summary": summary(sites, steps), "sites": sites, "steps": steps})


def site_rows(case: Case, threads: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return predicted and measured seconds of a model's products, exact and by methods."""
    analysis = analyse(case)
    prices, rows = _prices(analysis, threads), []
    for site in {prices.identity(site): site for site in analysis.sites}.values():
        known = trial.bound(site, analysis.hints)
        given = trial.operands(known)
        for name in ("exact", *names):
            method = None if name == "exact" else graphpass.methods()[name]
            params = method.params() if method else None
            before: Callable[[], None] = fill_caches
            if method is None:
                predicted, run = prices.exact(site), trial.exact(known, given)
            elif site.gradient in method.gradients and method.reject(site, params) is None:
                predicted = prices.approximate(site, method, params)
                run = trial.approximate(known, method, params, given)
                before = partial(fill_caches_but, trial.just_computed(known, given))
            else:
                continue
            found = fastest((run,), _SITE_S, before)
            rows.append(
                {
                    "model": case.name, "dtype": case.dtype, "site": site.id, "method": name,
                    "op": site.op, "predicted_s": predicted.seconds,
                    "measured_s": found.seconds[0], "disturbed": found.disturbed,
                    "expected_error": predicted.error,
                }
            )  # fmt: skip
    return rows


def step_row(case: Case, threads: int, plan: str) -> dict[str, Any]:
    """Return predicted and measured seconds of a training step, exact or under a plan by hand."""
    analysis, model, images = analyse(case), case.model(), case.images()
    methods = {} if plan == EXACT else dict.fromkeys(layers_of(model)[1:], PLANS[plan])
    options = {"methods": methods, "strict": True}
    prices = _prices(analysis, threads)
    found = make_plan(analysis, Options.from_dict(options), 0, None, pricing=prices).prediction
    assert found is not None
    torch._dynamo.reset()
    labels = torch.randint(0, 10, (len(images),))
    settings: dict[str, Any] = {} if plan == EXACT else {"backend": "approx", "options": options}
    compiled: Any = torch.compile(model, **settings)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with case.autocast():
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()

    step()
    timed = fastest((step,), _STEP_S, fill_caches)
    return {
        "model": case.name, "dtype": case.dtype, "format": case.format,
        "plan": plan, "batch": len(images), "products_s": found.step_s - found.rest_as_planned_s,
        "rest_s": found.rest_as_planned_s, "predicted_s": found.step_s,
        "measured_s": timed.seconds[0], "disturbed": timed.disturbed,
    }  # fmt: skip


def analyse(case: Case) -> Analysis:
    """Return what the training graph of a model holds."""
    with case.autocast():
        (analysis,) = dry_run.analyses(case.model(), case.images())
    return analysis


def summary(sites: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how good the predictions are: for each method and type, and for steps.

    What other programs disturbed throughout was measured of them, and is left out.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in (row for row in sites if not row["disturbed"]):
        kind = "exact" if row["method"] == "exact" else "methods"
        groups.setdefault(f"sites, {kind}", []).append(row)
        groups.setdefault(f"sites, {row['method']}, {row['dtype']}", []).append(row)
        if kind == "exact":
            groups.setdefault(f"sites of {row['model']}, {row['dtype']}", []).append(row)
    for row in (row for row in steps if not row["disturbed"]):
        groups.setdefault(f"steps, {row.get('plan', EXACT)}", []).append(row)
    return [{"of": name, **_quality(rows)} for name, rows in sorted(groups.items())]


def _quality(rows: list[dict[str, Any]]) -> dict[str, Any]:
    predicted = [row["predicted_s"] for row in rows]
    measured = [row["measured_s"] for row in rows]
    errors = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return {
        "number": len(rows),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "median_ratio": statistics.median(
            p / m for p, m in zip(predicted, measured, strict=True)
        ),
        "rank_correlation": float(spearmanr(predicted, measured)[0]) if len(rows) > 2 else None,
    }  # fmt: skip


def _prices(analysis: Analysis, threads: int) -> HardwarePricing:
    prices = pricing.of(analysis, threads)
    # What was timed before is not to be predicted from itself.
    prices.timings.seconds.clear()
    return prices


def _merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return all rows, those of the same thing once: with the faster of both measurements."""
    rows = {_key(row): row for row in old}
    for row in new:
        both = rows.get(_key(row), row), row
        faster = min(both, key=lambda one: one["measured_s"])
        rows[_key(row)] = {**row, **{name: faster[name] for name in ("measured_s", "disturbed")}}
    return list(rows.values())


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("model", "dtype", "format", "plan", "site", "method"))


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="predicted against measured seconds")
    for column in ("of", "number", "median error", "largest", "predicted / measured", "rank"):
        table.add_column(column, justify="left" if column == "of" else "right")
    for row in rows:
        rank = row["rank_correlation"]
        table.add_row(
            row["of"], str(row["number"]), f"{row['median_error']:.1%}",
            f"{row['largest_error']:.1%}", f"{row['median_ratio']:.2f}",
            "" if rank is None else f"{rank:.3f}",
        )  # fmt: skip
    return table


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predicted", description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--methods", nargs="*", default=[], choices=list(graphpass.methods()))
    by_hand = [name for name, plan in PLANS.items() if isinstance(plan, list)]
    parser.add_argument("--plans", nargs="*", default=[], choices=by_hand)
    parser.add_argument("--parts", nargs="+", default=["sites", "steps"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--append",
        action="store_true",
        help="keep what the file holds; of two measurements, the faster",
    )
    parser.add_argument("--output", default="predicted", help="name of the results file")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
