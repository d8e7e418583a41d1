"""Prices: of methods by kernels, from calibrations good, bad and missing, and measured ones."""

import io
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import pytest
import sympy
import torch
from rich.console import Console
from torch import nn

import graphpass
from codegen import int8
from codegen.kernel import kernels
from cost_model import DATASHEETS, Cost, KernelCost, counted_once
from graphpass import (
    __main__,
    calibrate,
    calibration,
    dry_run,
    kernels_of,
    pricing,
    timing,
    timings,
    trial,
    workloads,
)
from graphpass.backend import approx
from graphpass.calibration import Machine, Measurement
from graphpass.capture import Analysis
from graphpass.method import Method, get_method, methods
from graphpass.options import Options
from graphpass.planner import make_plan
from graphpass.pricing import Price
from graphpass.site import Gradient, Site
from graphpass.timing import Fastest
from tests.graphpass.planning import chain, conv_layer

pytestmark = pytest.mark.usefixtures("fresh_cache")

Runs = Sequence[Callable[[], object]]

THREADS = 2
ROWS, CHANNELS = 64, 32


def _linear(gradient: Gradient, rows: Any = ROWS) -> Site:
    shapes = {
        Gradient.FORWARD: ((rows, CHANNELS), (CHANNELS, CHANNELS)),
        Gradient.INPUT: ((rows, CHANNELS), (CHANNELS, CHANNELS)),
        Gradient.WEIGHT: ((CHANNELS, rows), (rows, CHANNELS)),
    }[gradient]
    output = (shapes[0][0], shapes[1][1])
    return Site("fc", "fc", gradient, "mm", "mm", None, 1, shapes, output, "float32", 4)


def _measurements() -> list[Measurement]:
    """Return a machine of 1 GFLOP/s, 1 GB/s, and 1 us a launch, by kernels that reach it."""
    moved = [
        Measurement("elementwise", "float32", {"bytes": 1.0 * size}, 0, size, size / 1e9 + 1e-6)
        for size in (1, 10**9)
    ]
    product = kernels_of.exact(_linear(Gradient.FORWARD, rows=10**6))[0]
    flops, read, written = product.cost.evaluate()
    return [*moved, Measurement.of(product, flops / 1e9), Measurement(
        product.kind, "bfloat16", {k: float(v) for k, v in product.sizes.items()}, flops,
        read + written, flops / 2e9,
    )]  # fmt: skip


def _calibrated() -> pricing.HardwarePricing:
    calibration.store(_measurements(), THREADS)
    return pricing.of(Analysis((), hints={"s0": ROWS}, rest_bytes=(10**9, 10**9)), THREADS)


def test_a_calibration_prices_what_it_measured() -> None:
    prices = _calibrated()
    site = _linear(Gradient.FORWARD, rows=10**6)
    price = prices.exact(site)
    assert (price.source, price.error) == ("calibrated", 0.25)
    assert price.seconds == pytest.approx(2 * 10**6 * CHANNELS**2 / 1e9, rel=0.01)
    assert prices.rest().seconds == pytest.approx(2.0, rel=0.01)


def test_the_rest_of_a_step_finds_more_in_the_caches_the_more_is_approximated() -> None:
    size = 10**8
    found = [
        Measurement(kind, "float32", {"bytes": 1.0 * size}, 0, size, parts * size / 1e9)
        for kind, parts in zip(kernels_of.FUSED, (2.0, 1.2), strict=True)
    ]
    calibration.store([*_measurements(), *found], THREADS)
    prices = pricing.of(Analysis((), rest_bytes=(size, size)), THREADS)
    for share, parts in ((0.0, 2.0), (0.5, 1.6), (1.0, 1.2)):
        assert prices.rest(share).seconds == pytest.approx(parts * 2 * size / 1e9, rel=0.01)


def test_a_symbolic_size_is_priced_by_its_hint() -> None:
    prices, size = _calibrated(), sympy.Symbol("s0", integer=True, positive=True)
    for gradient in Gradient:
        known, symbolic = _linear(gradient), _linear(gradient, size)
        assert prices.exact(symbolic) == prices.exact(known)
        assert prices.identity(symbolic) == prices.identity(known)


