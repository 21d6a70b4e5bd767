"""The docstring task: from which package of the standard library does a docstring come?

Real text that every Python has, so it needs no download. Texts that stand in more than one package are left out.
"""

import ast
import inspect
import random
import sysconfig
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Dataset(NamedTuple):
    """Texts and label numbers; a test split that training never sees."""

    labels: list[str]
    train: list[tuple[str, int]]
    test: list[tuple[str, int]]


def split(examples: list[tuple[str, str]], held_out: float = 0.2, seed: int = 0) -> Dataset:
    """Examples of (text, label), shuffled and split the same way every time; both splits know every label."""
    by_label: dict[str, list[str]] = defaultdict(list)
    for text, label in examples:
        by_label[label].append(text)
    if small := sorted(label for label, texts in by_label.items() if len(texts) < 2):
        raise ValueError(f"labels with a single text cannot be split: {', '.join(small)}")
    labels, shuffler = sorted(by_label), random.Random(seed)
    train, test = [], []
    for number, label in enumerate(labels):
        texts = sorted(by_label[label])
        shuffler.shuffle(texts)
        cut = max(1, round(len(texts) * held_out))
        test += [(text, number) for text in texts[:cut]]
        train += [(text, number) for text in texts[cut:]]
    shuffler.shuffle(train)
    return Dataset(labels, train, test)


def docstrings(classes: int = 12, most: int = 400, least_characters: int = 30) -> Dataset:
    """The `classes` packages with the most docstrings, at most `most` texts each."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, set[str]] = defaultdict(set)
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
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = inspect.cleandoc(ast.get_docstring(node) or "")
                if len(text) >= least_characters:
                    found[package].add(text)
    everywhere: dict[str, int] = defaultdict(int)
    for texts in found.values():
        for text in texts:
            everywhere[text] += 1
    unique = {package: sorted(t for t in texts if everywhere[t] == 1) for package, texts in found.items()}
    largest = sorted(unique, key=lambda p: (-len(unique[p]), p))[:classes]
    shuffler = random.Random(0)
    return split([(t, p) for p in largest for t in shuffler.sample(unique[p], min(most, len(unique[p])))])
