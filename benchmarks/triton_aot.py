"""Every Triton kernel of every layer, compiled for GPUs where there is none.

    python -m benchmarks.triton_aot                      # GA's layers and ResNet-50's, all targets
    python -m benchmarks.triton_aot ga --targets sm_90 --dtypes bf16

Records registers, spilled bytes, shared memory and matrix instructions of the machine code, and
beside them a prediction: the seconds that counted bytes and operations take at the published rates
of an H200, whole waves of tiles counted; for GA's layers as a table, in a text of its own. A binary
proves that a kernel compiles and fits, not that it is right or fast.
"""

import argparse
import json
import re
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil, prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_warm, layer
from benchmarks.timing import write_results
from codegen.gpu import ahead, target
from codegen.gpu import build as gpu_build
from codegen.gpu.source import Program
from cost_model import DATASHEETS

Record = dict[str, Any]
TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64),
    "sm_89": ("cuda", 89, 32),
}  # fmt: skip
_USUAL = ("sm_80", "sm_90", "gfx942")
_MACHINE = DATASHEETS["H200"]
_PREDICTED = "sm_90"
_MATRIX = re.compile(r"(?:wgmma\.mma_async|mma\.sync|v_mfma)[\w.:]*")


@dataclass(frozen=True, slots=True)
class Job:
    """A program to compile.

    Attributes:
        primitive: its name.
        program: its Triton.
        dtypes: of operands and results.
        moved_bytes: of operands, results and scratch memory.
        layers: those that need it, with their types.
    """

    primitive: str
    program: Program
    dtypes: list[torch.dtype]
    moved_bytes: int
    layers: list[str]


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_aot", description=__doc__)
    names = ["ga", "resnet50"]
    parser.add_argument("layers", nargs="*", default=names, help=" or ".join(names))
    parser.add_argument("--targets", nargs="+", default=_USUAL, choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(layer.DTYPES))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", default="triton_aot", help="name of the results file")
    given = parser.parse_args(argv)
    shapes = [shape for name in given.layers for shape in layer.NAMED[name]]
    jobs = [
        (name, program) for name in given.targets for program in collect(shapes, given.dtypes, name)
    ]
    start, rows = time.perf_counter(), []
    with ProcessPoolExecutor(given.workers) as pool:
        for records in pool.map(compile_program, jobs):
            rows += records
            for record in records:
                print(json.dumps(record), flush=True)
    summary = list(summary_of(rows))
    record = {"prediction": "H200 data sheet", "compile_s": time.perf_counter() - start}
    # Times are predicted for an H200; of other targets, what went wrong is worth a row.
    kept = [row for row in rows if row["target"] == _PREDICTED or not _is_clean(row)]
    path = write_results(given.output, {**record, "summary": summary, "rows": kept})
    table = "\n".join(roofline_of(kept)) + "\n"
    path.with_suffix(".txt").write_text(table, encoding="utf-8")
    print("\n".join(summary), "", table, f"written to {path}", sep="\n")


def collect(shapes: Sequence[layer.Shape], types: Sequence[str], architecture: str) -> list[Job]:
    """Return each program that the layers need, once.

    Args:
        shapes: the layers.
        types: names of element types.
        architecture: what is to run them: not every GPU has 8-bit floats, nor the same ones.

    Raises:
        RuntimeError: if a layer cannot be traced.
    """
    found: dict[str, Job] = {}
    current = ""

    def note(name: str, programs: tuple[Program, ...], tensors: list[Tensor]) -> None:
        program = programs[0]
        # Scratch memory is written and read.
        scratch = sum(2 * x.elements * x.dtype.itemsize for x in program.scratch)
        moved = sum(x.numel() * x.itemsize for x in tensors) + scratch
        dtypes = [tensor.dtype for tensor in tensors]
        job = found.setdefault(program.text, Job(name, program, dtypes, moved, []))
        if current not in job.layers:
            job.layers.append(current)

    gpu_build.LISTENERS.append(note)
    try:
        with mock.patch.object(target, "architecture", lambda: architecture):
            for name in types:
                for shape in shapes:
                    current = f"{name} {'x'.join(map(str, shape))}"
                    for failure in gpu_warm.announce([shape], [name]):
                        raise RuntimeError(str(failure))
    finally:
        gpu_build.LISTENERS.remove(note)
    return list(found.values())


def compile_program(what: tuple[str, Job]) -> list[Record]:
    """Return a record of each kernel of a program, compiled for one target."""
    from triton.backends.compiler import GPUTarget

    machine, job = what
    program = job.program
    records = []
    for launch in ahead.launches(job.primitive, program, job.dtypes):
        record: Record = {
            "target": machine, "primitive": job.primitive, "kernel": launch.kernel.__name__,
            "layers": job.layers, "file": gpu_build.path_of(job.primitive, program).name,
            "about": program.text.splitlines()[0].strip('"'),
            "grid": list(launch.grid), "program_bytes": job.moved_bytes,
            "predicted_memory_s": job.moved_bytes / _MACHINE.bandwidth_bytes_per_s.value,
        }  # fmt: skip
        try:
            compiled = ahead.compile_for(launch, GPUTarget(*TARGETS[machine]))
        except Exception as error:
            records.append({**record, "failed": f"{type(error).__name__}: {error}"[:2000]})
            continue
        text = compiled.asm["ptx" if machine.startswith("sm") else "amdgcn"]
        record["shared_bytes"] = compiled.metadata.shared
        record["matrix_instructions"] = dict(Counter(_MATRIX.findall(text)).most_common(3))
        record["registers"], record["spilled_bytes"] = ahead.usage(compiled)
        if launch.kernel.__name__ == "product":
            record |= _prediction(program, launch)
        records.append(record)
    return records


