"""``fastmaf inspect serve``: a server until Ctrl-C."""

from __future__ import annotations

import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import torch
import uvicorn

import fastmaf
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.serve.app import MAX_BYTES, MAX_PIXELS, application
from fastmaf.inspection.workflow.inputs import Say

_CONNECTIONS = 64  # at a time; further ones are answered 503


@fastmaf.torch_defaults()
def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    device: str = "cpu",
    say: Say,
) -> None:
    """Serves a model over HTTP until Ctrl-C; see ``application``.

    Args:
        host: address to listen at; others than those of this machine itself can be reached from elsewhere.
        port: 0 for any free one.

    Raises:
        OSError: the address is in use, or not one of this machine.
    """
    loaded = load_inspection(model, device=device)
    local = _is_local(host)
    named = f"[{host}]" if ":" in host else host  # as in the header of a request
    hosts = [named, "127.0.0.1", "localhost"] if local else ["*"]
    app = application(loaded, hosts=hosts, max_bytes=max_bytes, max_pixels=max_pixels)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"{host}:{port}") from error
    threads = torch.get_num_threads()
    with listening:
        at = f"[{host}]" if ":" in host else host
        say(f"serving {model} at http://{at}:{listening.getsockname()[1]}, until Ctrl-C")
        if not local:
            say("anyone who can reach this address can use it: there is no password and no encryption")
        config = uvicorn.Config(
            app,
            log_level="warning",
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        torch.set_num_threads(1)  # of each of the threads that score images
        try:
            with suppress(KeyboardInterrupt):  # which uvicorn raises once it has ended
                uvicorn.Server(config).run(sockets=[listening])
        finally:
            torch.set_num_threads(threads)


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
