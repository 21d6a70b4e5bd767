"""The soak test: clients that load, unload and ask for long, while every answer is checked, that of an error too."""

import asyncio
import contextlib
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from .client import Client, Server, connected, metrics
from .tasks import World

KEPT = 64  # spans of a task that are remembered; a request is over long before


class Spans:
    """When a task may have had which folder, and when it may have been absent.

    A load or an unload takes effect at some time between its request and its answer, so both are possible there.
    """

    def __init__(self) -> None:
        self.spans: list[list[Any]] = [[None, -math.inf, math.inf]]  # the folder or None, from, to

    def begin(self, folder: str | None) -> None:
        """A load of this folder, or an unload, is asked for."""
        self.spans = [*self.spans[-KEPT:], [folder, time.perf_counter(), math.inf]]

    def end(self, done: bool) -> None:
        """It was answered."""
        if done:
            self.spans[-2][2] = time.perf_counter()
        else:
            self.spans.pop()

    def possible(self, start: float, end: float) -> set[str | None]:
        """The folders, or None, that an answer may come from whose request was under way in this time."""
        return {folder for folder, first, last in self.spans if first <= end and last >= start}


@dataclass
class Report:
    """What the clients saw."""

    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    memory: list[float] = field(default_factory=list)  # MB, each minute


async def soak(server: Server, world: World, clients: int, seconds: float, seed: int) -> Report:
    """Each client has a task of its own, which it loads and unloads, and asks for those of all and for the others."""
    report = Report()
    own = {f"own{number}": Spans() for number in range(clients)}
    start = time.perf_counter()

    async def client(number: int) -> None:
        choice = random.Random(f"{seed} {number}")
        mine, loaded = f"own{number}", False
        async with connected(server.port) as to:
            while time.perf_counter() < start + seconds:
                what = choice.random()
                if what < 0.08:
                    loaded = await change(to, own[mine], mine, loaded, choice, world, report)
                elif what < 0.10:
                    await try_nonsense(to, choice, report)
                else:
                    name = choice.choice([*own] if what < 0.5 else [*world.scores])
                    await ask(to, name, own.get(name), choice, world, report)

    async def watch() -> None:
        while True:
            report.memory.append(server.megabytes("VmRSS"))
            done = f"{time.perf_counter() - start:.0f} s, {report.counts.total()} answers, {dict(report.errors)} errors"
            print(f"{done}, {report.memory[-1]:.0f} MB", file=sys.stderr, flush=True)
            await asyncio.sleep(min(60.0, seconds / 10))

    watcher = asyncio.create_task(watch())
    for outcome in await asyncio.gather(*map(client, range(clients)), return_exceptions=True):
        if isinstance(outcome, BaseException):
            report.errors[f"{type(outcome).__name__}: {outcome}"] += 1
    watcher.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watcher
    report.memory.append(server.megabytes("VmRSS"))
    return report


async def change(
    to: Client, spans: Spans, name: str, loaded: bool, choice: random.Random, world: World, report: Report
) -> bool:
    """Unloads the client's own task, or loads it from another folder. Returns whether it is loaded then."""
    folder = None if loaded else choice.choice([*world.scores])
    spans.begin(folder)
    if folder is None:
        status, answer = await to.ask("DELETE", f"/tasks/{name}")
    else:
        status, answer = await to.ask("POST", "/tasks", {"name": name, "folder": folder})
    done = status == (200 if folder is None else 201)
    spans.end(done)
    note(report, "loads" if folder else "unloads", done, answer)
    return (folder is not None) if done else loaded


async def ask(to: Client, name: str, spans: Spans | None, choice: random.Random, world: World, report: Report) -> None:
    """One to three texts for a task. A 404 is right where the task may have been absent, and a folder's answer where
    the task may have had this folder."""
    numbers = [choice.randrange(len(world.texts)) for _ in range(choice.randint(1, 3))]
    start = time.perf_counter()
    status, answer = await to.ask("POST", "/predict", {"task": name, "texts": [world.texts[n] for n in numbers]})
    folders = {name} if spans is None else spans.possible(start, time.perf_counter())
    if status == 404:
        note(report, "404 of a task that is unloaded", None in folders and name in answer["error"], answer)
        return
    right = status == 200 and any(
        folder is not None and all(map(world.right, [folder] * len(numbers), numbers, answer["predictions"]))
        for folder in folders
    )
    note(report, "answers of own tasks" if spans else "answers of the other tasks", right, answer)


NONSENSE = [
    ("POST", "/predict", {"task": "nobody", "text": "a"}, 404),
    ("POST", "/predict", {"task": "task0"}, 422),
    ("POST", "/predict", {"task": "task0", "text": "a" * 100_000}, 422),
    ("POST", "/tasks", {"name": "bad", "folder": "../.."}, 422),
    ("POST", "/tasks", {"name": "task0", "folder": "task1"}, 409),
    ("DELETE", "/tasks/nobody", None, 404),
    ("GET", "/metrics", None, 200),
    ("GET", "/tasks", None, 200),
    ("GET", "/health", None, 200),
]


async def try_nonsense(to: Client, choice: random.Random, report: Report) -> None:
    """A request that has to be refused, or one for something else than an answer."""
    method, path, body, expected = choice.choice(NONSENSE)
    status, answer = await to.ask(method, path, body)
    note(report, "other requests", status == expected, answer)


def note(report: Report, kind: str, right: bool, answer: Any) -> None:
    """Counts an answer, and says on stderr what the first wrong ones were."""
    if right:
        report.counts[kind] += 1
        return
    report.errors[kind] += 1
    if report.errors.total() <= 10:
        print(f"wrong, of {kind}: {str(answer)[:300]}", file=sys.stderr, flush=True)


async def counters(port: int) -> str:
    """The bank's counters, as a line."""
    found = await metrics(port)
    names = ("hits", "misses", "evictions", "loads", "seconds_loading")
    return "the bank: " + ", ".join(f"{found[f'adapter_bank_{n}_total']:,.0f} {n.replace('_', ' ')}" for n in names)
