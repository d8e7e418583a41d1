"""Everything that needs a GPU, in one run of at most 8 minutes on a bare machine.

    python -m benchmarks.gpu                       # writes results/gpu.json and results/gpu.txt
    python -m benchmarks.gpu --sections steps      # that alone, with all the time there is
    python -m benchmarks.gpu --device cpu --minutes 3    # the flow alone, tiny shapes, no Triton

Every kernel against float64; layers against the vendor's library; whole training steps against
Inductor; and whatever trainings are asked for, commands that write their results themselves. All
run at once, as most of it is compilation: whoever times has the others stopped (`gpu_alone`). Each
is a process of its own with a limit on its time, so that a kernel that fails, hangs or breaks the
device costs no more than its own figures; what a process printed before it ended counts. The
results are written after every process. Nothing is needed but torch, Triton and what torch brings
along, and rich.
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

from benchmarks import gpu_alone

Record = dict[str, Any]
ROOT = Path(__file__).parent.parent
# In order of worth; five of them at a time.
MODELS = (
    ("wrn-28-10", "bf16"), ("resnet50", "bf16"), ("resnet50", "fp32"), ("resnet20", "bf16"),
    ("wrn-28-10", "fp32"), ("vgg19", "bf16"), ("vit-s", "bf16"), ("resnet20", "fp32"),
)  # fmt: skip
_MODELS_AT_ONCE = 5
TINY = (("resnet8", "fp32"),)


@dataclass(slots=True)
class Task:
    """One process of a section, and what it prints.

    Attributes:
        section: where its records go.
        arguments: of the interpreter.
        limit_s: when it is ended.
        patient: whether others come first on the processors.
        environment: variables beside those of all.
        records: what it has printed.
        failed: how it ended, if not well.
    """

    section: str
    arguments: list[str]
    limit_s: float
    patient: bool = False
    environment: dict[str, str] = field(default_factory=dict)
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

    def run(self, queues: Sequence[tuple[int, Sequence[Task]]]) -> None:
        """Run processes; keep their records and write everything down.

        Args:
            queues: so many at once of each list, in its order.
        """
        waiting = [(most, list(tasks)) for most, tasks in queues]
        running: list[tuple[int, Task, subprocess.Popen[bytes], Path, float]] = []
        while running or any(tasks for _, tasks in waiting):
            for number, (most, tasks) in enumerate(waiting):
                while tasks and sum(item[0] == number for item in running) < most:
                    running.append((number, task := tasks.pop(0), *self._start(task)))
            for item in list(running):
                _, task, process, lines, started = item
                spent = time.monotonic() - started
                late = spent > task.limit_s or self.left_s < 0
                if process.poll() is None and not late:
                    continue
                if process.poll() is None:
                    # With whatever compiles for it.
                    gpu_alone.signal_sessions({process.pid}, signal.SIGKILL)
                    process.wait()
                    task.failed = f"ended after {spent:.0f} s"
                gpu_alone.note(process.pid).unlink(missing_ok=True)
                # It may have been the one that had the others stopped.
                gpu_alone.signal_others(signal.SIGCONT)
                running.remove(item)
                _collect(task, process, lines)
                self._note(task, spent)
            time.sleep(0.1)

    def _start(self, task: Task) -> tuple[subprocess.Popen[bytes], Path, float]:
        folder = Path(tempfile.mkdtemp(prefix="graphpass-gpu-"))
        command = [*(("nice", "-n", "10") if task.patient else ()), sys.executable, *task.arguments]
        environment = {**os.environ, **task.environment}
        if task.section == "trainings":
            # What they find fastest beside all others is not what is fastest.
            environment["GRAPHPASS_CACHE_DIR"] += "-trainings"
        with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=out, stderr=err, start_new_session=True, env=environment
            )
        gpu_alone.note(process.pid).touch()
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
    sections = ["correct", "layers", "steps", "trainings"]
    parser.add_argument("--sections", nargs="+", default=sections, choices=sections)
    parser.add_argument("--kernels", nargs="+", help="check these alone")
    parser.add_argument("--layers", nargs="+", default=["wide", "ga", "resnet50"])
    parser.add_argument("--models", nargs="+", help="time these alone, as in resnet50/bf16")
    parser.add_argument(
        "--training", action="append", default=[],
        help="arguments of the interpreter as one text, behind NAME=VALUE of its environment; it "
        "should end by itself half a minute before the run does, or nothing of it is kept; may "
        "be given several times",
    )  # fmt: skip
    given = parser.parse_args(argv)
    _own_folders()
    record: Record = {"date": time.strftime("%Y-%m-%d"), "device": given.device, "sections": {},
                      "processes": []}  # fmt: skip
    run = Run(given.device, time.monotonic() + 60 * given.minutes, given.output, record)
    run.run([(1, [_section(run, "machine", [], 60)])])
    run.run(_queues(run, given))
    # A row that breaks the process of its layers is skipped by the next one.
    for _ in range(3):
        broken = _broken(run, given.layers)
        if not broken or run.left_s < 20:
            break
        run.run([(1, [_layers(run, given.layers, broken)])])
    record["sections"]["choices"] = list(_choices())
    record["sections"]["timings"] = list(_timings())
    run.write()
    print(run.output.with_suffix(".txt").read_text(encoding="utf-8"))


def _queues(run: Run, given: argparse.Namespace) -> list[tuple[int, list[Task]]]:
    """Return what runs beside each other."""
    cores = os.cpu_count() or 1
    queues: list[tuple[int, list[Task]]] = []
    if "steps" in given.sections:
        usual = list(MODELS if run.device == "cuda" else TINY)
        models = [tuple(name.split("/")) for name in given.models] if given.models else usual
        queues.append((_MODELS_AT_ONCE, [_steps(run, *model) for model in models]))
    if "layers" in given.sections:
        queues.append((1, [_layers(run, given.layers, [])]))
        queues.append((1, [_warm(run, given.layers, cores)]))
    if "correct" in given.sections:
        names = given.kernels or _kernels()
        tasks = [_section(run, "correct", [name], 150, patient=True) for name in names]
        queues.append((max(1, cores // 2), tasks))
    if "trainings" in given.sections:
        tasks = [_training(text, run.left_s) for text in given.training]
        queues.append((len(tasks), tasks))
    return queues


def _own_folders() -> None:
    """Use fresh caches: what an older version left there must not be measured."""
    folder = Path(tempfile.mkdtemp(prefix="graphpass-gpu-cache-"))
    for name in ("GRAPHPASS_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        os.environ.setdefault(name, str(folder / name.lower()))
    os.environ[gpu_alone.FOLDER] = str(folder / "processes")
    Path(os.environ[gpu_alone.FOLDER]).mkdir(parents=True)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        (str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))
    )
    os.environ["PYTHONUNBUFFERED"] = "1"
    # Of each of several processes that compile at once.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "3")


def _section(
    run: Run, section: str, names: list[str], limit_s: float, patient: bool = False
) -> Task:
    module = ["-m", "benchmarks.gpu_sections", section, *names, "--device", run.device]
    return Task(section, module, limit_s, patient)


def _kernels() -> list[str]:
    """Return the kernels that are written in Triton."""
    from codegen.kernel import kernels

    return [kernel.name for kernel in kernels().values() if kernel.emit_triton is not None]


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


def _timings() -> Iterator[Record]:
    """Yield what products took that plans turned on."""
    for path in sorted(Path(os.environ["GRAPHPASS_CACHE_DIR"]).glob("measured-*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def _warm(run: Run, names: list[str], cores: int) -> Task:
    workers = ["--workers", str(max(1, cores // 4))]
    module = ["-m", "benchmarks.gpu_warm", *names, "--arch", str(_arch(run)), *workers]
    return Task("warm", module, 200, patient=True)


def _arch(run: Run) -> int:
    """Return the compute capability as Triton writes it; that of an H200 if it is not known."""
    for record in run.record["sections"].get("machine", ()):
        if "capability" in record:
            major, minor = record["capability"]
            return int(10 * major + minor)
    return 90


def _layers(run: Run, names: list[str], skip: list[str]) -> Task:
    task = _section(run, "layers", names, run.left_s)
    task.arguments += ["--skip", *skip] if skip else []
    return task


def _broken(run: Run, names: list[str]) -> list[str]:
    """Return the rows that broke a process of layers, if the last one was broken."""
    processes = [entry for entry in run.record["processes"] if "layers" in entry["arguments"]]
    records = run.record["sections"].get("layers", [])
    if not processes or not names:
        return []
    failed = processes[-1]["failed"]
    fatal = bool(failed) and not failed.startswith("ended after")
    fatal |= any("illegal" in str(record.get("failed", "")) for record in records[-2:])
    done = {(r["row"], r["method"]) for r in records if "exact_s" in r}
    begun = [(r["row"], r["method"], r["begun"]) for r in records if "method" in r and "begun" in r]
    return [label for row, name, label in begun if (row, name) not in done] if fatal else []


def _training(text: str, limit_s: float) -> Task:
    words = text.split()
    first = next(number for number, word in enumerate(words) if word.startswith("-"))
    environment = dict(word.split("=", 1) for word in words[:first])
    return Task("trainings", words[first:], limit_s, True, environment)


def _steps(run: Run, model: str, dtype: str) -> Task:
    module = ["-m", "benchmarks.gpu_steps", model, dtype, "--device", run.device]
    module += ["--until", str(run.until - 15)]
    if run.device == "cpu":
        module += ["--settings", "inductor", "int8"]
    return Task("steps", module, run.left_s)


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
