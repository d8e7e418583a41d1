"""Everything that needs a GPU, in one run of at most 8 minutes on a bare machine.

    python -m benchmarks.gpu                       # writes results/gpu.json and results/gpu.txt
    python -m benchmarks.gpu --sections steps      # that alone, with all the time there is
    python -m benchmarks.gpu --device cpu --minutes 3    # the flow alone, tiny shapes, no Triton

Every kernel against float64; GA's eight layers and ResNet-50's against the vendor's library; whole
training steps against Inductor; CIFAR-10 epochs where its files are. Each section is processes of
its own with a limit on their time, so that a kernel that fails, hangs or breaks the device costs no
more than its own figures; what a process printed before it ended counts. The results are written
after every section. Nothing is needed but torch, Triton and what torch brings along.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
ROOT = Path(__file__).parent.parent
# In order of worth; three compile at a time, one measures.
MODELS = (
    ("resnet50", "bf16"), ("resnet20", "bf16"), ("wrn-28-10", "bf16"), ("resnet20", "fp32"),
    ("vgg19", "bf16"), ("vit-s", "bf16"), ("resnet50", "fp32"),
)  # fmt: skip
TINY = (("resnet8", "fp32"),)


@dataclass(slots=True)
class Task:
    """One process of a section, and what it prints.

    Attributes:
        section: where its records go.
        arguments: of the interpreter.
        limit_s: when it is ended.
        records: what it has printed.
        failed: how it ended, if not well.
    """

    section: str
    arguments: list[str]
    limit_s: float
    records: list[Record] = field(default_factory=list)
    failed: str = ""


@dataclass(slots=True)
class Run:
    """The run as a whole.

    Attributes:
        device: "cuda", or "cpu" to try the flow.
        until: when it must be over, on the monotonic clock.
        output: where results are written, without a suffix.
        record: the results so far.
    """

    device: str
    until: float
    output: Path
    record: Record

    @property
    def left_s(self) -> float:
        """Seconds that are left, less what writing takes."""
        return self.until - time.monotonic() - 5

    def run(self, tasks: Sequence[Task], at_once: int) -> None:
        """Run processes, as many at once; keep their records and write everything down."""
        waiting = list(tasks)
        running: list[tuple[Task, subprocess.Popen[bytes], Path, float]] = []
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append((task := waiting.pop(0), *self._start(task)))
            for item in list(running):
                task, process, lines, started = item
                spent = time.monotonic() - started
                late = spent > task.limit_s or self.left_s < 0
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    # With whatever compiles for it.
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    task.failed = f"ended after {spent:.0f} s"
                running.remove(item)
                _collect(task, process, lines)
                self._note(task, spent)
            time.sleep(0.1)

    def _start(self, task: Task) -> tuple[subprocess.Popen[bytes], Path, float]:
        folder = Path(tempfile.mkdtemp(prefix="graphpass-gpu-"))
        command = [sys.executable, *task.arguments]
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True
            )
        return process, folder, time.monotonic()

    def _note(self, task: Task, spent: float) -> None:
        entry = {"arguments": task.arguments[1:], "s": round(spent, 1), "failed": task.failed}
        self.record["sections"].setdefault(task.section, []).extend(task.records)
        self.record["processes"].append(entry)
        summary = task.failed.strip().splitlines()[-1:] or ["done"]
        print(
            f"[{self.left_s:5.0f} s left] {' '.join(task.arguments[1:])}: {summary[0]}", flush=True
        )
        self.write()

    def write(self) -> None:
        """Write what there is."""
        from benchmarks.gpu_table import table

        self.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=1) + "\n"
        self.output.with_suffix(".json").write_text(text, encoding="utf-8")
        self.output.with_suffix(".txt").write_text(table(self.record), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    """Run every section, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--minutes", type=float, default=7.8)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu")
    parser.add_argument("--data", help="folder with the files of CIFAR-10")
    sections = ["correct", "layers", "steps", "epochs"]
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    given = parser.parse_args(argv)
    _own_caches()
    record: Record = {"date": time.strftime("%Y-%m-%d"), "device": given.device, "sections": {},
                      "processes": []}  # fmt: skip
    run = Run(given.device, time.monotonic() + 60 * given.minutes, given.output, record)
    cores = os.cpu_count() or 1
    run.run([_section(run, "machine", [], 60)], 1)
    models = list(MODELS if given.device == "cuda" else TINY)
    models = models if "steps" in given.sections else []
    together: list[Task] = []
    if {"correct", "layers"} & set(given.sections):
        # While kernels are checked and compiled, so are the first models: steps are timed one model
        # at a time, after a minute of compilation, when little else is left to run.
        together = [_warm(run, cores)] if "layers" in given.sections else []
        together += [_steps(run, *model, 0.45 * run.left_s) for model in models[:3]]
        models = models[3:]
    if "correct" in given.sections:
        together += [_section(run, "correct", [name], 150) for name in _kernels()]
    run.run(together, max(2, cores - 2))
    if "layers" in given.sections:
        for name in _names(run):
            _layers(run, name)
    limit = max(60.0, run.left_s * 0.5)
    run.run([_steps(run, *model, limit) for model in models], min(3, cores))
    if "epochs" in given.sections and given.data:
        run.run([_epochs(run, given.data)], 1)
    record["sections"]["choices"] = list(_choices())
    run.write()
    print(run.output.with_suffix(".txt").read_text(encoding="utf-8"))


