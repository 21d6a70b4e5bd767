"""A service for many tasks on one base model, which runs the requests of different tasks together, in one batch.

It needs Starlette, uvicorn and prometheus_client (`pip install 'adapter-ops[serve]'`). The tasks are the folders below
one folder, each written by `save_adapter`; a folder's name is the task's. The first request for a task brings it to the
device, where as many tasks of one config and number of labels stay as `--capacity` says; those run in one call.

    python examples/serve.py bert-base-uncased tasks --port 8000 --capacity 64 --batch 32 --wait 5

    curl localhost:8000/predict -d '{"task": "cola", "text": "They drank the pub dry."}'
    curl localhost:8000/predict -d '{"task": "cola", "texts": ["A text.", "Another text."]}'
    curl localhost:8000/tasks                                                # all tasks, and which are on the device
    curl localhost:8000/tasks -d '{"name": "cola-2", "folder": "cola-new"}'  # loads tasks/cola-new
    curl -X DELETE localhost:8000/tasks/cola-2                               # forgets it; the folder stays
    curl localhost:8000/metrics                                              # for Prometheus
    curl localhost:8000/health

A text waits at most `--wait` milliseconds for others to share its batch; while a batch runs, the next one gathers. An
error has a status of HTTP and a sentence in JSON, and that of one text does not reach the others of its batch. At
SIGTERM the service takes no more requests, answers those that it has, and ends with exit status 0. It knows no users
and no encryption: put it behind a proxy that does. It runs one process a device.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import math
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import torch
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from safetensors import safe_open
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapter_ops import AdapterBank

FREE = {"bottleneck", "reduction_factor", "init", "init_std", "dropout"}  # in these the tasks of one bank may differ


class Task(NamedTuple):
    bank: AdapterBank  # one for each config and number of labels
    key: str  # The bank's name for it, which is never used again: a request never gets another task of the same name.
    labels: list[str]
    kind: str | None  # as `problem_type` in transformers


class Text(NamedTuple):
    text: str
    task: Task
    answer: asyncio.Future[Any]
    arrived: float


class Tasks:
    """The base model and its tasks. `load` and `unload` run in one thread, and `answer` in another one."""

    def __init__(self, model: str, folder: Path, capacity: int, bottleneck: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = AutoModelForSequenceClassification.from_pretrained(model).eval().to(self.device)
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        positions = getattr(self.model.config, "max_position_embeddings", None) or 512
        self.length = min(self.tokenizer.model_max_length, positions)
        self.padding = 64 if self.device.type == "cpu" else 4096  # tokens that cost about as much as another call
        self.capacity, self.bottleneck, self.banks = capacity, bottleneck, dict[str, AdapterBank]()
        self.folder, self.known, self.number = folder.resolve(), dict[str, Task](), count()
        self.calling = threading.Lock()  # A bank's first task is to be loaded while nobody calls the model.

    def find(self) -> None:
        """Makes a task of every folder that holds one. None is on the device yet."""
        for path in sorted(self.folder.glob("*/adapter_ops.safetensors")):
            try:
                self.load(path.parent.name, path.parent.name, AdapterBank.register)
            except HTTPException as error:
                print(f"The task {path.parent.name!r} is left out: {error.detail}", file=sys.stderr)

    def load(self, name: str, folder: str, bring: Callable[..., None] = AdapterBank.load) -> None:
        """Makes a task of a folder below that of the tasks, and brings it to the device."""
        if not re.fullmatch("[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", name):
            raise HTTPException(422, f"the name {ascii(name)[:100]} may have letters, digits, '-', '_' and '.' only")
        if name in self.known:
            raise HTTPException(409, f"there is a task {name!r} already: unload it first, or choose another name")
        try:
            path = (self.folder / folder).resolve()
            there = path.is_relative_to(self.folder) and path.is_dir()
        except (OSError, RuntimeError, ValueError):  # a name that no folder can have
            there = False
        if not there:
            raise HTTPException(422, f"there is no folder {ascii(folder)[:100]} below the folder of the tasks")
        try:
            with safe_open(path / "adapter_ops.safetensors", "pt") as file:
                header = json.loads(file.metadata()["adapter_ops"])
            labels = header["labels"] or {}
            names, number = labels.get("id2label") or {}, labels.get("num_labels", self.model.config.num_labels)
            config = {field: value for field, value in header["config"].items() if field not in FREE}
            kind = json.dumps([number, config, header["modules"], header["sites"]], sort_keys=True)
            bank = self.banks.get(kind) or AdapterBank(self.model, self.capacity, self.bottleneck)
            key = f"{name}.{next(self.number)}"
            with contextlib.nullcontext() if bank.stats().loads else self.calling:
                bring(bank, key, path)
        except Exception as error:  # whatever a damaged file leads to
            raise HTTPException(422, f"the task {name!r} cannot be loaded: {self.sentence(error)}") from error
        labels_of = [names.get(str(i), f"LABEL_{i}") for i in range(number)]
        self.banks[kind], self.known[name] = bank, Task(bank, key, labels_of, labels.get("problem_type"))

    def unload(self, name: str) -> None:
        if (task := self.known.pop(name, None)) is None:
            raise HTTPException(404, f"there is no task {ascii(name)[:100]}")
        task.bank.unload(task.key)

    def sentence(self, error: Exception) -> str:
        return str(error).replace(f"{self.folder}/", "") or type(error).__name__

    def answer(self, texts: Sequence[Text]) -> list[Any]:
        """The prediction for each text, or the exception in its place."""
        try:
            return self.run(texts)
        except Exception as error:
            if len(texts) == 1:
                return [error]
        half = len(texts) // 2  # until the text that fails is alone
        return [*self.answer(texts[:half]), *self.answer(texts[half:])]

    @torch.inference_mode()
    def run(self, texts: Sequence[Text]) -> list[Any]:
        ids = self.tokenizer([t.text for t in texts], truncation=True, max_length=self.length)["input_ids"]
        found: list[Any] = [None] * len(texts)
        for part in self.calls(texts, [len(tokens) for tokens in ids]):
            tokens = [torch.tensor(ids[i]) for i in part]
            padded = pad_sequence(tokens, batch_first=True, padding_value=self.tokenizer.pad_token_id)
            mask = pad_sequence([torch.ones_like(t) for t in tokens], batch_first=True)
            batch = {"input_ids": padded.to(self.device), "attention_mask": mask.to(self.device)}
            with self.calling:
                logits = self.logits([texts[i].task for i in part], batch).double().cpu()
            for i, row in zip(part, logits):
                found[i] = prediction(texts[i].task, row)
        return found

    def calls(self, texts: Sequence[Text], lengths: Sequence[int]) -> Iterator[list[int]]:
        """The texts by number, in calls of the model: of one bank, no more tasks than it holds, and similar lengths."""
        tasks, seen = [text.task for text in texts], dict[AdapterBank, dict[str, int]]()
        for task in tasks:
            seen.setdefault(task.bank, {}).setdefault(task.key, len(seen[task.bank]))
        groups = [(id(task.bank), seen[task.bank][task.key] // self.capacity) for task in tasks]
        part = list[int]()
        for i in sorted(range(len(texts)), key=lambda i: (groups[i], lengths[i])):
            padding = sum(lengths[i] - lengths[j] for j in part)
            if part and (groups[i] != groups[part[0]] or padding > self.padding):
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def logits(self, tasks: Sequence[Task], batch: dict[str, Tensor]) -> Tensor:
        """[texts, labels] of tasks of one bank."""
        with tasks[0].bank.using([task.key for task in tasks]):
            return self.model(**batch).logits


def prediction(task: Task, row: Tensor) -> dict[str, Any]:
    row = row[: len(task.labels)]
    if not row.isfinite().all():
        raise ValueError("its logits are not finite")
    if task.kind == "regression" or len(row) == 1:
        return {"label": None, "scores": dict(zip(task.labels, row.tolist()))}
    scores = row.sigmoid() if task.kind == "multi_label_classification" else row.softmax(0)
    return {"label": task.labels[int(row.argmax())], "scores": dict(zip(task.labels, scores.tolist()))}


class Service:
    """The queue, the batches made of it, and the answers to requests. Its methods run on the event loop."""

    def __init__(self, tasks: Tasks, options: argparse.Namespace) -> None:
        self.tasks, self.options = tasks, options
        self.waiting, self.arrived = deque[Text](), asyncio.Event()
        self.registry = CollectorRegistry()
        self.registry.register(self)
        seconds = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, math.inf)
        sizes = (1, 2, 4, 8, 16, 32, 64, 128, 256, math.inf)
        new: Any = {"registry": self.registry}
        self.requests = Counter("adapter_requests", "Requests to /predict.", ["task", "status"], **new)
        self.latency = Histogram("adapter_request_seconds", "Time of a request to /predict.", buckets=seconds, **new)
        self.texts = Histogram("adapter_batch_texts", "Texts in a batch.", buckets=sizes, **new)
        self.mixed = Histogram("adapter_batch_tasks", "Different tasks in a batch.", buckets=sizes, **new)
        Gauge("adapter_waiting_texts", "Texts in the queue.", **new).set_function(lambda: len(self.waiting))

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The bank's counters, for the registry."""
        stats = [bank.stats() for bank in list(self.tasks.banks.values())]
        for field in ("hits", "misses", "evictions", "loads", "seconds_loading"):
            value = sum(getattr(one, field) for one in stats)
            yield CounterMetricFamily(f"adapter_bank_{field}", f"AdapterBank.stats().{field}", value=value)

    @contextlib.asynccontextmanager
    async def running(self, app: Starlette) -> Any:
        self.model_thread, self.load_thread = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.worker = asyncio.create_task(self.work())
        yield
        self.worker.cancel()
        for thread in (self.model_thread, self.load_thread):
            thread.shutdown()

    async def work(self) -> None:
        """Takes a batch from the queue when it is full, or when its oldest text has waited for long enough."""
        loop = asyncio.get_running_loop()
        while True:
            delay = self.waiting[0].arrived + self.options.wait / 1000 - loop.time() if self.waiting else None
            if delay is not None and (delay <= 0 or len(self.waiting) >= self.options.batch):
                batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.options.batch))]
                batch = [text for text in batch if not text.answer.done()]  # done: its request gave up
                if batch:
                    self.texts.observe(len(batch))
                    self.mixed.observe(len({text.task.key for text in batch}))
                    answers = await loop.run_in_executor(self.model_thread, self.tasks.answer, batch)
                    for text, answer in zip(batch, answers):
                        if not text.answer.done():
                            text.answer.set_result(answer)
            else:
                self.arrived.clear()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self.arrived.wait(), delay)

    async def ask(self, name: str, texts: Sequence[str]) -> list[Any]:
        """Waits for the predictions. Raises HTTPException where one of them cannot be made."""
        if (task := self.tasks.known.get(name)) is None:
            raise HTTPException(404, f"there is no task {ascii(name)[:100]}")
        if len(self.waiting) + len(texts) > self.options.queue:
            full = f"of {self.options.queue} places in the queue {len(self.waiting)} are taken: try again"
            raise HTTPException(503, full, {"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        entries = [Text(text, task, loop.create_future(), loop.time()) for text in texts]
        self.waiting.extend(entries)
        self.arrived.set()
        try:
            with anyio.fail_after(self.options.timeout):
                answers = await asyncio.gather(*(entry.answer for entry in entries))
        except TimeoutError as error:
            raise HTTPException(504, f"no answer within {self.options.timeout:g} seconds") from error
        finally:
            for entry in entries:
                entry.answer.cancel()
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        if failed and self.tasks.known.get(name) is not task:
            raise HTTPException(404, f"the task {name!r} was unloaded while its request waited")
        if failed:
            logging.getLogger("uvicorn.error").error("The task %r cannot run.", name, exc_info=failed[0])
            raise HTTPException(500, f"the task {name!r} cannot run: {self.tasks.sentence(failed[0])}") from failed[0]
        return answers

    async def body(self, request: Request, **kinds: type) -> list[Any]:
        """The values of these fields of the JSON object that a request has; None for one that it has not."""
        data, limit = bytearray(), self.options.bytes
        try:
            with anyio.fail_after(self.options.timeout):
                async for chunk in request.stream():
                    data += chunk
                    if len(data) > limit or int(request.headers.get("content-length", 0)) > limit:
                        raise HTTPException(413, f"the body has more than {limit} bytes")
            given = json.loads(data)
        except TimeoutError as error:
            raise HTTPException(408, f"no whole body within {self.options.timeout:g} seconds") from error
        except (ValueError, RecursionError) as error:
            raise HTTPException(422, f"the body is no JSON: {error}") from error
        if not isinstance(given, dict):
            raise HTTPException(422, "the body is JSON, but no object")
        for field, kind in kinds.items():
            if not isinstance(given.get(field), (kind, type(None))):
                wanted = "string" if kind is str else "list"
                raise HTTPException(422, f"{field!r} is {ascii(given[field])[:100]}, expected a {wanted}")
        return [given.get(field) for field in kinds]

    async def predict(self, request: Request) -> Response:
        start, status, known = time.perf_counter(), 500, ""
        try:
            name, text, texts = await self.body(request, task=str, text=str, texts=list)
            known = name if name in self.tasks.known else ""  # so that no client makes new series
            if name is None or (text is None) == (texts is None):
                raise HTTPException(422, "expected an object with 'task', and either 'text' or 'texts'")
            asked = [text] if texts is None else texts
            if not 1 <= len(asked) <= self.options.texts:
                raise HTTPException(422, f"'texts' has {len(asked)} entries, expected 1 to {self.options.texts}")
            for one in asked:
                check(one, self.options.characters)
            found = await self.ask(name, asked)
            status = 200
            return JSONResponse({"task": name, **(found[0] if texts is None else {"predictions": found})})
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            self.requests.labels(known, status).inc()
            self.latency.observe(time.perf_counter() - start)

    async def names(self, request: Request) -> Response:
        resident = {key for bank in list(self.tasks.banks.values()) for key in bank.resident()}
        known = list(self.tasks.known.items())  # other threads change it
        return JSONResponse({"tasks": [{"name": name, "resident": task.key in resident} for name, task in known]})

    async def load(self, request: Request) -> Response:
        name, folder = await self.body(request, name=str, folder=str)
        if name is None or folder is None:
            raise HTTPException(422, "expected an object with 'name' and 'folder'")
        await asyncio.get_running_loop().run_in_executor(self.load_thread, self.tasks.load, name, folder)
        return JSONResponse({"name": name}, 201)

    async def unload(self, request: Request) -> Response:
        name = request.path_params["name"]
        await asyncio.get_running_loop().run_in_executor(self.load_thread, self.tasks.unload, name)
        return JSONResponse({"name": name})

    async def metrics(self, request: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)

    async def health(self, request: Request) -> Response:
        works = not self.worker.done()
        return JSONResponse({"status": "ok" if works else "the batches have stopped"}, 200 if works else 503)


def check(text: Any, limit: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise HTTPException(422, f"a text is {ascii(text)[:100]}, expected a string that is not empty")
    if len(text) > limit:
        raise HTTPException(422, f"a text has {len(text)} characters, at most {limit} are allowed")
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise HTTPException(422, "a text has half of a surrogate pair, which is no character")


async def problem(request: Request, error: Any) -> Response:
    sentence = getattr(error, "detail", "the service has failed; its log says why")
    return JSONResponse({"error": sentence}, getattr(error, "status_code", 500), getattr(error, "headers", None))


def create_app(tasks: Tasks, options: argparse.Namespace) -> Starlette:
    service = Service(tasks, options)
    routes = [
        Route("/predict", service.predict, methods=["POST"]),
        Route("/tasks", service.names),
        Route("/tasks", service.load, methods=["POST"]),
        Route("/tasks/{name}", service.unload, methods=["DELETE"]),
        Route("/metrics", service.metrics),
        Route("/health", service.health),
    ]
    handlers: Any = dict.fromkeys((HTTPException, ClientDisconnect, Exception), problem)
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=service.running)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("model", help="folder or name on the Hugging Face hub of the base model")
    add("tasks", type=Path, help="folder whose folders are tasks")
    add("--capacity", type=int, default=64, help="tasks on the device at a time (default: %(default)s)")
    add("--bottleneck", type=int, default=64, help="the largest of any task (default: %(default)s)")
    add("--host", default="127.0.0.1", help="default: %(default)s, which only this machine reaches")
    add("--port", type=int, default=8000, help="default: %(default)s; 0 takes a free one")
    add("--batch", type=int, default=32, help="texts in a batch (default: %(default)s)")
    add("--wait", type=float, default=5.0, help="ms that a text waits for others (default: %(default)s)")
    add("--queue", type=int, default=1024, help="texts that may wait (default: %(default)s)")
    add("--texts", type=int, default=64, help="texts in a request (default: %(default)s)")
    add("--characters", type=int, default=20_000, help="of a text (default: %(default)s)")
    add("--bytes", type=int, default=1_000_000, help="of a request's body (default: %(default)s)")
    add("--timeout", type=float, default=30.0, help="seconds that a request may take (default: %(default)s)")
    options = parser.parse_args(arguments)
    for name in ("capacity", "bottleneck", "batch", "queue", "texts", "characters", "bytes", "timeout"):
        if getattr(options, name) <= 0:
            parser.error(f"argument --{name}: expected a number above 0, found {getattr(options, name)}")
    if not options.tasks.is_dir():
        parser.error(f"argument tasks: there is no folder {str(options.tasks)!r}")
    return options


def serve(app: Starlette, options: argparse.Namespace) -> None:
    """Runs until SIGTERM or SIGINT, and returns when every request is answered."""
    limit: Any = {"timeout_graceful_shutdown": math.ceil(options.timeout) + 5}
    server = uvicorn.Server(uvicorn.Config(app, options.host, options.port, access_log=False, lifespan="on", **limit))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.handle_exit)  # uvicorn raises the signal again at its end, which would end us
    server.run()


def main() -> None:
    options = parse()
    tasks = Tasks(options.model, options.tasks, options.capacity, options.bottleneck)
    tasks.find()
    serve(create_app(tasks, options), options)


if __name__ == "__main__":
    main()
