"""What may import what (docs/architecture.md), and the public names."""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.util import resolve_name
from pathlib import Path

import pytest

import memlm

ROOT = Path(memlm.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
EVERYWHERE = {"errors", "evidence", "files", "progress", "tensors", "text", ""}
# Package → the parts of memlm that it may import; "" is memlm itself, for its version
ALLOWED = {
    "ops": set(),
    "cache": {"errors", "evidence"},
    "documents": EVERYWHERE - {"evidence"},
    "evidence": set(),
    "mixtures": EVERYWHERE | {"ops"},
    "index": EVERYWHERE | {"neighbors", "datastore"},
    "datastore": EVERYWHERE | {"neighbors", "documents", "index", "ops"},
    "models": EVERYWHERE | {"cache", "documents", "ops"},
    "sharing": EVERYWHERE - {"evidence", "tensors"} | {"datastore"},
    "layers": EVERYWHERE - {"evidence"} | {"ops", "models"},
}


def package_of(path):
    """Return the first name below memlm: that of the folder, or of the module."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """Return the absolute names of all modules that a file imports, wherever in it, with the line."""
    package = ".".join(["memlm", *path.relative_to(ROOT).parent.parts])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(item.name, node.lineno) for item in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module
            is_package = base == "memlm"
            found += [(f"{base}.{item.name}" if is_package else base, node.lineno) for item in node.names]
    return found


def own_imports(path):
    """Return the parts of memlm that a file imports from outside its own part."""
    for name, line in imports_of(path):
        if name.split(".")[0] == "memlm":
            part = name.removeprefix("memlm").strip(".").split(".")[0]
            part = "" if part.startswith("__") else part
            if part != package_of(path):
                yield part, line


def test_imports_are_read_as_python_reads_them():
    """The tests below would pass on anything if this did not work."""
    build = dict(own_imports(ROOT / "datastore" / "_build.py"))
    assert {"", "documents", "errors", "progress"} <= set(build)
    assert "index" in dict(own_imports(ROOT / "datastore" / "_datastore.py"))
    assert "datastore" in dict(own_imports(ROOT / "index" / "_faiss.py"))  # also inside a function
    assert "ops" in dict(own_imports(ROOT / "mixtures" / "_mixture.py"))
    assert len(MODULES) > 30


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_part_imports_only_what_it_may(path):
    importer = package_of(path)
    for part, line in own_imports(path):
        assert part in ALLOWED.get(importer, {part}), f"{path}:{line} imports memlm.{part}"
        if part == "cli":
            assert importer == "__main__", f"{path}:{line} imports the command line"
        if part == "recipes":
            assert importer == "cli", f"{path}:{line} imports the leaf memlm.recipes"
        if part == "evaluation":  # memlm itself does so for type checkers alone; `test_importing_memlm_is_cheap`
            assert importer in {"cli", "recipes", "__init__"}, f"{path}:{line} imports the leaf memlm.{part}"


def test_ops_import_torch_and_the_standard_library_only():
    for path in (ROOT / "ops").glob("*.py"):
        for name, line in imports_of(path):
            top = name.split(".")[0]
            assert top in {"torch", "memlm", *sys.stdlib_module_names} - {"logging", "os", "pathlib"}, f"{path}:{line}"


def test_only_the_index_imports_faiss_and_torch_comes_first():
    for path in MODULES:
        names = [name.split(".")[0] for name, _ in imports_of(path)]
        if "faiss" in names:
            assert package_of(path) == "index", path
            assert names.index("torch") < names.index("faiss"), f"{path}: both bring an OpenMP runtime"


def test_nothing_is_unpickled_or_evaluated():
    for path in MODULES:
        assert not {"pickle", "dill", "joblib", "shelve"} & {name.split(".")[0] for name, _ in imports_of(path)}
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert not [node for node in calls if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}], (
            path
        )


def test_the_public_names_are_sorted_and_resolve():
    assert memlm.__all__ == sorted(memlm.__all__)
    for name in memlm.__all__:
        assert getattr(memlm, name).__name__ == name
    assert set(memlm.__all__) < set(dir(memlm))
    with pytest.raises(AttributeError, match="module 'memlm' has no attribute 'nothing'"):
        memlm.nothing  # noqa: B018


@pytest.mark.parametrize(
    "part", ["datastore", "evaluation", "index", "layers", "mixtures", "models", "ops", "sharing", "training"]
)
def test_the_names_of_a_part_resolve(part):
    module = import_module(f"memlm.{part}")
    assert len(set(module.__all__)) == len(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_importing_memlm_is_cheap():
    code = (
        "import sys, memlm; print(sorted({'torch', 'faiss', 'transformers', 'numpy'} & set(sys.modules)), dir(memlm))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
