"""Whole training steps on a GPU against Inductor; a section of `benchmarks.gpu`, a process a model.

    python -m benchmarks.gpu_steps resnet50 bf16 --seconds 100

Prints a line of JSON for every setting, as soon as it is measured.
"""

import argparse
import json
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

import graphpass
from benchmarks import gpu_timing
from benchmarks.gpu_alone import alone, choosing_alone
from benchmarks.gpu_sections import allow_tf32
from benchmarks.gpu_warm import Warmer
from examples.models import build
from graphpass.backend import approx

Step = Callable[[], torch.Tensor]
# Batch and side of the images; 56 pixels for ResNet-50, whose stem for small images leaves them
# whole: the maps behind it are those of 224 x 224.
SIZES = {"resnet50": (128, 56), "vit-s": (512, 32)}
USUAL = (512, 32)
BOTH = ("weight", "input")
EVERYWHERE = ("forward", *BOTH)
# Settings in order of worth: what is given to the backend, None for Inductor.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "budget 0.1": {"budget": 0.1},
    "pixels": {"methods": {"*": {"name": "pixels", "gradient": "weight"}}},
    "bf16": {"methods": {"*": [{"name": "bf16", "gradient": side} for side in EVERYWHERE]}},
    "budget 0.1, forward": {"budget": 0.1, "gradients": list(EVERYWHERE)},
    "int8": {"methods": {"*": [{"name": "int8", "gradient": side} for side in BOTH]}},
    "inductor, CUDA graphs": None,
    "budget 0.1, CUDA graphs": {"budget": 0.1},
    "fp8": {"methods": {"*": [{"name": "fp8", "gradient": side} for side in BOTH]}},
    "inductor, max-autotune": None,
}
# Nothing to round.
_FP32_ONLY = {"bf16"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--until", type=float, help="on the monotonic clock, instead")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    given = parser.parse_args(argv)
    allow_tf32()
    # Every setting compiles the same code: Dynamo would give up after a few of them.
    torch._dynamo.config.recompile_limit = 64
    until = given.until or time.monotonic() + given.seconds
    settings = [s for s in given.settings if given.dtype == "fp32" or s not in _FP32_ONLY]
    major, minor = torch.cuda.get_device_capability() if given.device == "cuda" else (0, 0)
    warmer = Warmer(10 * major + minor, 3) if given.device == "cuda" else nullcontext()
    with warmer, choosing_alone():
        for record in measure(given.model, given.dtype, given.device, settings, until):
            print(json.dumps(record), flush=True)


def measure(
    name: str, dtype: str, device: str, settings: Sequence[str], until: float
) -> Iterator[dict[str, Any]]:
    """Yield a record of each setting: compilation, warnings, seconds beside Inductor's."""
    base: dict[str, Step] = {}
    for setting in settings:
        record: dict[str, Any] = {"model": name, "dtype": dtype, "setting": setting}
        if time.monotonic() > until - 15:
            yield {**record, "none": "no time was left"}
            continue
        yield {**record, "begun": True}
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                start = time.perf_counter()
                step = make_step(name, dtype, device, setting)
                losses = [float(step()) for _ in range(3 if device == "cuda" else 1)]
                record["compile_s"] = time.perf_counter() - start
            # Other warnings are torch's own, of no account here.
            record["warnings"] = sorted({str(w.message)[:500] for w in caught if
                                         "graphpass" in str(w.message)})  # fmt: skip
            record["losses"] = losses
            graphs = "CUDA graphs" in setting
            kind = "inductor, CUDA graphs" if graphs else "inductor"
            with alone():
                steps = {setting: step, **({kind: base[kind]} if kind in base else {})}
                turns, repeat = (5, 5) if device == "cuda" else (1, 1)
                seconds = gpu_timing.step_times(steps, device, turns, repeat)
                if device == "cuda" and not graphs:
                    record["kernels"] = gpu_timing.kernels(step)
            record["step_s"] = seconds[setting]
            if kind in seconds:
                record["inductor_s"], record["beside"] = seconds[kind], kind
            if setting == kind:
                base[kind] = step
            elif not setting.startswith("inductor"):
                report = graphpass.reports()[-1]
                record["approximated"] = len(report.approximated)
                chosen = Counter(f"{row.method} {row.gradient}" for row in report.approximated)
                record["chosen"] = dict(chosen)
                if report.prediction is not None:
                    record["predicted_step_s"] = report.prediction.step_s
                    record["predicted_exact_s"] = report.prediction.exact_step_s
                record["not"] = sorted({str(row.reason) for row in report.rows if row.reason})[:8]
            if device == "cuda":
                record["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
        except Exception:
            record["failed"] = traceback.format_exc()[-4000:]
        yield record
        if "illegal" in str(record.get("failed", "")):
            return


def make_step(name: str, dtype: str, device: str, setting: str) -> Step:
    """Return a compiled training step: forward, loss, backward, optimizer."""
    torch.manual_seed(0)
    batch, side = SIZES.get(name, USUAL) if device == "cuda" else (4, 32)
    model = build(name, image_size=side).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch,), device=device)
    inductor: dict[str, Any] = {"triton.cudagraphs": True} if "CUDA graphs" in setting else {}
    options = SETTINGS[setting]
    if options is not None:
        given: dict[str, Any] = {**options, "inductor": inductor}
        compiled = torch.compile(model, backend=approx, options=given)
    elif "max-autotune" in setting:
        compiled = torch.compile(model, mode="max-autotune")
    else:
        compiled = torch.compile(model, options=inductor or None)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16")

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = F.cross_entropy(compiled(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


if __name__ == "__main__":
    main()
