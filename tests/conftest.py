"""Settings shared by all tests: seeds, threads, caches, compiler state, uninitialised memory."""

import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from codegen import build
from codegen.cache import cache_dir
from tests import compiling
from tests.compiling import aten_only, interpreted

# Sums come out in the same order on every machine, and tests that run side by side on the cores
# do not wait for each other's threads.
THREADS = 1
SEED = 0

# Where primitives run eagerly, a forgotten output element must show as NaN, not as an old value.
TESTS = Path(__file__).parent
NAN_EMPTY_FOLDERS = (TESTS / "codegen", TESTS / "contract")

# The first call of a compiled function takes seconds, so time limits per example mean nothing.
hypothesis.settings.register_profile("graphpass", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("graphpass")

_caches = pytest.StashKey[tempfile.TemporaryDirectory[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the flags that approve emitted sources as they are now, and that leave nothing out."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the golden files")
    parser.addoption(
        "--inductor", action="store_true", help="compile in full where graphs are run as they are"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Point every cache at a folder of this run, for subprocesses too.

    `GRAPHPASS_TEST_INDUCTOR_CACHE` names a folder to reuse between runs: faster, but a result that
    an earlier version of the code left there can then pass for one of this version.
    """
    compiling.in_full = config.getoption("inductor")
    # Dynamo would collect garbage after every graph.
    os.environ["TORCH_DYNAMO_RUN_GC_AFTER_COMPILE"] = "0"
    # Threads that wait would keep the other worker's core busy.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # Inductor would compile a file for each set of vector instructions, to see whether it can.
    os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    if not torch.cuda.is_available():
        # Where Triton is installed, Inductor would start processes that compile it for no GPU.
        os.environ["TORCH_WARM_POOL"] = "0"
    if hasattr(config, "workerinput"):
        # A worker of pytest-xdist inherits the environment, and so shares the caches.
        return
    config.stash[_caches] = tempfile.TemporaryDirectory(prefix="graphpass-tests-")
    root = Path(config.stash[_caches].name)
    inductor = Path(os.environ.get("GRAPHPASS_TEST_INDUCTOR_CACHE") or root / "inductor").absolute()
    os.environ["GRAPHPASS_CACHE_DIR"] = str(root / "graphpass")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor)
    os.environ["TRITON_CACHE_DIR"] = str(inductor / "triton")


def pytest_collection_finish() -> None:
    """Leave out what takes time in every compilation and is no part of its result.

    Garbage is collected rarely, as compiling makes so many objects that it took an eighth of the
    time; what is alive now stays, and is looked at no more. And Dynamo times its guards with cold
    caches, which it empties for that.
    """
    if "torch._dynamo.guards" in sys.modules:
        sys.modules["torch._dynamo.guards"].profile_guard_manager = lambda *_: 0.0
    if "graphpass.pricing" in sys.modules:
        # Plans of tests do not hang on how fast this machine is.
        sys.modules["graphpass.pricing"].TIMING_S["cpu"] = 0.0
    gc.collect()
    gc.freeze()
    gc.set_threshold(1_000_000, 10, 10)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the caches of this run."""
    if _caches in config.stash:
        config.stash[_caches].cleanup()


# First: pytest-xdist reads the groups in the same hook.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests where there is no GPU; keep the tests of one contract case together."""
    for item in items:
        if hasattr(item, "callspec") and "case" in item.callspec.params:
            # One worker compiles it for all of them.
            item.add_marker(pytest.mark.xdist_group(str(item.callspec.params["case"])))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fresh_torch() -> Iterator[None]:
    """Seed torch, pin its threads and start and end with no compiled code."""
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    _reset_dynamo()
    yield
    _reset_dynamo()


def _reset_dynamo() -> None:
    # Importing Dynamo takes two seconds, and before that there is nothing to reset.
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    # Or asking for the last report makes those of all tests before.
    if "graphpass.report" in sys.modules:
        sys.modules["graphpass.report"]._GRAPHS.clear()


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a cache of its own, with what all kernels share, which takes a second."""
    tools, shared = build.toolchain(), cache_dir() / "kernels"
    if isinstance(tools, build.Toolchain):
        build.prepare(shared, tools)
        kernels = shutil.ignore_patterns("*.cpp", "[0-9a-f]*.so", ".*")
        shutil.copytree(shared, tmp_path / "kernels", ignore=kernels)
    monkeypatch.setenv("GRAPHPASS_CACHE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture(name="aten_only")
def _aten_only() -> Iterator[None]:
    """Compile without C++: see `tests.compiling`."""
    with aten_only():
        yield


@pytest.fixture(name="interpreted")
def _interpreted() -> Iterator[None]:
    """Run graphs as they are: see `tests.compiling`."""
    with interpreted():
        yield


class _Listing(logging.Handler):
    """Keeps the text of what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def logged() -> Iterator[list[str]]:
    """Return a list that fills with what graphpass logs."""
    handler, log = _Listing(), logging.getLogger("graphpass")
    log.addHandler(handler)
    yield handler.said
    log.removeHandler(handler)


@pytest.fixture
def nan_empty() -> Iterator[None]:
    """Make `torch.empty` and its kin return NaN (integers: the largest value).

    torch fills uninitialised memory in its deterministic mode only, and that mode also changes what
    Inductor generates for scatters. Hence it is on where kernels and methods are tested by
    themselves, and whole training steps are compiled the way users compile them.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # Not an error: what matters here is the fill, and CUDA has no deterministic form of some ops.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


@pytest.fixture(autouse=True)
def _nan_empty_where_eager(request: pytest.FixtureRequest, _fresh_torch: None) -> None:
    if any(request.path.is_relative_to(folder) for folder in NAN_EMPTY_FOLDERS):
        request.getfixturevalue("nan_empty")
