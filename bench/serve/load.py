"""The load test: clients that ask, wait for the answer, and ask again, while every answer is checked."""

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

from .client import connected, metrics
from .tasks import World

POPULARITY = ("even", "zipf")


@dataclass
class Result:
    """What several rounds of one load on one server gave."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)  # seconds, of right answers
    errors: Counter[str] = field(default_factory=Counter)  # by what was wrong
    counted: Counter[str] = field(default_factory=Counter)  # by name of the metric, what it grew by

    @property
    def rate(self) -> float:
        """Right answers in a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def quantile(self, q: float) -> float:
        """Of the latencies, in ms; NaN where there are none."""
        ordered = sorted(self.latencies)
        return 1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)] if ordered else float("nan")

    def mean(self, name: str) -> float:
        """The mean of a histogram of /metrics."""
        count = self.counted[f"{name}_count"]
        return self.counted[f"{name}_sum"] / count if count else float("nan")


def weights(popularity: str, tasks: int) -> list[float]:
    """How often each task is asked, relative to the others: alike, or as 1, 1/2, 1/3 and so on."""
    return [1.0 if popularity == "even" else 1 / (rank + 1) for rank in range(tasks)]


async def warm_up(port: int, world: World) -> None:
    """Asks every task once, which brings it to the device. Raises RuntimeError for an answer that is not right."""
    async with connected(port) as client:
        for task in world.scores:
            status, answer = await client.ask("POST", "/predict", {"task": task, "text": world.texts[0]})
            if status != 200 or not world.right(task, 0, answer):
                raise RuntimeError(f"the first answer of {task} is not right: {answer}")


async def load(port: int, world: World, clients: int, popularity: str, seconds: float, seed: int, into: Result) -> None:
    """A round: so many clients ask for so long. Their choices follow from the seed."""
    before = await metrics(port)
    names = list(world.scores)
    cumulative = list(accumulate(weights(popularity, len(names))))
    start = time.perf_counter()

    async def ask(number: int) -> None:
        choice = random.Random(f"{seed} {number}")
        async with connected(port) as client:
            while (asked := time.perf_counter()) < start + seconds:
                (task,), text = choice.choices(names, cum_weights=cumulative), choice.randrange(len(world.texts))
                status, answer = await client.ask("POST", "/predict", {"task": task, "text": world.texts[text]})
                if status != 200:
                    into.errors[f"status {status}"] += 1
                elif not world.right(task, text, answer):
                    into.errors["wrong answer"] += 1
                else:
                    into.latencies.append(time.perf_counter() - asked)

    for outcome in await asyncio.gather(*(ask(number) for number in range(clients)), return_exceptions=True):
        if isinstance(outcome, BaseException):
            into.errors[type(outcome).__name__] += 1
    into.seconds += time.perf_counter() - start
    after = await metrics(port)
    into.counted.update({name: value - before.get(name, 0.0) for name, value in after.items()})  # type: ignore[arg-type]
