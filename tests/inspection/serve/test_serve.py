"""``fastmaf inspect serve``: real requests to a server in a process of its own."""

from __future__ import annotations

import base64
import io
import os
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf import extras
from fastmaf.images.decode import load_frame
from fastmaf.inspection.model import load_inspection
from fastmaf.io.marks import OVERLAY, role_of
from tests.inspection.serve.server import Server, ask, running, stop

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

LIMITS = ("--max-bytes", 20_000, "--max-pixels", 10_000)


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(run, tmp_path_factory.mktemp("log") / "log", *LIMITS) as found:
        yield found


def png(side: tuple[int, int] = (40, 30), mode: str = "RGB", seed: int = 0) -> bytes:
    values = np.random.default_rng(seed).integers(100, 140, (side[1], side[0], 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(values).convert(mode).save(file, "PNG")
    return file.getvalue()


def test_the_answer_is_that_of_score(server: Server, run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    model, frame = load_inspection(run), load_frame(tmp_path / "a.png", 16)
    expected = model.predict(frame.pixels[None])
    answer = ask(server, "/score", png())
    assert answer.code == 200 and "overlay" not in answer.content
    assert answer.content["score"] == expected.scores[0] and answer.content["nll"] == expected.nll[0]
    assert answer.content["p_value"] == model.calibration.p_values(expected.scores)[0]
    anomalous = bool(model.calibration.is_anomalous(expected.scores)[0])
    assert answer.content["verdict"] == ("anomalous" if anomalous else "good")
    assert answer.content["threshold"] == model.calibration.threshold
    assert (answer.content["width"], answer.content["height"], answer.content["notes"]) == (40, 30, [])
    grey = ask(server, "/score", png(mode="L")).content
    assert grey["notes"] == ["1 grey image, with R = G = B"]


def test_the_overlay_is_a_marked_picture_of_the_images_size(server: Server, tmp_path: Path) -> None:
    kind, _, content = ask(server, "/score?overlay=true", png()).content["overlay"].partition(",")
    (path := tmp_path / "overlay.png").write_bytes(base64.b64decode(content))
    assert kind == "data:image/png;base64" and role_of(path) == OVERLAY
    with Image.open(path) as picture:
        assert picture.size == (40, 30)


def test_many_requests_at_a_time(server: Server) -> None:
    alone = [ask(server, "/score", png(seed=i)).content["score"] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(server, "/score", png(seed=i % 8)), range(40)))
    assert [answer.content["score"] for answer in answers] == 5 * alone


def test_what_is_no_image_is_refused_with_the_reason(server: Server) -> None:
    for body, reason in (
        (b"hello", "found none of these"),
        (b"", "found an empty file"),
        (png()[:-300], "image: "),
        (b"/etc/passwd", "found none of these"),
    ):
        answer = ask(server, "/score", body)
        assert answer.code == 422 and reason in answer.content["detail"]
    assert ask(server, "/score?overlay=perhaps", png()).code == 422


def test_large_bodies_and_images_are_refused(server: Server) -> None:
    limit = "expected an image file of at most 20,000 bytes; found more"
    answer = ask(server, "/score", bytes(20_001))
    assert (answer.code, answer.content["detail"]) == (413, limit)
    answer = ask(server, "/score", (bytes(1000) for _ in range(100)), Transfer_Encoding="chunked")
    assert (answer.code, answer.content["detail"]) == (413, limit)
    answer = ask(server, "/score", png((101, 100), "1"))
    assert answer.code == 413 and "101 x 100 = 10,100 pixels; expected at most 10,000" in answer.content["detail"]
    assert ask(server, "/score", png((100, 100), "1")).code == 200


def test_no_path_is_read(server: Server) -> None:
    for path in ("/etc/passwd", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/static", "/docs", "/redoc"):
        assert ask(server, path).code == 404
    assert ask(server, "/score").code == 405
    paths = ask(server, "/openapi.json").content["paths"]
    assert set(paths) == {"/score", "/health"}
    health = ask(server, "/health").content
    assert health["status"] == "ok" and health["size"] == 16


def test_pages_of_other_sites_cannot_use_it(server: Server) -> None:
    answer = ask(server, "/score", png(), Origin="https://example.com")
    assert answer.code == 403 and "https://example.com" in answer.content["detail"]
    assert ask(server, "/score", png(), Origin=server.url).code == 200
    assert ask(server, "/health", Host="example.com").code == 400, "a name that leads here (DNS rebinding)"


def test_only_this_machine_reaches_it(server: Server) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    port = int(server.url.rpartition(":")[2])
    with socket.socket() as other, pytest.raises(OSError):
        other.settimeout(5)
        other.connect(("127.0.0.2", port))


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C cannot be sent to one process there")
def test_it_ends_cleanly_and_says_where_a_port_is_taken(run: Path, tmp_path: Path) -> None:
    with running(run, tmp_path / "log", "--host", "0.0.0.0") as server:
        assert "no password and no encryption" in server.log.read_text()
        with pytest.raises(AssertionError, match=r"error: 127\.0\.0\.1:\d+: address already in use"):
            port = server.url.rpartition(":")[2]
            with running(run, tmp_path / "second", "--port", port):
                pass
        assert stop(server) == 0
    assert "Traceback" not in server.log.read_text()


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else name)
    for name in [name for name in sys.modules if name.startswith("fastmaf.inspection.serve")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(extras.MissingExtraError, match=r'needs uvicorn: pip install "fastmaf\[serve\]"'):
        import fastmaf.inspection.serve  # noqa: F401


def test_threads_are_given_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    from fastmaf.inspection.serve.run import serve

    during: list[int] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda *_, **__: during.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    serve(run, port=0, say=lambda _: None)
    assert during == [1] and torch.get_num_threads() == before