def test_a_kernel_far_from_every_measurement_is_doubtful() -> None:
    prices = _calibrated()
    assert prices.exact(_linear(Gradient.FORWARD, rows=ROWS)).error == 0.5
    assert prices.exact(_linear(Gradient.WEIGHT, rows=10**6)).error == 0.5


def test_without_a_calibration_published_figures_are_labelled() -> None:
    prices = pricing.of(Analysis(()), THREADS)
    assert prices.exact(_linear(Gradient.FORWARD)).source == "datasheet"
    assert prices.hardware is DATASHEETS["AVX-512 CPU"]
    assert "was not measured with 2 threads: run `python -m graphpass" in str(
        calibration.load(THREADS)
    )


def test_a_gpu_without_figures_is_priced_by_another() -> None:
    prices = pricing.of(Analysis((), device="cuda"), THREADS)
    assert prices.exact(_linear(Gradient.FORWARD)).source == "datasheet"


@pytest.mark.parametrize(("precision", "rate"), [("highest", 19.5e12), ("high", 156e12)])
def test_float32_is_priced_as_a_gpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, rate: float
) -> None:
    """A large product, of whole tiles nearly: that of an A100 in float32, or in tf32."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    prices = pricing.of(Analysis((), device="cuda"), THREADS)
    site = _linear(Gradient.FORWARD, rows=10**6)
    flops = 2 * 10**6 * CHANNELS**2
    moved = 4 * (2 * 10**6 * CHANNELS + CHANNELS**2)
    expected = max(flops / rate, moved / prices.hardware.bandwidth_bytes_per_s.value)
    assert prices.exact(site).seconds == pytest.approx(expected, rel=0.05)


def test_hopper_is_priced_by_what_kernels_reached_there() -> None:
    """Within 40 % of what most kernels took that were measured; by data sheets alone, of few."""
    text = files("graphpass").joinpath("h200.json").read_text(encoding="utf-8")
    found = [Measurement(**entry) for entry in json.loads(text)["measurements"]]
    bare = DATASHEETS["H200"]
    near = {False: 0, True: 0}
    for one in found:
        cost = Cost(one.flops, one.moved_bytes, 0)
        kernel = KernelCost(one.kind, cost, one.dtype, sizes=one.sizes)
        for known, hardware in ((False, bare), (True, calibration.of_gpu(bare))):
            ratio = hardware.kernel_s(kernel) / one.seconds
            near[known] += 1 / 1.4 < ratio < 1.4
    assert near[True] > 0.9 * len(found) > 2 * near[False]
    assert calibration.of_gpu(DATASHEETS["A100"]) is DATASHEETS["A100"]


@pytest.mark.parametrize(("size", "waits"), [(8, True), (128, False)])
def test_a_gpu_waits_for_the_host_in_steps_of_small_kernels(size: int, waits: bool) -> None:
    """There, and only there, calls of our kernels are priced beside what they take."""
    layers = [conv_layer(number, channels=256, size=size, batch=128) for number in (1, 2)]
    analysis = replace(chain(layers), device="cuda")
    prices, alone = (pricing.of(analysis, THREADS, replays) for replays in (False, True))
    site, method = analysis.sites[1], get_method("int8")
    ours = sum(kernel.kind in kernels() for kernel in method.cost(site, method.params()))
    late = prices.approximate(site, method, method.params()).seconds
    late -= alone.approximate(site, method, method.params()).seconds
    assert late == pytest.approx(60e-6 * ours * waits) and ours > 0
    assert prices.exact(site) == alone.exact(site)


def _truncate(text: str) -> str:
    return text[: len(text) // 2]


def _elsewhere(text: str) -> str:
    record = json.loads(text)
    record["machine"]["processor"] = "another"
    return json.dumps(record)


def _older(text: str) -> str:
    return json.dumps({**json.loads(text), "version": 0})


def _emptied(text: str) -> str:
    return json.dumps({**json.loads(text), "measurements": []})


def _nonsense(text: str) -> str:
    return text.replace('"seconds": ', '"seconds": -')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_truncate, "cannot be read"),
        (lambda text: "[]", "cannot be read"),
        (_elsewhere, r"was measured elsewhere \(another, 2 threads"),
        (_older, "of another version"),
        (_emptied, r"not complete \(no bandwidth"),
        (_nonsense, r"not complete \(.*must be positive"),
    ],
)
def test_a_calibration_that_does_not_fit_says_why_and_what_to_do(
    damage: Callable[[str], str], reason: str
) -> None:
    path = calibration.store(_measurements(), THREADS)
    path.write_text(damage(path.read_text()))
    with pytest.raises(AssertionError, match=rf"{reason}.*python -m graphpass calibrate --thr"):
        raise AssertionError(calibration.load(THREADS))
    assert pricing.of(Analysis(()), THREADS).source == "datasheet"


@pytest.mark.parametrize("gradient", list(Gradient))
def test_every_kernel_of_int8_is_a_term_and_rounding_is_shared(gradient: Gradient) -> None:
    method = get_method("int8")
    kernels = method.cost(_linear(gradient), method.params())
    kinds = [kernel.kind for kernel in kernels]
    assert kinds[:4] == ["absolute_max", "int8_round"] * 2 and kinds[4].startswith("int8_")
    assert [bool(kernel.shared) for kernel in kernels] == [True] * 4 + [False]


def _all(name: str) -> list[KernelCost]:
    method = get_method(name)
    return [k for g in Gradient for k in method.cost(_linear(g), method.params())]


@pytest.mark.parametrize(("name", "run"), [("int8", 3 * 2 + 3), ("bf16", 3 + 3)])
def test_products_of_a_layer_share_the_work_on_their_operands(name: str, run: int) -> None:
    """Input, weight and gradient are each rounded once for the three products."""
    assert len(list(counted_once(_all(name)))) == run
    elsewhere = [replace(k, shared=k.shared.replace("fc:", "fc2:")) for k in _all(name)]
    assert len(list(counted_once([*_all(name), *elsewhere]))) == 2 * run


def test_shares_of_a_price_are_part_of_it() -> None:
    prices, method = _calibrated(), get_method("int8")
    price = prices.approximate(_linear(Gradient.INPUT), method, method.params())
    assert len(price.shared) == 4
    assert 0 < sum(price.shared.values()) < price.seconds


def test_topk_reads_no_more_of_the_input_than_there_is() -> None:
    """Its patches overlap: memory gives each value of x once."""
    [make] = [m for m in workloads.ours(torch.float32) if m.args[2] == (96, 16, 16, 28, 3, 1, 1)]
    _, _, weight = make.args[1](*make.args[2], make.args[3])
    few, many = (get_method("topk").params(k=k) for k in (1, 784))
    (small,), (large,) = (get_method("topk").cost(weight, params) for params in (few, many))
    x, _, y = (4 * torch.Size(shape).numel() for shape in weight.shapes)
    assert small.cost.bytes_read == y + 4 * 96 * 16 * 9 * 16
    assert large.cost.bytes_read == y + x


def _may_take(monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    """Let products be timed, on a GPU as well: who times is replaced."""
    monkeypatch.setattr(pricing.HardwarePricing, "can_time", True)
    monkeypatch.setattr(pricing, "TIMING_S", {"cpu": limit_s, "cuda": limit_s})


def test_a_product_is_timed_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    site, timed = _linear(Gradient.FORWARD), []

    def fastest(runs: Runs, limit_s: float, before: Callable[[], object]) -> Fastest:
        before()
        timed.append([run() for run in runs])
        return Fastest((7.0,), disturbed=False)

    monkeypatch.setattr(timings, "fastest", fastest)
    _may_take(monkeypatch, 60.0)
    prices = _calibrated()
    pair = ((site, None, None), (site, None, None))
    assert prices.confirm([pair]) and not prices.confirm([pair])
    assert prices.exact(site) == Price(7.0, {}, "measured", 0.0)
    # The next process, and a layer of another name, need not time it.
    again = pricing.of(Analysis(()), THREADS)
    assert again.exact(replace(site, name="fc2", path="fc2")).source == "measured"
    assert not again.confirm([pair]) and len(timed) == 1
    assert again.exact(_linear(Gradient.WEIGHT)).source == "calibrated"


def test_a_method_is_timed_with_what_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    site, method = _linear(Gradient.WEIGHT), get_method("int8")
    results: list[Any] = []

    def fastest(runs: Runs, limit_s: float, before: Callable[[], object]) -> Fastest:
        del limit_s, before
        results.extend(run() for run in runs)
        return Fastest((1.0, 2.0, 4.0, 8.0, 16.0), disturbed=False)

    monkeypatch.setattr(timings, "fastest", fastest)
    _may_take(monkeypatch, 60.0)
    prices = _calibrated()
    way = (site, method, method.params())
    prices.confirm([(way, way)])
    price = prices.approximate(site, method, method.params())
    assert price.source == "measured" and price.seconds == 31.0
    assert sorted(price.shared.values()) == [1.0, 2.0, 4.0, 8.0]
    # Each operand's largest magnitude and its bytes, then their product.
    *_, product = results
    assert len(results) == 5 and product.numel() == CHANNELS**2


def test_what_other_programs_disturbed_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It keeps its price, is not tried again in this process, and the next process tries."""
    site, tries, said = _linear(Gradient.FORWARD), [], list[str]()

    def fastest(runs: Runs, limit_s: float, before: Callable[[], object]) -> Fastest:
        del limit_s, before
        tries.append(runs)
        return Fastest((7.0,), disturbed=True)

    monkeypatch.setattr(timings, "fastest", fastest)
    monkeypatch.setattr(timings.log, "info", lambda text, *args: said.append(text % args))
    _may_take(monkeypatch, 60.0)
    pair = ((site, None, None), (site, None, None))
    for number in (1, 2):
        prices = _calibrated()
        before = prices.exact(site)
        assert not prices.confirm([pair]) and not prices.confirm([pair])
        assert prices.exact(site) == before and len(tries) == number
    busy = f"{site.id} keeps its price: the machine is busy with other programs"
    assert said == [busy] * 2


