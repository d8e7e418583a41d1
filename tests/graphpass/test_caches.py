"""What a second process finds: compiled graphs, what was known of them, and nothing that misleads.

The processes are those of this file itself, run as a program. Each takes a list of runs and prints
what came of every one; the tests look at one run each.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

import graphpass
from graphpass import Schedule, capture, fingerprint, memory, report, variants
from graphpass.capture import Analysis
from tests.compiling import aten_only

WIDTH = 6
BATCH = 4
STEPS = 4
ROOT = Path(__file__).parents[2]

Result = Mapping[str, Any]


class Net(nn.Module):
    """Two linear layers, the same in every instance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(WIDTH, WIDTH)
        self.tail = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(torch.tanh(self.body(x)))
        return y


def batch(number: int, size: int = BATCH) -> Tensor:
    return torch.randn(size, WIDTH, generator=torch.Generator().manual_seed(number))


class UsersPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    """A pass that a user has configured globally; it halves nothing, it counts."""

    calls = 0

    def __call__(self, graph: Graph) -> None:
        del graph
        UsersPass.calls += 1

    def uuid(self) -> str:
        return "a user's pass"


ZERO = {"methods": {"body": "zero"}}
OPTIONS: dict[str, dict[str, Any]] = {
    # Two variants, both compiled at the first step.
    "two": {**ZERO, "schedule": Schedule("every other", every_step=2, phase=1)},
    "zero": ZERO,
    "drawn": {"methods": {"body": {"name": "random", "std": 1.0}}},
    "late": {**ZERO, "schedule": Schedule.after(2)},
    "exact": {"budget": 0},
}


