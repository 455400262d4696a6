"""A server in a process of its own, and requests to it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]


class Server(NamedTuple):
    url: str
    process: subprocess.Popen[str]
    log: Path


class Answer(NamedTuple):
    code: int
    content: Any
    headers: dict[str, str]


@contextmanager
def running(model: Path, log: Path, *options: object) -> Iterator[Server]:
    """Starts ``fastmaf inspect serve`` at a free port; it is ended at the end."""
    command = [sys.executable, "-m", "fastmaf", "inspect", "serve", str(model), "--port", "0", *map(str, options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file, subprocess.Popen(command, env=environment, stderr=file, text=True) as process:
        try:
            end = time.monotonic() + 200
            while not (found := re.search(r"at (http://\S+),", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, "it does not start"
                time.sleep(0.05)
            yield Server(found[1], process, log)
        finally:
            process.kill()


def stop(server: Server) -> int:
    """Ends a server by Ctrl-C, and returns its exit code."""
    server.process.send_signal(signal.SIGINT)
    return server.process.wait(60)


def ask(server: Server, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str) -> Answer:
    """Sends a request, a POST if there is a body."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(server.url + path, data=body, headers=named)
    try:
        with urllib.request.urlopen(request, timeout=100) as response:
            code, content, found = response.status, response.read(), dict(response.headers)
    except urllib.error.HTTPError as error:
        code, content, found = error.code, error.read(), dict(error.headers)
    is_json = found.get("content-type", "").startswith("application/json")
    return Answer(code, json.loads(content) if is_json else content.decode(), found)
