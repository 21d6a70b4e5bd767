"""Two tasks on real text that every Python has, so that they need no download: the standard library's docstrings.

`docstrings`: from which package does a docstring come? `signatures`: does this docstring belong to this signature?
"""

import ast
import functools
import inspect
import random
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .data import Dataset, split


class Documented(NamedTuple):
    package: str
    file: str
    text: str  # the docstring
    signature: str | None  # of a function, without its decorators


def docstrings(classes: int = 12, most: int = 400) -> Dataset:
    """The `classes` packages with the most docstrings, at most `most` texts each.

    Texts that stand in more than one package are left out.
    """
    found: dict[str, set[str]] = defaultdict(set)
    for each in _library():
        found[each.package].add(each.text)
    everywhere: dict[str, int] = defaultdict(int)
    for texts in found.values():
        for text in texts:
            everywhere[text] += 1
    unique = {package: sorted(t for t in texts if everywhere[t] == 1) for package, texts in found.items()}
    largest = sorted(unique, key=lambda p: (-len(unique[p]), p))[:classes]
    shuffler = random.Random(0)
    sampled = {p: shuffler.sample(unique[p], min(most, len(unique[p]))) for p in largest}
    return split("docstrings", [(text, package, None) for package, texts in sampled.items() for text in texts])


def signatures(most: int = 3200) -> Dataset:
    """Pairs of docstring and signature, half of them true; in the others the signature is of another function of the
    same file. Each docstring stands in one pair."""
    by_file: dict[str, dict[str, str]] = defaultdict(dict)
    for each in _library():
        if each.signature is not None:
            by_file[each.file].setdefault(each.text, each.signature)
    counts: dict[str, int] = defaultdict(int)
    for functions in by_file.values():
        for text in functions:
            counts[text] += 1
    shuffler, pairs = random.Random(0), []
    for file in sorted(by_file):
        functions = {text: s for text, s in by_file[file].items() if counts[text] == 1}
        for text, true in functions.items():
            others = [s for s in functions.values() if s != true]
            if others:
                belongs = shuffler.random() < 0.5
                pairs.append((text, "yes" if belongs else "no", true if belongs else shuffler.choice(others)))
    return split("signatures", shuffler.sample(pairs, min(most, len(pairs))))


@functools.cache
def _library(least_characters: int = 30) -> list[Documented]:
    """Every docstring of the standard library's packages, tests apart, in the order of the files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for file in sorted(root.glob("*/**/*.py")):
        package, *inner = file.relative_to(root).parts
        if package in ("site-packages", "dist-packages", "test", "__pycache__") or any("test" in p for p in inner):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # files that are there to be broken
        for text, signature in _documented(tree):
            if len(text) >= least_characters:
                found.append(Documented(package, str(file), text, signature))
    return found


def _documented(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, *functions)):
            signature = f"{node.name}({ast.unparse(node.args)})" if isinstance(node, functions) else None
            yield inspect.cleandoc(ast.get_docstring(node) or ""), signature