def one_run(what: str) -> dict[str, Any]:
    """Train a new model, and return what could be seen.

    Args:
        what: a key of `OPTIONS`, "inductor", or one of these after "users pass, ".
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    report._GRAPHS.clear()
    captures, UsersPass.calls = _CAPTURES[0], 0
    users, _, name = what.rpartition("users pass, ")
    model = Net()
    options: dict[str, Any] = {"options": OPTIONS[name]} if name in OPTIONS else {}
    call: Any = torch.compile(model, backend="approx" if options else "inductor", **options)
    users_pass = UsersPass() if users or "users pass" in what else None
    # A size of its own, so that the first variant is not there either when the first process comes.
    size = BATCH + 1 if name == "late" else BATCH
    grads = []
    with torch._inductor.config.patch(joint_custom_pre_pass=users_pass):
        for number in range(STEPS):
            call(batch(number, size)).square().sum().backward()
            grads.append([p.grad.tolist() for p in model.parameters() if p.grad is not None])
            model.zero_grad()
    found = counters["aot_autograd"]
    return {
        "hits": found["autograd_cache_hit"],
        "misses": found["autograd_cache_miss"],
        "captures": _CAPTURES[0] - captures,
        "users_calls": UsersPass.calls,
        "reports": [r.to_json() for r in graphpass.reports()],
        "grads": grads,
    }


_CAPTURES = [0]


def main() -> None:
    """Do the runs named on the command line, and print the results as JSON."""
    original = capture.analyse

    def counting(*args: Any, **kwargs: Any) -> Analysis | None:
        _CAPTURES[0] += 1
        return original(*args, **kwargs)

    capture.analyse = counting
    torch.set_num_threads(1)
    with aten_only():
        print(json.dumps({what: one_run(what) for what in sys.argv[1:]}))


def process(folder: Path, *runs: str) -> dict[str, Result]:
    """Do runs in a new process with its caches in `folder`, and return what came of each."""
    environment = {
        **os.environ,
        "GRAPHPASS_CACHE_DIR": str(folder / "graphpass"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", __file__, *runs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results: dict[str, Result] = json.loads(done.stdout.splitlines()[-1])
    return results


# The order matters: what Inductor compiles first is there for the exact variants that follow.
FIRST = ("inductor", "two", "late", "users pass, zero")
SECOND = ("exact", "two", "late", "users pass, zero", "drawn")

Processes = tuple[dict[str, Result], dict[str, Result]]


@pytest.fixture(scope="module")
def first_and_second(tmp_path_factory: pytest.TempPathFactory) -> Processes:
    """Return the runs of a process, and those of a second one with the same caches."""
    caches = tmp_path_factory.mktemp("caches")
    return process(caches, *FIRST), process(caches, *SECOND)


# One worker runs the two processes for all the tests that look at them.
by_one_worker = pytest.mark.xdist_group("first and second process")


def weight(grads: list[Any], layer: int) -> Tensor:
    """Return the weight gradient of a layer, 0 or 1, from the gradients of a step."""
    return torch.tensor(grads[2 * layer])


@by_one_worker
def test_a_second_process_finds_every_variant(first_and_second: Processes) -> None:
    first, second = (runs["two"] for runs in first_and_second)
    # The capture is a miss too, and abandoned.
    assert first["captures"] == 1
    assert first["misses"] >= 2
    assert (second["hits"], second["misses"], second["captures"]) == (2, 0, 0)
    assert second["grads"] == first["grads"]
    zero = [not weight(grads, 0).any() for grads in second["grads"]]
    assert zero == [False, True, False, True]


@by_one_worker
def test_a_second_process_gives_the_same_report(first_and_second: Processes) -> None:
    first, second = (runs["two"] for runs in first_and_second)
    assert second["reports"] == first["reports"]
    (record,) = map(json.loads, second["reports"])
    assert 0 < record["planned_saved_bytes"] < record["exact_saved_bytes"]
    assert record["variants"] == 2


@by_one_worker
def test_a_second_process_finds_late_variants(first_and_second: Processes) -> None:
    first, second = (runs["late"] for runs in first_and_second)
    assert (second["hits"], second["misses"]) == (2, 0)
    # What its compilation showed is remembered as well.
    assert second["reports"] == first["reports"]


@by_one_worker
def test_a_late_variant_of_a_second_process_gives_the_same_gradients(
    first_and_second: Processes,
) -> None:
    first, second = (runs["late"] for runs in first_and_second)
    assert second["captures"] == 0
    assert second["grads"] == first["grads"]
    zero = [not weight(grads, 0).any() for grads in second["grads"]]
    assert zero == [False, False, True, True]


@by_one_worker
def test_an_exact_plan_shares_its_entry_with_inductor(first_and_second: Processes) -> None:
    first, second = first_and_second
    assert first["inductor"]["misses"] == 1
    assert (second["exact"]["hits"], second["exact"]["misses"]) == (1, 0)
    assert second["exact"]["grads"] == first["inductor"]["grads"]


@by_one_worker
def test_an_exact_variant_shares_its_entry_with_inductor(first_and_second: Processes) -> None:
    first, _ = first_and_second
    assert (first["two"]["hits"], first["two"]["misses"]) == (1, 2)


@by_one_worker
def test_another_plan_does_not_get_the_graphs_of_the_first(first_and_second: Processes) -> None:
    first, second = first_and_second
    exact, drawn = first["inductor"], second["drawn"]
    # The same product of the same graph, by another method.
    assert (drawn["hits"], drawn["misses"]) == (0, 1)
    for step in range(STEPS):
        grads, wanted = drawn["grads"][step], exact["grads"][step]
        # Drawn values differ from the exact ones, from zero, and from step to step.
        assert weight(grads, 0).all()
        assert (weight(grads, 0) != weight(wanted, 0)).all()
        assert (weight(grads, 0) != weight(drawn["grads"][step - 1], 0)).all()
        assert grads[1:] == wanted[1:]


@by_one_worker
def test_a_users_pass_runs_beside_ours_and_shares_the_cache(first_and_second: Processes) -> None:
    first, second = (runs["users pass, zero"] for runs in first_and_second)
    # "two" has compiled the same variant before, but without the user's pass.
    # The graph is looked at with the user's pass applied, and then compiled.
    assert (first["users_calls"], first["hits"], first["misses"]) == (2, 0, 2)
    assert (second["users_calls"], second["hits"], second["misses"]) == (0, 1, 0)
    assert not any(weight(grads, 0).any() for grads in first["grads"])
    assert second["grads"] == first["grads"]


# In this process.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return this test's own cache directory; nothing compiled is found in a cache."""
    monkeypatch.setenv("GRAPHPASS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(variants, "_WARNED", set())
    monkeypatch.setattr(report, "_GRAPHS", [])
    return tmp_path / "cache"


def train(options: dict[str, Any]) -> list[str]:
    """Return which weights got no gradient in one step of a new model."""
    torch._dynamo.reset()
    model = Net()
    call: Any = torch.compile(model, backend="approx", options=options)
    call(batch(0)).square().sum().backward()
    named = model.named_parameters()
    return [name for name, p in named if p.grad is not None and not p.grad.any()]


def remembered(folder: Path) -> Path:
    (file,) = (folder / "graphs").glob("*.json")
    return file


GOOD: dict[str, Any] = {
    "version": memory._VERSION, "sites": [], "hints": {}, "saved_bytes": 0, "variants": {},
    "flow": [], "ends": [], "rest_bytes": [], "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "\x00\x01",
        json.dumps({}),
        json.dumps(GOOD | {"hints": None}),
        json.dumps(GOOD | {"sites": [{}]}),
        json.dumps(GOOD | {"flow": [1]}),
        json.dumps(GOOD | {"sites": ["body"]}),
    ],
)
def test_a_corrupt_file_is_ignored(folder: Path, text: str, logged: list[str]) -> None:
    (folder / "graphs").mkdir(parents=True)
    (folder / "graphs" / "key.json").write_text(text)
    assert memory.load("key") is None
    assert "ignoring the unreadable file" in logged[0]


