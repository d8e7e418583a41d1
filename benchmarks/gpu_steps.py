"""Whole training steps on a GPU against Inductor; a section of `benchmarks.gpu`, a process a model.

    python -m benchmarks.gpu_steps resnet50 bf16 --seconds 100

Prints a line of JSON for every setting, as soon as it is measured.
"""

import argparse
import fcntl
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import graphpass
from benchmarks import gpu_timing
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
# Settings in order of worth: what is given to the backend, None for Inductor.
SETTINGS: dict[str, dict[str, Any] | None] = {
    "inductor": None,
    "int8": {"methods": {"*": [{"name": "int8", "gradient": side} for side in BOTH]}},
    "fp8": {"methods": {"*": [{"name": "fp8", "gradient": side} for side in BOTH]}},
    "pixels": {"methods": {"*": {"name": "pixels", "gradient": "weight"}}},
    "inductor, CUDA graphs": None,
    "int8, CUDA graphs": {"methods": {"*": [{"name": "int8", "gradient": side} for side in BOTH]}},
    "pixels, CUDA graphs": {"methods": {"*": {"name": "pixels", "gradient": "weight"}}},
    "budget 0.1": {"budget": 0.1},
    "inductor, max-autotune": None,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_steps", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("dtype", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    given = parser.parse_args(argv)
    allow_tf32()
    # Every setting compiles the same code: Dynamo would give up after a few of them.
    torch._dynamo.config.recompile_limit = 64
    until = time.monotonic() + given.seconds
    major, minor = torch.cuda.get_device_capability() if given.device == "cuda" else (0, 0)
    with Warmer(10 * major + minor, 3) if given.device == "cuda" else nullcontext():
        for record in measure(given.model, given.dtype, given.device, given.settings, until):
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
                turns, repeat = (7, 10) if device == "cuda" else (1, 1)
                seconds = gpu_timing.step_times(steps, device, turns, repeat)
            record["step_s"] = seconds[setting]
            if kind in seconds:
                record["inductor_s"], record["beside"] = seconds[kind], kind
            if setting == kind:
                base[kind] = step
            elif not setting.startswith("inductor"):
                report = graphpass.reports()[-1]
                record["approximated"] = len(report.approximated)
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


@contextmanager
def alone() -> Iterator[None]:
    """Time while no other process of this benchmark does."""
    with Path(tempfile.gettempdir(), f"graphpass-gpu-{os.getuid()}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    main()
