"""The HTTP application: an image in the body of a request, its score in the answer.

It reads no path of the server and writes no file: the only input is the body, which is decoded as an image file is.
"""

from __future__ import annotations

import base64
import io
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import numpy as np
import torch
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.responses import HTMLResponse
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

import fastmaf
from fastmaf.images.decode import as_frame
from fastmaf.images.decoded_image import read_image
from fastmaf.images.image_file import DataError, TooLargeError
from fastmaf.images.png import png_text
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.map_images import contour_level, overlay, to_frame
from fastmaf.inspection.workflow.rows import predict_row
from fastmaf.io.marks import OVERLAY

PAGE = Path(__file__).parent / "page.html"
MAX_BYTES, MAX_PIXELS = 32 * 2**20, 25_000_000
_SECONDS = 30.0  # for a body to arrive
_NAME = Path("image")  # in messages: uploads have no path


def application(
    model: AnomalyModel,
    *,
    hosts: Sequence[str] = ("127.0.0.1", "localhost"),
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> FastAPI:
    """Returns the application for a model.

    Routes: ``POST /score``, with an image file as the body, and ``?overlay=true`` for a picture of the anomaly map;
    ``GET /health``; ``GET /``, a page to drop an image on. Several images are scored at a time, one thread each.

    Args:
        model: an inspection model.
        hosts: names by which the server may be addressed, ``"*"`` for any; others could be of a page that makes a
            browser read from here under its own name (DNS rebinding).
        max_bytes: largest body.
        max_pixels: largest width x height of an image.
    """
    app = FastAPI(title="fastmaf inspect serve", version=fastmaf.__version__, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    limiter = CapacityLimiter(torch.get_num_threads() if model.device.type == "cpu" else 1)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:"
        policy += "; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE.read_text("utf-8").replace("{{ nonce }}", nonce), headers=headers)

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Says that the server is there, and for which model."""
        calibration = model.calibration
        return {
            "status": "ok",
            "version": fastmaf.__version__,
            "size": model.size,
            "threshold": calibration.threshold,
            "false_alarm": calibration.false_alarm,
        }

    @app.post("/score")
    async def score(
        request: Request,
        with_overlay: bool = Query(False, alias="overlay", description="add the anomaly map over the image, a PNG"),
    ) -> dict[str, Any]:
        """Scores the image file in the body: PNG, JPEG, BMP or TIFF."""
        _check_origin(request)
        content = await _body(request, max_bytes)
        try:
            return await to_thread.run_sync(answer, model, content, with_overlay, max_pixels, limiter=limiter)
        except TooLargeError as error:
            raise HTTPException(413, str(error)) from error
        except DataError as error:
            raise HTTPException(422, str(error)) from error

    return app


def answer(model: AnomalyModel, content: bytes, with_overlay: bool, max_pixels: int) -> dict[str, Any]:
    """Returns the answer for the content of an image file; errors as ``fastmaf.images.decode.load_frame``."""
    frame = as_frame(read_image(_NAME, model.size, keep_full=with_overlay, content=content, max_pixels=max_pixels))
    row, anomaly_map = predict_row(model, frame)
    result: dict[str, Any] = {
        "score": row.score,
        "p_value": row.p_value,
        "verdict": row.verdict,
        "threshold": model.calibration.threshold,
        "nll": row.nll,
        "width": frame.width,
        "height": frame.height,
        "notes": list(frame.notes),
        "decode_ms": round(row.decode_ms, 2),
        "latency_ms": round(row.latency_ms, 2),
    }
    if frame.full is not None:
        image = np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())
        low, high = model.map_levels
        values = to_frame(anomaly_map, (frame.height, frame.width))
        contour = contour_level(values, high, row.verdict == "anomalous")
        shown = overlay(image, values, low=low, high=high, contour=contour)
        encoded = io.BytesIO()
        Image.fromarray(shown).save(encoded, format="PNG", pnginfo=png_text(OVERLAY), compress_level=1)
        result["overlay"] = "data:image/png;base64," + base64.b64encode(encoded.getbuffer()).decode("ascii")
    return result


def _check_origin(request: Request) -> None:
    """Refuses a request that a page of another site makes a browser send."""
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise HTTPException(403, f"expected a request of this server's own page or a program; found {origin}")


async def _body(request: Request, max_bytes: int) -> bytes:
    """Returns the body, of which no more than ``max_bytes`` are kept."""
    too_large = HTTPException(413, f"expected an image file of at most {max_bytes:,} bytes; found more")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    content = bytearray()
    try:
        with anyio.fail_after(_SECONDS):
            async for part in request.stream():
                content += part
                if len(content) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_SECONDS:g} seconds") from None
    return bytes(content)