def _own_caches() -> None:
    """Use fresh caches: what an older version left there must not be measured."""
    folder = Path(tempfile.mkdtemp(prefix="graphpass-gpu-cache-"))
    for name in ("GRAPHPASS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(folder / name.lower()))
    os.environ["PYTHONPATH"] = os.pathsep.join(
        (str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))
    )
    os.environ["PYTHONUNBUFFERED"] = "1"
    # Of each of several processes that compile at once.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")


def _section(run: Run, section: str, names: list[str], limit_s: float) -> Task:
    module = ["-m", "benchmarks.gpu_sections", section, *names, "--device", run.device]
    return Task(section, module, limit_s)


def _kernels() -> list[str]:
    """Return the kernels that are written in Triton."""
    from codegen.kernel import kernels

    return [kernel.name for kernel in kernels().values() if kernel.emit_triton is not None]


def _names(run: Run) -> list[str]:
    return ["ga", "resnet50"] if run.device == "cuda" else ["tiny"]


def _choices() -> Iterator[Record]:
    """Yield what the timed comparisons of programs and plain torch came to."""
    for path in sorted(Path(os.environ["GRAPHPASS_CACHE_DIR"], "triton").glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            seconds = dict(found["seconds"])
            first = path.stem.rpartition("-")[0]
            yield {"kernel": first.rpartition("-")[0], "predicted": f"{first}.py",
                   "fastest": found["fastest"], "seconds": seconds,
                   "out": dict(found["failed"])}  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            yield {"failed": f"{path.name}: {error}"}


def _warm(run: Run, cores: int) -> Task:
    workers = ["--workers", str(max(1, cores // 2))]
    module = ["-m", "benchmarks.gpu_warm", *_names(run), "--arch", str(_arch(run)), *workers]
    return Task("warm", module, 150)


def _arch(run: Run) -> int:
    """Return the compute capability as Triton writes it; that of an H200 if it is not known."""
    for record in run.record["sections"].get("machine", ()):
        if "capability" in record:
            major, minor = record["capability"]
            return int(10 * major + minor)
    return 90


def _layers(run: Run, name: str) -> None:
    """Measure layers; a row that breaks the process is skipped by the next one."""
    skip: list[str] = []
    for _ in range(4):
        limit = max(20.0, min(80.0, run.left_s * 0.25))
        task = _section(run, "layers", [name], limit)
        task.arguments += ["--skip", *skip] if skip else []
        run.run([task], 1)
        begun = [record.get("begun") for record in task.records if "method" in record]
        broken = task.failed and not task.failed.startswith("ended after")
        fatal = any("illegal" in str(record.get("failed", "")) for record in task.records)
        if not (broken or fatal):
            return
        skip += [label for label in begun if label]


def _steps(run: Run, model: str, dtype: str, limit_s: float) -> Task:
    module = ["-m", "benchmarks.gpu_steps", model, dtype, "--device", run.device]
    module += ["--seconds", str(round(limit_s))]
    if run.device == "cpu":
        module += ["--settings", "inductor", "int8"]
    return Task("steps", module, limit_s + 20)


def _epochs(run: Run, data: str) -> Task:
    module = ["-m", "examples.cifar10", "--data", data, "--device", run.device, "--epochs", "2"]
    return Task("epochs", module, max(30.0, run.left_s))


def _collect(task: Task, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Read what a process printed: whole lines of JSON; of its errors the end."""
    for line in (folder / "out").read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = {"printed": line[:500]}
        task.records.append(record if isinstance(record, dict) else {"printed": record})
    if process.returncode != 0:
        errors = (folder / "err").read_text(encoding="utf-8", errors="replace")
        task.failed = task.failed or f"exit status {process.returncode}\n{errors[-4000:]}"


if __name__ == "__main__":
    main()
