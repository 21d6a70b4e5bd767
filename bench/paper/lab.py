"""Runs the variants of a study: the learning rate searched with the first seed, then every seed at the best one."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import distributed
from tqdm import tqdm

from adapter_ops import skip_layers

from .data import Dataset, load_data
from .finetune import finetune, load_model, model_name, predict, rank_and_world, scores, sizes, tokenise
from .report import best_rate, context
from .runs import ABLATION, RUNS, Ablated, Cell, Result, Table, cell_of, claim
from .studies import RATES, Variant, has_bf16, prepare, stack

T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What holds for all runs of a study; see python -m bench paper --help."""

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
        model, self.tokenizer = load_model(options.model, self.data.labels, options.dropout)
        self.layers = len(stack(model))
        self.texts = tokenise(self.tokenizer, self.data, options.length)
        self.results = Table(options.out / RUNS, Result)
        self.ablated = Table(options.out / ABLATION, Ablated)
        dropout = "" if options.dropout is None else f"{options.dropout:g}"
        fixed = (options.epochs, options.batch, options.length, dropout, self.dtype, len(self.data.train))
        self.any = Cell(model_name(options.model), self.data.name, self.data.digest(), "", "", 0.0, *fixed, 0)
        with self.claimed(self.any):  # so that a folder that cannot be locked is refused before the first run
            pass

    def cell(self, variant: Variant, rate: float, seed: int) -> Cell:
        return replace(self.any, method=variant.method, setting=variant.text, learning_rate=rate, seed=seed)

    def rows(self) -> list[Result]:
        """The runs of this model and task with these options, whatever the method, rate and seed."""
        return [row for row in self.results.rows if context(row) == context(self.any)]

    def ablations(self) -> list[Ablated]:
        return [row for row in self.ablated.rows if context(row) == context(self.any)]

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """Those a variant's rate is chosen from."""
        found = RATES[variant.searched.method]
        return found[1:2] if self.options.quick else found

    def run(self, variants: list[Variant], ablate: bool = False) -> None:
        """Every run of a study that has no row yet; `ablate`: with every span of layers left out after it.

        The search is with the first seed there is, so that seeds can be added later.
        """
        rows, seeds = self.rows(), self.options.seeds
        first = rows[0].seed if rows else seeds[0]
        searched = list({v.label: v for v in (v.searched for v in variants)}.values())
        total = sum(len(self.rates(v)) for v in searched) + len(variants) * len(seeds)
        with tqdm(total=total, unit="run", disable=None if rank_and_world()[0] == 0 else True) as bar:
            self.complete(bar, [(v, rate, first) for v in searched for rate in self.rates(v)])
            best = [(v, best_rate(self.rows(), v, first)) for v in variants]
            self.complete(bar, [(v, rate, seed) for v, rate in best for seed in seeds], ablate)

    def complete(self, bar: tqdm, runs: list[tuple[Variant, float, int]], ablate: bool = False) -> None:
        """Each run (variant, learning rate, seed) that has no row yet; those of another process are waited for last."""
        while runs:
            left = [run for run in runs if not self.one(bar, *run, ablate)]
            if len(left) == len(runs):
                bar.set_description(f"waiting for {len(left)} runs of another process")
                time.sleep(1)
            runs = left

    def one(self, bar: tqdm, variant: Variant, rate: float, seed: int, ablate: bool = False) -> bool:
        """A run and its rows, unless they are there. Returns False, and does nothing, while another process runs it."""
        cell = self.cell(variant, rate, seed)
        if not self.has(cell, ablate):
            with self.claimed(cell) as mine:
                if not mine:
                    return False
                if not self.has(cell, ablate):  # another process may have ended it before it was claimed
                    bar.set_description(f"{variant.label}, {rate:g}, seed {seed}")
                    model = self.train(variant, cell)
                    if ablate:
                        self.ablate(model, cell)
        bar.update()
        return True

    def has(self, cell: Cell, ablate: bool) -> bool:
        """Whether there is a row of the cell, or rows of its ablation."""
        rows: Sequence[Cell] = self.ablations() if ablate else self.rows()
        return any(cell_of(row) == cell for row in rows)

    @contextlib.contextmanager
    def claimed(self, cell: Cell) -> Iterator[bool]:
        """Yields whether the run is ours and no other's, and reads the files again. See runs.claim.

        Where there are several processes, the first claims for all.
        """
        with claim(self.options.out, cell) if rank_and_world()[0] == 0 else contextlib.nullcontext(False) as mine:
            ours = shared(mine)
            self.refresh()
            yield ours

    def refresh(self) -> None:
        """Reads the files again; where there are several processes, all have the rows that the first one reads."""
        for table in (self.results, self.ablated):
            if rank_and_world()[0] == 0:
                table.refresh()
            table.rows = shared(table.rows)  # type: ignore[assignment]

    def train(self, variant: Variant, cell: Cell) -> torch.nn.Module:
        """One run, and its row unless there is one; returns the trained model."""
        start = time.perf_counter()
        torch.manual_seed(cell.seed)
        o = self.options
        model, _ = load_model(o.model, self.data.labels, o.dropout)
        model.to(self.device)
        prepare(model, variant.method, variant.setting)
        trained, share = sizes(model)
        run = finetune(
            model,
            self.tokenizer,
            self.texts.train,
            learning_rate=cell.learning_rate,
            epochs=o.epochs,
            batch_size=o.batch,
            seed=cell.seed,
            numbers=not self.data.labels,
            bf16=self.dtype == "bf16",
            label="training",
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
        if all(cell_of(other) != cell for other in self.rows()):  # of one that is trained again to be ablated, there is
            self.write(self.results, [row])
        return model

    def score(self, model: torch.nn.Module, part: str) -> dict[str, float]:
        rows = getattr(self.texts, part)
        outputs = predict(model, self.tokenizer, rows, bf16=self.dtype == "bf16")
        return {name: round(value, 5) for name, value in scores(outputs, rows, self.data.metrics).items()}

    def ablate(self, model: torch.nn.Module, cell: Cell) -> None:
        """Scores the model without the adapters of every contiguous span of layers (§3.6)."""
        metric, rows = self.data.metrics[0], []
        for first, last in spans(self.layers):
            with skip_layers(model, range(first, last + 1) if first >= 0 else ()):
                score = self.score(model, "test")[metric]
            rows.append(Ablated(**vars(cell), metric=metric, first=first, last=last, test=score))
        self.write(self.ablated, rows)

    def write(self, table: Table, rows: list[Any]) -> None:
        """Adds rows; where there are several processes, the first has the file and all have the rows."""
        if rank_and_world()[0] == 0:
            table.add(rows)
        self.refresh()


def shared(value: T) -> T:
    """The first process's value, in every process."""
    found = [value]
    if rank_and_world()[1] > 1:
        distributed.broadcast_object_list(found)
    return found[0]


def spans(layers: int) -> Iterator[tuple[int, int]]:
    """None, written as (-1, -1), then (first, last) of every contiguous span."""
    yield -1, -1
    yield from ((first, last) for first in range(layers) for last in range(first, layers))