def test_timing_ends_with_its_time_and_failures_change_nothing(
    monkeypatch: pytest.MonkeyPatch, logged: list[str]
) -> None:
    tried: list[Site] = []

    def time(self: Any, way: Any, *_: Any) -> NoReturn:
        del self
        tried.append(way[0])
        raise MemoryError("no room")

    monkeypatch.setattr(timings.Timings, "_time", time)
    ways = [(_linear(gradient), None, None) for gradient in Gradient]
    _may_take(monkeypatch, 1e-9)
    assert not _calibrated().confirm(itertools.pairwise(ways))
    # What is compared is timed together.
    assert tried == [way[0] for way in ways[:2]]
    assert logged == [f"could not time {way[0].id}: no room" for way in ways[:2]]
    assert _calibrated().exact(tried[0]).source == "calibrated"


def test_nothing_is_timed_beside_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would plan differently."""
    monkeypatch.setattr(pricing, "TIMING_S", {"cpu": 60.0})
    assert _calibrated().can_time
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    way = (_linear(Gradient.FORWARD), None, None)
    assert not _calibrated().confirm([(way, way)])


def test_what_was_timed_is_compared_with_its_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the exact product takes ten times what was predicted, so does what was not timed."""
    prices, site, method = _calibrated(), _linear(Gradient.WEIGHT), get_method("int8")
    before = prices.approximate(site, method, method.params())
    exact_s = prices.exact(site).seconds
    monkeypatch.setattr(timings.Timings, "_time", lambda *_: (10 * exact_s,))
    _may_take(monkeypatch, 60.0)
    again = _calibrated()
    again.confirm([((site, None, None), (site, None, None))])
    after = again.approximate(site, method, method.params())
    assert after.seconds == pytest.approx(10 * before.seconds) and after.source == before.source
    assert sum(after.shared.values()) == pytest.approx(10 * sum(before.shared.values()))


