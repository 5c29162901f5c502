"""Rules that the sources keep: files of one job, docstrings on what is public, no pickles, no printing below the command line."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "src/luthier"
SOURCES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 500  # the rule is one job per file; a file past this has never had only one
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


each_source = pytest.mark.parametrize("path", SOURCES, ids=[path.relative_to(PACKAGE).as_posix() for path in SOURCES])


def documented_methods(trees: Iterable[ast.Module]) -> set[str]:
    """Return the names of methods that have a docstring in some class: an override of one of these explains itself."""
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [node for owner in classes for node in owner.body if isinstance(node, FUNCTIONS)]
    return {node.name for node in functions if ast.get_docstring(node)}


def explains_itself(method: ast.FunctionDef | ast.AsyncFunctionDef, known: set[str]) -> bool:
    """Tell whether a method may go without a docstring: private, an override, a module's forward, or one statement."""
    return method.name.startswith("_") or method.name in known | {"forward"} or len(method.body) == 1


def undocumented(tree: ast.Module, known: set[str]) -> Iterator[str]:
    """Yield the public functions, methods and classes without a docstring, and the file itself if it has none."""
    if tree.body and not ast.get_docstring(tree):
        yield "the file itself"
    for node in tree.body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield node.name
            for method in node.body if isinstance(node, ast.ClassDef) else []:
                if isinstance(method, FUNCTIONS) and not (ast.get_docstring(method) or explains_itself(method, known)):
                    yield f"{node.name}.{method.name}"


def pickle_uses(tree: ast.Module) -> Iterator[str]:
    """Yield imports of pickling libraries, and torch.load without weights_only=True, and torch.save."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PICKLES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "torch.save":
                yield called
            safe = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
            if called == "torch.load" and not safe:
                yield "torch.load without weights_only=True"


def test_there_are_sources() -> None:
    assert len(SOURCES) > 10


@pytest.fixture(scope="module")
def known_methods() -> set[str]:
    """Return the methods that are explained somewhere; to read all sources for each of them took minutes."""
    return documented_methods(ast.parse(source.read_text()) for source in SOURCES)


@each_source
def test_public_things_have_docstrings(path: Path, known_methods: set[str]) -> None:
    missing = list(undocumented(ast.parse(path.read_text()), known_methods))
    assert not missing


@each_source
def test_nothing_is_pickled(path: Path) -> None:
    pickles = list(pickle_uses(ast.parse(path.read_text())))
    assert not pickles


@each_source
def test_files_are_short(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{lines} lines: has it still one job?"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.save(x, path)",
    ],
)
def test_a_pickle_is_seen(source: str) -> None:
    assert list(pickle_uses(ast.parse(source)))


def test_a_safe_load_is_let_through() -> None:
    assert not list(pickle_uses(ast.parse("torch.load(path, weights_only=True)\nsafetensors.torch.load_file(path)")))


def test_a_missing_docstring_is_seen() -> None:
    source = '"""A file."""\ndef f(): ...\ndef _g(): ...\nclass C:\n  """Doc."""\n  def m(self):\n    x = 1\n    return x\n'
    assert list(undocumented(ast.parse(source), set())) == ["f", "C.m"]
    assert list(undocumented(ast.parse(source), {"m"})) == ["f"]
