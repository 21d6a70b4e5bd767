"""examples/serve.py as a process: every answer is that of its task alone, whatever else the batch has or goes wrong."""

import asyncio
import http.client
import importlib.util
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers_serve import ROOT, WORDS, Server, alone, make

for needed in ("starlette", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason=f"needs the package {needed}")

pytestmark = pytest.mark.usefixtures("aten")  # for the answers that are compared; the interpreter would be slow

# A batch of four goes at once, and less than four texts wait for two seconds, so what happens meanwhile is certain.
BATCHES = ["--capacity", 3, "--bottleneck", 8, "--batch", 4, "--wait", 2000, "--queue", 32]
LIMITS = ["--bytes", 20000, "--texts", 40, "--characters", 1000]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The folder, the models with the tasks, and the tokenizer."""
    folder = tmp_path_factory.mktemp("serve")
    owners, tokenizer = make(folder)
    whole = (folder / "tasks" / "t0" / "adapter_ops.safetensors").read_bytes()
    for name, data in (("broken", whole[:-100]), ("spoilt", whole)):
        (folder / "tasks" / name).mkdir()
        (folder / "tasks" / name / "adapter_ops.safetensors").write_bytes(data)
    (folder / "outside").mkdir()
    (folder / "outside" / "adapter_ops.safetensors").write_bytes(whole)
    (folder / "tasks" / "link").symlink_to(folder / "outside")
    return folder, owners, tokenizer


@pytest.fixture(scope="module")
def server(tree):
    server = Server(tree[0] / "base", tree[0] / "tasks", *BATCHES, *LIMITS)
    yield server
    server.process.kill()
    server.wait()


@pytest.fixture(scope="module")
def serve():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("serve", ROOT / "examples" / "serve.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_right(tree, answer, task, text):
    _, owners, tokenizer = tree
    label, scores = alone(owners, tokenizer, task, text)
    assert answer["label"] == label and answer["scores"] == pytest.approx(scores, abs=2e-6), (task, text)


def test_requests_of_all_tasks_at_once(server, tree):
    """More tasks than the device has room for, of two sizes, in mixed batches."""
    before = server.metrics()
    asked = [(f"t{i % 6}", " ".join(WORDS[i : i + 1 + i % 5])) for i in range(48)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda pair: server.predict(*pair), asked))
    for (task, text), (status, answer) in zip(asked, answers):
        assert status == 200 and answer["task"] == task, answer
        assert_right(tree, answer, task, text)
    after = server.metrics()

    def grown(*key):
        return after[key] - before.get(key, 0)

    for i in range(6):
        assert grown("adapter_requests_total", ("status", "200"), ("task", f"t{i}")) == 8
    batches = grown("adapter_batch_texts_count")
    assert grown("adapter_request_seconds_count") == 48 and grown("adapter_batch_texts_sum") == 48
    assert batches == 12 and grown("adapter_batch_tasks_sum") > 18, "requests of different tasks share batches"
    assert after[("adapter_batch_texts_bucket", ("le", "4.0"))] == after[("adapter_batch_texts_count",)]
    assert grown("adapter_bank_misses_total") >= 6 and grown("adapter_bank_evictions_total") >= 1
    assert grown("adapter_bank_loads_total") >= 6 and grown("adapter_bank_seconds_loading_total") > 0
    assert after[("adapter_waiting_texts",)] == 0 and "adapter_bank_hits_total" in {key[0] for key in after}


def test_several_texts_of_different_lengths(server, tree):
    texts = [" ".join((WORDS * 2)[:n]) for n in (40, 1, 100, 3, 60, 2, 7, 5)]  # one is cut off at the model's length
    status, answer, _ = server.ask("POST", "/predict", {"task": "t5", "texts": texts})
    assert status == 200 and len(answer["predictions"]) == 8
    for text, prediction in zip(texts, answer["predictions"]):
        assert_right(tree, prediction, "t5", text)


LARGE = b'{"task": "t0", "text": "' + b"w1 " * 7000 + b'"}'


@pytest.mark.parametrize(
    "method, url, body, status, told",
    [
        ("POST", "/predict", {"task": "nobody", "text": "w1"}, 404, "there is no task 'nobody'"),
        ("POST", "/predict", {"task": "t0"}, 422, "either 'text' or 'texts'"),
        ("POST", "/predict", {"text": "w1"}, 422, "expected an object with 'task'"),
        ("POST", "/predict", {"task": "t0", "text": "w1", "texts": ["w2"]}, 422, "either 'text' or 'texts'"),
        ("POST", "/predict", {"task": 7, "text": "w1"}, 422, "'task' is 7, expected a string"),
        ("POST", "/predict", {"task": "t0", "texts": []}, 422, "'texts' has 0 entries, expected 1 to 40"),
        ("POST", "/predict", {"task": "t0", "texts": ["w1"] * 41}, 422, "'texts' has 41 entries, expected 1 to 40"),
        ("POST", "/predict", {"task": "t0", "texts": ["w1", 5]}, 422, "a text is 5, expected a string"),
        ("POST", "/predict", {"task": "t0", "text": " "}, 422, "a text is ' ', expected a string that is not empty"),
        ("POST", "/predict", {"task": "t0", "text": "w" * 1001}, 422, "1001 characters, at most 1000 are allowed"),
        ("POST", "/predict", {"task": "t0", "text": "\ud800"}, 422, "half of a surrogate pair"),
        ("POST", "/predict", b"{", 422, "the body is no JSON"),
        ("POST", "/predict", b"\xff", 422, "the body is no JSON"),
        ("POST", "/predict", b"[" * 9999, 422, "the body is no JSON"),
        ("POST", "/predict", b"[]", 422, "the body is JSON, but no object"),
        ("POST", "/predict", LARGE, 413, "the body has more than 20000 bytes"),
        ("GET", "/predict", None, 405, "Method Not Allowed"),
        ("GET", "/nothing", None, 404, "Not Found"),
        ("POST", "/tasks", {"name": "t0", "folder": "t1"}, 409, "there is a task 't0' already"),
        ("POST", "/tasks", {"name": "new"}, 422, "expected an object with 'name' and 'folder'"),
        ("POST", "/tasks", {"name": "a/b", "folder": "t1"}, 422, "may have letters, digits"),
        ("POST", "/tasks", {"name": "", "folder": "t1"}, 422, "may have letters, digits"),
        ("POST", "/tasks", {"name": "new", "folder": "nowhere"}, 422, "there is no folder 'nowhere' below"),
        ("POST", "/tasks", {"name": "new", "folder": "../outside"}, 422, "there is no folder '../outside' below"),
        ("POST", "/tasks", {"name": "new", "folder": "{}/outside"}, 422, "outside' below the folder of the tasks"),
        ("POST", "/tasks", {"name": "new", "folder": "link"}, 422, "there is no folder 'link' below"),
        ("POST", "/tasks", {"name": "new", "folder": "a\0b"}, 422, "there is no folder"),
        ("POST", "/tasks", {"name": "new", "folder": "a" * 5000}, 422, "there is no folder"),
        ("POST", "/tasks", {"name": "new", "folder": "."}, 422, "the task 'new' cannot be loaded"),
        ("POST", "/tasks", {"name": "new", "folder": "broken"}, 422, "the task 'new' cannot be loaded: "),
        ("DELETE", "/tasks/nobody", None, 404, "there is no task 'nobody'"),
    ],
)
def test_an_error_is_a_sentence(server, tree, method, url, body, status, told):
    if isinstance(body, dict) and "folder" in body:
        body = body | {"folder": body["folder"].replace("{}", str(tree[0]))}
    found, answer, _ = server.ask(method, url, body)
    assert found == status and list(answer) == ["error"] and told in answer["error"], answer
    assert "new" not in {task["name"] for task in server.ask("GET", "/tasks")[1]["tasks"]}


def test_a_body_without_its_length_is_limited(server):
    server.ready.wait()
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/predict", iter([b"x" * 5000] * 5), encode_chunked=True)
    assert connection.getresponse().status == 413


def test_loading_and_unloading(server, tree):
    """A name that is used again gets the new task, and a task on the device says so."""

    def listed():
        return {task["name"]: task["resident"] for task in server.ask("GET", "/tasks")[1]["tasks"]}

    for folder in ("t1", "t5"):
        assert server.ask("POST", "/tasks", {"name": "new", "folder": folder})[:2] == (201, {"name": "new"})
        # Three are on the device, and with them t4 and t5, which differ from the others.
        assert listed()["new"] is True and sum(listed().values()) <= 5
        status, answer = server.predict("new", ["w1 w2"] * 4)
        assert status == 200
        for prediction in answer["predictions"]:
            assert_right(tree, prediction, folder, "w1 w2")
        assert server.ask("DELETE", "/tasks/new")[:2] == (200, {"name": "new"})
        assert "new" not in listed() and server.predict("new", "w1")[0] == 404


def test_a_damaged_task(server, tree):
    """One that was damaged at the start is left out; one that is damaged later has an error of its own."""
    path = tree[0] / "tasks" / "spoilt" / "adapter_ops.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with ThreadPoolExecutor(12) as pool:
        asked = [("spoilt" if i % 4 == 0 else f"t{i % 4}", WORDS[i]) for i in range(12)]
        answers = list(pool.map(lambda pair: server.predict(*pair), asked))
    for (task, text), (status, answer) in zip(asked, answers):
        if task == "spoilt":
            assert status == 500 and "the task 'spoilt' cannot run: " in answer["error"], answer
            assert str(tree[0]) not in answer["error"], "no path of the machine"
        else:
            assert status == 200
            assert_right(tree, answer, task, text)
    assert "The task 'broken' is left out: " in server.log and "The task 'spoilt' cannot run." in server.log
    assert server.ask("GET", "/health")[:2] == (200, {"status": "ok"})


def test_tasks_come_and_go_while_requests_run(server, tree):
    """Every answer is right; a 404 is right only for the task that goes."""
    stop, bad, gone = threading.Event(), [], []

    def ask(i):
        while not stop.is_set():
            task, text = ("x", "w5 w6") if i % 2 else (f"t{i}", WORDS[i])
            status, answer = server.predict(task, [text] * 2)
            try:
                if (task, status) == ("x", 404):
                    gone.append(answer["error"])
                else:
                    assert status == 200, answer
                    for prediction in answer["predictions"]:
                        assert_right(tree, prediction, "t2" if task == "x" else task, text)
            except AssertionError as error:
                bad.append(error)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(15):
        assert server.ask("POST", "/tasks", {"name": "x", "folder": "t2"})[0] == 201
        assert server.ask("DELETE", "/tasks/x")[0] == 200
    stop.set()
    for thread in threads:
        thread.join()
    assert bad == [] and gone and all("task 'x'" in error for error in gone)


def in_flight(server, count):
    """Waits until so many texts are in the queue."""
    end = time.monotonic() + 20
    while server.metrics()[("adapter_waiting_texts",)] != count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_task_unloaded_while_its_request_waits(server, tree):
    """It has an error of its own, also if its name is used again; the others of the batch are answered."""
    with ThreadPoolExecutor(8) as pool:
        waiting = {task: pool.submit(server.predict, task, "w1 w2 w3") for task in ("t0", "t1", "t5")}
        in_flight(server, 3)
        assert server.ask("DELETE", "/tasks/t1")[0] == 200
        assert server.ask("POST", "/tasks", {"name": "t1", "folder": "t3"})[0] == 201
        in_flight(server, 3)
        waiting["t2"] = pool.submit(server.predict, "t2", "w1 w2 w3")  # the fourth
        assert waiting.pop("t1").result() == (404, {"error": "the task 't1' was unloaded while its request waited"})
        for task, future in waiting.items():
            assert future.result()[0] == 200
            assert_right(tree, future.result()[1], task, "w1 w2 w3")


def test_a_full_queue(server):
    status, answer, headers = server.ask("POST", "/predict", {"task": "t0", "texts": ["w1"] * 33})
    assert (
        status == 503 and headers["retry-after"] == "1" and answer["error"].startswith("of 32 places in the queue 0 ")
    )
    found = server.metrics()
    assert found[("adapter_requests_total", ("status", "503"), ("task", "t0"))] == 1
    assert found[("adapter_requests_total", ("status", "404"), ("task", ""))] >= 1, "of a task that there is not"
    assert not any(("task", "nobody") in key for key in found)


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_at_sigterm_requests_in_flight_are_answered(server, tree):
    """This is the last test of the process."""
    with ThreadPoolExecutor(8) as pool:
        waiting = {task: pool.submit(server.predict, task, "w4 w5") for task in ("t0", "t2", "t5")}
        in_flight(server, 3)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert not any(future.done() for future in waiting.values()), "they were in flight when the signal came"
        with pytest.raises(OSError):
            server.ask("GET", "/health")  # no new requests
        for task, future in waiting.items():
            status, answer = future.result()
            assert status == 200
            assert_right(tree, answer, task, "w4 w5")
    assert server.wait() == 0, server.log
    assert server.log.count("Traceback") == server.log.count("The task 'spoilt' cannot run.")


class Fake:
    """Tasks whose answers wait until the test allows them."""

    def __init__(self, serve):
        self.known = {"t": serve.Task(None, "t.0", ["no", "yes"], None)}
        self.go, self.batches = threading.Event(), []

    def answer(self, texts):
        self.batches.append([text.text for text in texts])
        assert self.go.wait(20)
        return [text.text for text in texts]


def service(serve, *arguments):
    return serve.Service(Fake(serve), serve.parse(["model", ".", *map(str, arguments)]))


def test_a_request_that_waits_too_long(serve):
    """It ends with 504, and its texts that wait still are not computed; the event loop is free while a batch runs."""

    async def run():
        one = service(serve, "--timeout", 0.2, "--wait", 0, "--batch", 1)
        async with one.running(None):
            asked = [asyncio.create_task(one.ask("t", [text])) for text in ("a", "b")]
            errors = await asyncio.gather(*asked, return_exceptions=True)
            assert [(e.status_code, e.detail) for e in errors] == [(504, "no answer within 0.2 seconds")] * 2
            one.tasks.go.set()
            assert await one.ask("t", ["c"]) == ["c"]
        assert one.tasks.batches == [["a"], ["c"]]

    one = asyncio.run(asyncio.wait_for(run(), 20))
    assert one is None


def test_a_body_that_does_not_come(serve):
    async def run():
        one = service(serve, "--timeout", 0.1)
        request = serve.Request({"type": "http", "headers": []}, lambda: asyncio.sleep(20))
        with pytest.raises(serve.HTTPException, match=r"no whole body within 0\.1 seconds") as caught:
            await one.body(request, task=str)
        assert caught.value.status_code == 408

    asyncio.run(asyncio.wait_for(run(), 10))


def test_calls_of_the_model(serve):
    """Each is of one bank, of no more tasks than it holds, and of texts of similar lengths."""
    tasks = object.__new__(serve.Tasks)
    tasks.capacity, tasks.padding = 2, 10
    of = {key: serve.Task("a bank" if key < "d" else "another", key, [], None) for key in "abcde"}
    asked = [("a", 5), ("d", 5), ("b", 40), ("e", 6), ("a", 9), ("b", 6), ("c", 5), ("c", 5), ("d", 5)]
    texts = [serve.Text("", of[key], None, 0.0) for key, _ in asked]
    calls = [[asked[i] for i in part] for part in tasks.calls(texts, [length for _, length in asked])]
    of_one = [[("a", 5), ("b", 6), ("a", 9)], [("b", 40)], [("c", 5), ("c", 5)]]
    assert sorted(calls) == sorted([*of_one, [("d", 5), ("d", 5), ("e", 6)]])


def test_wrong_options(serve, capsys):
    for arguments, told in (
        (["nowhere"], "argument tasks: there is no folder 'nowhere'"),
        ([".", "--batch", "0"], "argument --batch: expected a number above 0, found 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            serve.parse(["model", *arguments])
        assert told in capsys.readouterr().err


def test_a_batch_goes_when_it_is_full_or_its_oldest_text_has_waited(serve):
    async def run():
        one = service(serve, "--wait", 300, "--batch", 4)
        one.tasks.go.set()
        async with one.running(None):
            start = time.monotonic()
            await asyncio.gather(*(one.ask("t", [text]) for text in "abcd"))
            assert time.monotonic() - start < 0.25, "a full batch waits for nothing"
            start, asked = time.monotonic(), []
            for text, pause in (("e", 0.2), ("f", 0.25), ("g", 0)):
                asked.append(asyncio.create_task(one.ask("t", [text])))
                await asyncio.sleep(pause)
            await asked[0]
            assert time.monotonic() - start > 0.29
            await asyncio.gather(*asked)
        assert one.tasks.batches == [["a", "b", "c", "d"], ["e", "f"], ["g"]]

    asyncio.run(run())
