"""A server's process, and clients that ask it over connections that stay open."""

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Server:
    """A process of server.py. `log` has what it writes to stderr.

    Args:
        mode: one of `server.MODES`.
        threads: of PyTorch.
        arguments: of examples/serve.py.
    """

    def __init__(self, mode: str, threads: int, arguments: Sequence[object]) -> None:
        command = [sys.executable, "-m", "bench.serve.server", mode, str(threads), *map(str, arguments), "--port", "0"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
        self.log, self.port = "", 0
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if match := re.search(r"running on http://[^ ]+:(\d+)", line):
                self.port = int(match[1])
                self._ready.set()
        self._ready.set()

    def wait_until_ready(self) -> None:
        """Raises RuntimeError if the process ends instead."""
        self._ready.wait()
        if not self.port:
            raise RuntimeError(f"the server ended before it was ready:\n{self.log}")

    def megabytes(self, field: str) -> float:
        """VmRSS or VmHWM, its peak, of the process; NaN where the system does not say."""
        with contextlib.suppress(OSError):
            if match := re.search(rf"{field}:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text()):
                return int(match[1]) / 1000
        return float("nan")

    def stop(self) -> int:
        """Ends the process as SIGTERM does, and returns its exit status; one that does not end is killed."""
        self.process.terminate()
        try:
            return self.process.wait(timeout=60)
        finally:
            self.process.kill()


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """The status and the JSON of an answer, or its text where it is no JSON."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        self.writer.write(head.encode() + data)
        first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        text = await self.reader.readexactly(int(headers["content-length"]))
        is_json = headers["content-type"] == "application/json"
        return int(first.split()[1]), json.loads(text) if is_json else text.decode()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


async def metrics(port: int) -> dict[str, float]:
    """The samples of /metrics without labels."""
    async with connected(port) as client:
        _, text = await client.ask("GET", "/metrics")
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text, re.MULTILINE)}
