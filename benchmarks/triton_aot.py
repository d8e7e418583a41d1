"""Every Triton kernel of every layer, compiled for GPUs where there is none.

    python -m benchmarks.triton_aot                      # GA's layers and ResNet-50's, all targets
    python -m benchmarks.triton_aot ga --targets sm_90 --dtypes bf16

Records registers, spilled bytes, shared memory and matrix instructions of the machine code, and
beside them a prediction: the seconds that counted bytes and operations take at the published rates
of an H200. A binary proves that a kernel compiles and fits, not that it is right or fast.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import gpu_sections, gpu_warm
from benchmarks.timing import write_results
from codegen.gpu import ahead, target
from codegen.gpu import build as gpu_build
from codegen.gpu.source import Program

Record = dict[str, Any]
TARGETS = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64),
    "sm_89": ("cuda", 89, 32),
}  # fmt: skip
_USUAL = ("sm_80", "sm_90", "gfx942")
# Dense rates and bandwidth of the H200 SXM: NVIDIA's data sheet, November 2024. 8-bit floats, like
# 8-bit integers, are bytes here, and as fast.
_RATES = {"uint8": 1979e12, "bfloat16": 989e12, "float32": 494e12}
_BYTES_PER_S = 4.8e12
_PREDICTED = "sm_90"
_MATRIX = re.compile(r"(?:wgmma\.mma_async|mma\.sync|v_mfma)[\w.:]*")


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, print a table, write the results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_aot", description=__doc__)
    names = ["ga", "resnet50"]
    parser.add_argument("layers", nargs="*", default=names, help=" or ".join(names))
    parser.add_argument("--targets", nargs="+", default=_USUAL, choices=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", default=list(gpu_sections.DTYPES))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", default="triton_aot", help="name of the results file")
    given = parser.parse_args(argv)
    jobs = [
        (name, *program)
        for name in given.targets
        for program in collect(given.layers, given.dtypes, name)
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
    print("\n".join(summary), f"\nwritten to {path}")


def collect(
    layers: Sequence[str], dtypes: Sequence[str], architecture: str
) -> list[tuple[str, Program, list[Any], int]]:
    """Return each program that the layers need, once, the types of its tensors, and their bytes.

    Args:
        layers: "ga", "resnet50" or "tiny".
        dtypes: names of element types.
        architecture: what is to run them: not every GPU has 8-bit floats, nor the same ones.

    Raises:
        RuntimeError: if a layer cannot be traced.
    """
    found: dict[str, tuple[str, Program, list[torch.dtype], int]] = {}

    def note(name: str, program: Program, tensors: list[Tensor]) -> None:
        # Scratch memory is written and read.
        scratch = sum(2 * x.elements * x.dtype.itemsize for x in program.scratch)
        moved = sum(x.numel() * x.itemsize for x in tensors) + scratch
        found[program.text] = (name, program, [x.dtype for x in tensors], moved)

    gpu_build.LISTENERS.append(note)
    try:
        with mock.patch.object(target, "architecture", lambda: architecture):
            for failure in gpu_warm.announce(layers, dtypes):
                raise RuntimeError(str(failure))
    finally:
        gpu_build.LISTENERS.remove(note)
    return list(found.values())


def compile_program(job: tuple[str, str, Program, list[torch.dtype], int]) -> list[Record]:
    """Return a record of each kernel of a program, compiled for one target."""
    from triton.backends.compiler import GPUTarget

    machine, name, program, dtypes, moved = job
    records = []
    for launch in ahead.launches(name, program, dtypes):
        record: Record = {
            "target": machine, "primitive": name, "kernel": launch.kernel.__name__,
            "about": program.text.splitlines()[0].strip('"'), "grid": list(launch.grid),
            "program_bytes": moved, "predicted_memory_s": moved / _BYTES_PER_S,
        }  # fmt: skip
        try:
            compiled = ahead.compile_for(launch, GPUTarget(*TARGETS[machine]))
        except Exception as error:
            records.append({**record, "failed": f"{type(error).__name__}: {error}"[:2000]})
            continue
        text = compiled.asm["ptx" if machine.startswith("sm") else "amdgcn"]
        record["shared_bytes"] = compiled.metadata.shared
        record["matrix_instructions"] = dict(Counter(_MATRIX.findall(text)).most_common(3))
        record |= _usage(compiled) if machine.startswith("sm") else _amd_usage(text)
        if launch.kernel.__name__ == "product":
            record |= _prediction(program, launch)
        records.append(record)
    return records


def _usage(compiled: Any) -> Record:
    """Return registers and spilled bytes, as Triton's copy of cuobjdump reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    registers, local = re.search(r"REG:(\d+)", text), re.search(r"LOCAL:(\d+)", text)
    stack = re.search(r"STACK:(\d+)", text)
    return {
        "registers": int(registers[1]) if registers else None,
        "spilled_bytes": int(local[1]) + int(stack[1] if stack else 0) if local else None,
    }


def _amd_usage(text: str) -> Record:
    registers, spills = (
        re.search(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")
    )
    return {
        "registers": int(registers[1]) if registers else None,
        "spilled_bytes": 4 * int(spills[1]) if spills else None,
    }


def _prediction(program: Program, launch: ahead.Launch) -> Record:
    """Return operations of one launch, padding of tiles included, and how long an H200 takes."""
    constants = dict(re.findall(r"^(\w+) = tl\.constexpr\((.+)\)$", program.text, re.MULTILINE))
    number = {key: int(value) for key, value in constants.items() if value.isdigit()}
    if "STEPS" in number:
        steps = number["STEPS"]
    else:
        options = launch.options
        steps = options["TAPS_Y"] * options["TAPS_X"] * options["BLOCKS"]
    programs = launch.grid[0] * launch.grid[1] * (launch.grid[2] if len(launch.grid) > 2 else 1)
    operations = 2 * programs * steps * number["BM"] * number["BN"] * number["BK"]
    name = str(launch.dtypes[0]).removeprefix("torch.")
    return {"operations": operations, "predicted_matrix_s": operations / _RATES[name]}


def _is_clean(row: Record) -> bool:
    return "failed" not in row and not row["spilled_bytes"]


def summary_of(rows: Sequence[Record]) -> Iterator[str]:
    """Yield a table: by target and kernel, how many, and the worst of each figure."""
    head = f"{'target':8}{'primitive':16}{'kernel':14}{'count':>6}{'failed':>7}{'registers':>10}"
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
        yield f"{machine:8}{name:16}{kernel:14}{len(group):>6}{failed:>7}{figures}  " + " ".join(
            used[:2]
        )


if __name__ == "__main__":
    main()