def test_small_products_stay_with_the_vendor_where_nothing_was_calibrated() -> None:
    """Getting to our kernels takes longer than a product of 32 x 32."""
    prices, method = pricing.of(Analysis(()), THREADS), get_method("int8")
    for gradient in (Gradient.WEIGHT, Gradient.INPUT):
        site = _linear(gradient)
        price = prices.approximate(site, method, method.params())
        assert price.seconds > 3 * prices.exact(site).seconds


def test_what_a_gpu_would_approximate_is_timed_before_it_is_planned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exact and approximated, once each; what the vendor computes faster stays exact."""
    layers = [conv_layer(number, channels=256, size=32, batch=128) for number in (1, 2)]
    analysis = replace(chain(layers), device="cuda")
    timed: list[tuple[str, str]] = []

    def time(self: Any, way: Any, kernels: Any, _: Any) -> timings.Seconds:
        del self
        site, method, _ = way
        timed.append((site.id, method.name if method else "exact"))
        whole_s = 1.0 if method is None else 2.0 if site.gradient is Gradient.INPUT else 0.5
        return (whole_s / len(kernels),) * len(kernels)

    monkeypatch.setattr(timings.Timings, "_time", time)
    options = Options(budget=1.0, methods=["int8"])
    assert {d.method for d in make_plan(analysis, options, 0, None).approximated} == {"int8"}
    assert not timed, "there is no GPU"
    _may_take(monkeypatch, 60.0)
    plan = make_plan(analysis, options, 0, None)
    assert timed and len(set(timed)) == len(timed)
    assert {d.site.partition(":")[2] for d in plan.approximated} == {"weight"}
    assert plan.prediction is not None
    sources = {site.planned_source for site in plan.prediction.sites.values() if site.approximated}
    assert sources == {"measured"}
    # The next process reads what this one has found.
    before = len(timed)
    assert make_plan(analysis, options, 0, None).decisions == plan.decisions
    assert len(timed) == before


@pytest.mark.usefixtures("interpreted")
def test_products_are_timed_while_a_model_is_being_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On real operands, in the midst of Dynamo's fake ones; here the method's are cheap."""
    results: list[Any] = []

    def fastest(runs: Runs, limit_s: float, before: Callable[[], object]) -> Fastest:
        before()
        results.extend(run() for run in runs)
        return Fastest((limit_s / len(results) / len(runs),) * len(runs), disturbed=False)

    monkeypatch.setattr(timings, "fastest", fastest)
    _may_take(monkeypatch, 60.0)
    model = nn.Sequential(nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    options = {"methods": ["int8"], "budget": 1.0, "strict": True, "warmup_steps": 0}
    compiled = torch.compile(model, backend=approx, options=options)
    compiled(torch.randn(8, 16, 32, 32)).sum().backward()
    sources = {row.prediction.planned_source for row in graphpass.reports()[-1].rows}
    assert results and "measured" in sources
    tensors = [
        x
        for result in results
        for x in ([result] if isinstance(result, torch.Tensor) else result)
        if x is not None
    ]
    assert all(type(x) is torch.Tensor and x.isfinite().all() for x in tensors)


def test_a_method_is_timed_without_being_compiled_on_a_gpu() -> None:
    """The same operations give the same result, in the layout of the product."""
    site, method = _linear(Gradient.WEIGHT), get_method("int8")
    given = trial.operands(site, "cpu")
    results: Any = trial.uncompiled(site, method, method.params(), given)()
    product, exact = results[0].flatten(), given["left"].matmul(given["right"]).flatten()
    assert torch.nn.functional.cosine_similarity(product, exact, dim=0) > 0.99


def test_unreadable_measurements_are_forgotten(tmp_path: Path, logged: list[str]) -> None:
    (tmp_path / f"measured-{THREADS}.json").write_text("{")
    assert not pricing.of(Analysis(()), THREADS).timings.seconds
    assert "ignoring the unreadable file" in logged[0]


class Block(nn.Module):
    """A convolution, its normalisation and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)) + x)


def test_the_rest_of_a_step_is_counted_as_it_is_fused() -> None:
    """What moves: twice conv's output and the shortcut, forward; about as much again, backward."""
    x = torch.randn(8, 16, 32, 32, requires_grad=True)
    (analysis,) = dry_run.analyses(Block(), x)
    assert analysis.device == "cpu"
    large = [count for count in analysis.rest_bytes if count >= x.nbytes]
    # Statistics, then the block's output; the gradient's sums, then what the convolution is given.
    assert 3 <= len(large) <= 6
    assert 8 <= sum(large) / x.nbytes <= 15


@pytest.mark.skipif(int8.unsupported() is not None, reason="this processor has no VNNI")
def test_calibrating_measures_writes_and_shows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a few small shapes; what is measured in earnest takes a minute."""
    small = (2, 16, 16, 8, 3, 1, 1)
    monkeypatch.setattr(workloads, "CONVOLUTIONS", (small,))
    monkeypatch.setattr(workloads, "OUR_CONVOLUTIONS", ())
    monkeypatch.setattr(workloads, "LINEARS", ((8, 16, 16),))
    monkeypatch.setattr(workloads, "OUR_LINEARS", ((8, 16, 16),))
    monkeypatch.setattr(workloads, "BATCHES", ((2, 8, 8, 8),))
    monkeypatch.setattr(workloads, "ATTENTIONS", ((2, 2, 8, 16),))
    monkeypatch.setattr(workloads, "MOVED_BYTES", (96, 9600))
    monkeypatch.setattr(workloads, "DTYPES", (torch.float32,))
    monkeypatch.setattr(workloads, "NORMALISED", {})
    monkeypatch.setattr(calibrate, "_CALLS_S", 0.0)
    monkeypatch.setattr(timing, "_CACHE_BYTES", 64)
    assert __main__.main(["calibrate", "--threads", "1", "--seconds", "1"]) == 0
    assert "GFLOP/s" in capsys.readouterr().out
    hardware = calibration.load(1)
    assert not isinstance(hardware, str) and hardware.calibrated
    kinds = {kind for kind, _ in hardware.efficiencies}
    assert {"convolution_weight", "mm_input", "bmm", "attention_forward", "reduce"} <= kinds
    assert {"int8_round", "absolute_max", "int8_wgrad", "int8_dgrad", "int8_forward"} <= kinds
    assert Machine.this(1).processor in hardware.name
    first = calibration.measurements(1)

    def busy(*given: Any, **named: Any) -> Fastest:
        return replace(timing.fastest(*given, **named), disturbed=True)

    monkeypatch.setattr(calibrate, "fastest", busy)
    said = io.StringIO()
    calibrate.calibrate(1, 0.0, True, Console(file=said, width=200))
    again = calibration.measurements(1)
    assert not isinstance(first, str) and not isinstance(again, str)
    assert f"other programs were running while {len(first)} of {len(first)} k" in said.getvalue()
    faster = {one.identity: one.seconds for one in again}
    assert all(faster[one.identity] <= one.seconds for one in first)


def test_kernels_are_calibrated_in_the_order_that_a_method_runs_them_in() -> None:
    """Each finds what the one before it wrote; what products have in common is timed once."""
    site = _linear(Gradient.INPUT)
    loads = workloads._ours([site, _linear(Gradient.WEIGHT)])
    chains = [[kernel.kind for kernel in load.kernels] for load in loads]
    rounding = ["absolute_max", "int8_round"]
    assert [*rounding, *rounding, "int8_dgrad"] in chains
    assert [*rounding, *rounding, "int8_wgrad"] in chains
    identities = [{f"{k.kind} {k.cost}" for k in load.kernels} for load in loads]
    for number, new in enumerate(identities):
        assert new - set[str]().union(*identities[:number])


@pytest.mark.parametrize("argument", ["0", "-1", "x"])
def test_a_senseless_number_of_threads_is_refused(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        __main__.main(["calibrate", "--threads", argument])
    assert "no whole number >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("method", methods().values(), ids=methods().keys())
def test_every_kernel_has_sizes_that_can_be_priced(method: Method) -> None:
    """At least one, so that a table can be made of it; all are 1 or more."""
    for make in workloads.ours(torch.float32)[:1]:
        for site in make.args[1](*make.args[2], make.args[3]):
            params = method.params()
            if site.gradient in method.gradients and method.reject(site, params) is None:
                for kernel in method.cost(site, params):
                    assert kernel.sizes
                    assert all(size >= 1 for size in kernel.sizes.values())
