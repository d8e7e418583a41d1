"""The rules of the layout: who imports whom, sizes, docstrings, one stem per method, examples.

Each rule is a function from paths to a list of violations. It runs over the tree, and over a small
violating file as well, so that a rule which has stopped finding anything is noticed.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 400
FOLDERS = ("cost_model", "codegen", "graphpass", "examples", "benchmarks")

# Which of our own top-level names a folder must not import.
FORBIDDEN = {
    "cost_model": {"graphpass", "codegen", "examples", "benchmarks", "tests"},
    "codegen": {"graphpass", "cost_model", "examples", "benchmarks", "tests"},
    "graphpass": {"examples", "benchmarks", "tests"},
    "examples": {"benchmarks", "tests"},
    "benchmarks": {"tests"},
}
# What a package may import beside the standard library; None stands for every declared dependency.
THIRD_PARTY = {"cost_model": {"sympy"}, "codegen": None, "graphpass": None}
# Toolchains that a machine may lack: a module that needs one still has to import without it.
ONLY_IN_FUNCTIONS = {"triton"}


def python_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)
    assert files, f"no Python files in {folder}"
    return files


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, int, bool]]:
    """Yield (top-level name, line, whether inside a function) of every absolute import below."""
    for child in ast.iter_child_nodes(node):
        for name in _imported(child):
            yield name.partition(".")[0], child.lineno, inside_function
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, inside_function or function)


def _imported(node: ast.AST) -> Iterable[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        # import_module("x"), importlib.import_module("x"), __import__("x")
        case ast.Call(
            func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
            args=[ast.Constant(value=str(module)), *_],
        ):
            return [module]
    return []


def declared_dependencies(pyproject: Path) -> set[str]:
    """Return the names of the dependencies that every installation has."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    return {re.split(r"[^\w.-]", requirement)[0] for requirement in project["dependencies"]}


def forbidden_imports(files: Iterable[Path], forbidden: set[str]) -> list[str]:
    return [
        f"{path}:{line}: imports {name}"
        for path in files
        for name, line, _ in imports(parse(path))
        if name in forbidden
    ]


def imports_beyond_stdlib(files: Iterable[Path], allowed: set[str]) -> list[str]:
    allowed = allowed | sys.stdlib_module_names | set(FOLDERS)
    return [
        f"{path}:{line}: imports {name}"
        for path in files
        for name, line, _ in imports(parse(path))
        if name not in allowed
    ]


def imports_outside_functions(files: Iterable[Path], names: set[str]) -> list[str]:
    return [
        f"{path}:{line}: imports {name} outside a function"
        for path in files
        for name, line, inside_function in imports(parse(path))
        if name in names and not inside_function
    ]


def long_modules(files: Iterable[Path]) -> list[str]:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    return [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MAX_LINES]


def modules_without_docstring(files: Iterable[Path]) -> list[str]:
    return [f"{path}: no docstring" for path in files if not ast.get_docstring(parse(path))]


def method_stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.py")} - {"__init__"}


def scripts_without_main(files: Iterable[Path]) -> list[str]:
    return [
        f"{path}: a script without main()"
        for path in files
        if (body := parse(path).body)
        and any(_is_script_guard(node) for node in body)
        and not any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)
    ]


def _is_script_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


@pytest.mark.parametrize("folder", sorted(FORBIDDEN))
def test_imports_follow_the_layers(folder: str) -> None:
    assert not forbidden_imports(python_files(ROOT / folder), FORBIDDEN[folder])