def _prediction(program: Program, launch: ahead.Launch) -> Record:
    """Return operations of one launch, padding of tiles included, and how long an H200 takes."""
    constants = dict(re.findall(r"^(\w+) = tl\.constexpr\((.+)\)$", program.text, re.MULTILINE))
    number = {key: int(value) for key, value in constants.items() if value.isdigit()}
    if "STEPS" in number:
        steps = number["STEPS"]
    else:
        options = launch.options
        steps = options["TAPS_Y"] * options["TAPS_X"] * options["BLOCKS"]
    programs = prod(launch.grid)
    operations = 2 * programs * steps * number["BM"] * number["BN"] * number["BK"]
    peak = _MACHINE.peak_flops_per_s[_MULTIPLIED.get(launch.dtypes[0], "int8")].value
    units = _MACHINE.multiprocessors
    assert units is not None
    # The last wave of tiles takes as long as a full one.
    waves = ceil(programs / units.count.value) * units.count.value / programs
    return {"operations": operations, "predicted_matrix_s": operations / peak * waves}


# float32 as tf32.
_MULTIPLIED = {torch.float32: "tf32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def roofline_of(rows: Sequence[Record]) -> Iterator[str]:
    """Yield tables of what is predicted: a row a primitive, a column a layer of GA's table."""
    yield "PREDICTION, not measured: microseconds on an H200, at the rates of its data sheet. Bytes"
    yield "are operands, results and scratch memory, each once, operations those of whole waves of"
    yield "tiles. A primitive takes the longer of both (m memory, x matrix instructions); where a"
    yield "layer calls it several times, as for both operands, the longest call is shown."
    # Of each program, the memory of all its kernels, and what those multiply one after the other.
    moving, multiplying = dict[str, float](), dict[str, float]()
    programs: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        if row["target"] == _PREDICTED:
            name = row["file"]
            moving[name] = row["predicted_memory_s"]
            multiplying[name] = multiplying.get(name, 0.0) + row.get("predicted_matrix_s", 0.0)
            for where in row["layers"]:
                programs.setdefault((row["primitive"], where), set()).add(name)
    layers = ["x".join(map(str, shape)) for shape in layer.GA]
    for dtype in layer.DTYPES:
        primitives = sorted({name for name, where in programs if where.startswith(dtype)})
        if primitives:
            yield f"\n{dtype:16}" + "".join(f"{name:>15}" for name in layers)
        for primitive in primitives:
            found = (programs.get((primitive, f"{dtype} {where}"), ()) for where in layers)
            cells = (_longest(files, moving, multiplying) for files in found)
            yield f"{primitive:16}{''.join(f'{cell:>15}' for cell in cells)}".rstrip()


def _longest(
    files: Collection[str], moving: Mapping[str, float], multiplying: Mapping[str, float]
) -> str:
    """Return the longest of a layer's programs of one kind, and what bounds it."""
    times = [(moving[name], "m") for name in files] + [(multiplying[name], "x") for name in files]
    seconds, bound = max(times, default=(0.0, ""))
    return f"{1e6 * seconds:.1f} {bound}" if bound else ""


def _is_clean(row: Record) -> bool:
    return "failed" not in row and not row["spilled_bytes"]


def summary_of(rows: Sequence[Record]) -> Iterator[str]:
    """Yield a table: by target and kernel, how many, and the worst of each figure."""
    head = f"{'target':8}{'primitive':17}{'kernel':14}{'count':>6}{'failed':>7}{'registers':>10}"
    yield f"{head}{'spilled B':>10}{'shared B':>10}  matrix instruction"
    for machine, name, kernel in sorted({(r["target"], r["primitive"], r["kernel"]) for r in rows}):
        group = [
            row for row in rows
            if (row["target"], row["primitive"], row["kernel"]) == (machine, name, kernel)
        ]  # fmt: skip
        good = [row for row in group if "failed" not in row]
        most = [
            max((row[key] or 0 for row in good), default=0)
            for key in ("registers", "spilled_bytes", "shared_bytes")
        ]
        used = sorted({key for row in good for key in row["matrix_instructions"]})
        figures = "".join(f"{figure:>10}" for figure in most)
        failed = len(group) - len(good)
        yield f"{machine:8}{name:17}{kernel:14}{len(group):>6}{failed:>7}{figures}  " + " ".join(
            used[:2]
        )


if __name__ == "__main__":
    main()
