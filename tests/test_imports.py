"""Which way imports go: no circle in the packages, no test that imports from another test, no imported __main__."""

import ast
from graphlib import TopologicalSorter

import pytest
from helpers import ROOT


def modules(package):
    """{dotted name: file} of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name, path):
    """Full names that a file imports when it is imported itself; inside functions and for types alone do not count."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    todo = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, (ast.If, ast.Try)):
            todo += ast.iter_child_nodes(node)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield source
                yield f"{source}.{alias.name}"


@pytest.mark.parametrize("package", ["adapter_ops", "bench"])
def test_no_circle(package):
    known = modules(package)
    graph = {name: {each for each in imports(name, path) if each in known} - {name} for name, path in known.items()}
    # A package's __init__ stands for what it re-exports, so whoever imports a module of it does not wait for it.
    for name, needed in graph.items():
        graph[name] = {each for each in needed if not name.startswith(f"{each}.")}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known) > 10


def test_tests_share_through_helpers():
    for path in (ROOT / "tests").rglob("*.py"):
        shared = [name for name in imports(path.stem, path) if name.split(".")[0].startswith("test_")]
        assert not shared, f"{path} imports {shared}"


@pytest.mark.parametrize("package", ["adapter_ops", "bench"])
def test_nobody_imports_a_main(package):
    for name, path in modules(package).items():
        assert not [each for each in imports(name, path) if each.endswith("__main__")], name