def test_a_corrupt_file_is_replaced(folder: Path) -> None:
    assert train(ZERO) == ["body.weight"]
    good = remembered(folder).read_text()
    remembered(folder).write_text(good[: len(good) // 2])
    assert train(ZERO) == ["body.weight"]
    assert json.loads(remembered(folder).read_text())["sites"] == json.loads(good)["sites"]


@pytest.mark.filterwarnings("ignore:graphpass. an internal failure:UserWarning")
def test_a_graph_that_is_not_as_remembered_is_looked_at_again(folder: Path) -> None:
    """Settings that are no part of the key may have changed it."""
    train(ZERO)
    file = remembered(folder)
    analysis = memory.load(file.stem)
    assert analysis is not None
    stale = tuple(replace(site, node=f"{site.node}_stale") for site in analysis.sites)
    memory.store(file.stem, replace(analysis, sites=stale))
    with torch._functorch.config.patch(enable_autograd_cache=False):
        assert train(ZERO) == ["body.weight"]


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    folder: Path, logged: list[str]
) -> None:
    # Not even an administrator can make a folder below a file.
    folder.touch()
    assert train(ZERO) == ["body.weight"]
    assert "could not write to the cache directory" in "\n".join(logged)
    (only,) = graphpass.reports()
    assert [row.where for row in only.approximated] == ["body"]


@pytest.mark.skipif(os.geteuid() == 0, reason="an administrator can write to any folder")
def test_a_read_only_cache_directory_is_read(folder: Path) -> None:
    train(ZERO)
    files = [folder, folder / "graphs"]
    for file in files:
        file.chmod(0o500)
    try:
        assert train(ZERO) == ["body.weight"]
        assert train({"methods": {"tail": "zero"}}) == ["tail.weight"]
    finally:
        for file in files:
            file.chmod(0o700)


class ReplacingPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    """Puts a new node in the place of every matrix product, as a real pass does."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            with graph.inserting_before(node):
                new = graph.node_copy(node)
            node.replace_all_uses_with(new)
            graph.erase_node(node)

    def uuid(self) -> str:
        return "replaces products"


@pytest.mark.usefixtures("folder")
@pytest.mark.filterwarnings("ignore:graphpass. an internal failure:UserWarning")
def test_products_that_a_users_pass_has_made_are_found() -> None:
    with torch._inductor.config.patch(joint_custom_pre_pass=ReplacingPass()):
        assert train(ZERO) == ["body.weight"]


@pytest.mark.usefixtures("folder")
def test_a_pass_given_as_an_option_runs_in_every_variant() -> None:
    UsersPass.calls = 0
    settings = {"joint_custom_pre_pass": UsersPass()}
    with torch._functorch.config.patch(enable_autograd_cache=False):
        options = {"inductor": settings, **ZERO}
        assert train(options) == ["body.weight"]
        # The graph is looked at with the user's pass applied, and then compiled.
        assert UsersPass.calls == 2
        assert train({"inductor": settings, "budget": 0}) == []
        assert UsersPass.calls == 3


def test_the_digest_of_a_graph_tells_graphs_apart() -> None:
    def digest_of(function: Any, *extra: object) -> str:
        graph = torch.fx.symbolic_trace(function)
        return fingerprint.graph_digest(graph, extra)

    def plain(x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    digests = [
        digest_of(plain),
        digest_of(plain, "a setting"),
        digest_of(lambda x: torch.tanh(x) * 3),
        digest_of(lambda x: torch.sin(x) * 2),
        digest_of(lambda x, y: torch.tanh(x) * 2),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        digests.append(digest_of(plain))
    assert len(set(digests)) == len(digests)
    assert digest_of(plain) == digests[0]


if __name__ == "__main__":
    main()
