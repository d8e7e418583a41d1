"""The table of methods says what the registry says, in the terminal and in the README."""

import json
from collections import defaultdict
from pathlib import Path
from statistics import median

import pytest

from graphpass import __main__, listing, methods

README = Path(__file__).parents[2] / "README.md"
RESULTS = README.parent / "benchmarks" / "results"


def test_the_readme_has_the_table_of_the_registry() -> None:
    """After a change of a method, put the output of `listing.markdown()` there."""
    assert listing.markdown() in README.read_text(encoding="utf-8")


def test_every_method_has_a_row() -> None:
    names = [row[0].strip("`") for row in listing.rows()]
    assert names == list(methods())
    assert all(len(row) == len(listing.COLUMNS) and all(row) for row in listing.rows())


def test_priors_and_kernels_are_those_of_the_methods() -> None:
    rows = {row[0]: dict(zip(listing.COLUMNS, row, strict=True)) for row in listing.rows()}
    assert rows["`int8`"]["by"] == "C++, Triton"
    assert "weight: tau 0.002" in rows["`int8`"]["adds on ResNet-20"]
    assert "forward: tau 0.015, bias 0.0056" in rows["`int8`"]["adds on ResNet-20"]
    assert rows["`meprop`"]["adds on ResNet-20"] == "not measured"
    assert rows["`crs`"]["unbiased"] == "yes"
    assert rows["`crs`"]["keeps state"] == "no"
    assert rows["`swat`"]["keeps state"] == rows["`meprop`"]["keeps state"] == "by option"


def test_what_is_fast_was_measured() -> None:
    """Most layers of the benchmark, in float32; a method of weight gradients by those."""
    measured = defaultdict[str, list[float]](list)
    for path in sorted(RESULTS.glob("layers*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            if row["gradient"] == "weight" and row["dtype"] == "float32":
                measured[row["method"]].append(row["exact_over_method"]["median"])
    for name, method in methods().items():
        if name in measured:
            assert method.fast_on_cpu is (median(measured[name]) > 1), name


def test_what_is_fast_on_a_gpu_was_measured() -> None:
    """The same of an H200, in bfloat16, where nothing was."""
    measured = defaultdict[str, list[float]](list)
    for name in ("gpu_kernels", "gpu_layers"):
        record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        for row in record["sections"]["layers"]:
            if row.get("gradient") == "weight" and "times_faster" in row:
                measured[row["method"]].append(row["times_faster"])
    for name, method in methods().items():
        fast = median(measured[name]) > 1 if name in measured else None
        assert method.fast_on_gpu is fast, name


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["methods"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in methods())