@pytest.mark.parametrize("folder", sorted(THIRD_PARTY))
def test_third_party_imports_are_those_allowed(folder: str) -> None:
    allowed = THIRD_PARTY[folder]
    if allowed is None:
        allowed = declared_dependencies(ROOT / "pyproject.toml") | ONLY_IN_FUNCTIONS
    assert not imports_beyond_stdlib(python_files(ROOT / folder), allowed)


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_optional_toolchains_are_imported_inside_functions(folder: str) -> None:
    assert not imports_outside_functions(python_files(ROOT / folder), ONLY_IN_FUNCTIONS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_are_short(folder: str) -> None:
    assert not long_modules(python_files(ROOT / folder))


@pytest.mark.parametrize("folder", FOLDERS)
def test_modules_have_a_docstring(folder: str) -> None:
    assert not modules_without_docstring(python_files(ROOT / folder))


def test_a_method_is_named_after_its_file() -> None:
    # Imported here: the other rules hold even where the package does not import.
    import graphpass

    methods = graphpass.methods()
    assert set(methods) == method_stems(ROOT / "graphpass" / "methods")
    assert {name: method.name for name, method in methods.items()} == {
        name: name for name in methods
    }


def test_example_scripts_define_main() -> None:
    assert not scripts_without_main(python_files(ROOT / "examples"))


# One file that breaks a rule, beside one that does not: the rule must name the first alone.


def _forbids_graphpass(files: Iterable[Path]) -> list[str]:
    return forbidden_imports(files, {"graphpass"})


def _allows_sympy(files: Iterable[Path]) -> list[str]:
    return imports_beyond_stdlib(files, {"sympy"})


def _keeps_triton_inside(files: Iterable[Path]) -> list[str]:
    return imports_outside_functions(files, {"triton"})


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (_forbids_graphpass, "import graphpass", "import graphpassage"),
        (_forbids_graphpass, "import math, graphpass.site as s", "from . import graphpass"),
        (_forbids_graphpass, "from graphpass import plan", "from codegen import graphpass"),
        (_forbids_graphpass, "def f():\n    from graphpass.plan import Plan", "graphpass = 1"),
        (_forbids_graphpass, "if TYPE_CHECKING:\n    import graphpass", "'import graphpass'"),
        (_forbids_graphpass, "importlib.import_module('graphpass.plan')", "import_module(name)"),
        (_forbids_graphpass, "x = __import__('graphpass')", "x = __import__('math')"),
        (_allows_sympy, "import torch", "import graphpass, math\nfrom sympy import Symbol"),
        (_allows_sympy, "def f():\n    import torch", "from collections.abc import Mapping"),
        (_keeps_triton_inside, "import triton", "def f():\n    import triton"),
        (
            _keeps_triton_inside,
            "try:\n    import triton.language as tl\nexcept ImportError: ...",
            "class A:\n    def f(self):\n        from triton import language",
        ),
        (
            _keeps_triton_inside,
            "class A:\n    from triton import jit",
            "async def f():\n    import triton",
        ),
        (long_modules, "x = 1\n" * (MAX_LINES + 1), "x = 1\n" * MAX_LINES),
        (modules_without_docstring, "x = 1", "'''What it is.'''"),
        (modules_without_docstring, "", "'''What it is.'''\nx = 1"),
        (
            scripts_without_main,
            "if __name__ == '__main__':\n    run()",
            "def main(): ...\nif __name__ == '__main__':\n    main()",
        ),
        (
            scripts_without_main,
            "class A:\n    def main(self): ...\nif __name__ == '__main__': A()",
            "def helper(): ...",
        ),
    ],
)
def test_rules_find_what_breaks_them(
    tmp_path: Path, rule: Callable[[Iterable[Path]], list[str]], bad: str, good: str
) -> None:
    (tmp_path / "bad.py").write_text(bad, encoding="utf-8")
    (tmp_path / "good.py").write_text(good, encoding="utf-8")
    [violation] = rule(python_files(tmp_path))
    assert violation.startswith(str(tmp_path / "bad.py"))


def test_declared_dependencies_are_bare_names(tmp_path: Path) -> None:
    pyproject = tmp_path / "pyproject.toml"
    pyproject.write_text('[project]\ndependencies = ["torch>=2.11,<3", "a-b[c] == 1", "rich"]')
    assert declared_dependencies(pyproject) == {"torch", "a-b", "rich"}


def test_method_stems_are_the_files_of_the_folder(tmp_path: Path) -> None:
    for name in ("__init__.py", "crs.py", "notes.md"):
        (tmp_path / name).touch()
    assert method_stems(tmp_path) == {"crs"}


def test_an_empty_folder_is_not_taken_for_a_clean_one(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no Python files"):
        python_files(tmp_path)
