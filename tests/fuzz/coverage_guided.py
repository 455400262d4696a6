"""Fuzzing that is guided by coverage, with atheris: ``python -m tests.fuzz.coverage_guided KIND FOLDER [OPTIONS]``.

KIND is ``image`` or ``model``; FOLDER receives the inputs that reach new code. The options are those of libFuzzer, such
as ``-max_total_time=60``. An input that is not handled as promised ends it, and is written to a file ``crash-...``.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["fastmaf.io", "fastmaf.images", "PIL"]):
    import fastmaf
    from fastmaf.io.checkpoint import load
    from tests.fuzz import images

LIMITS = ("-rss_limit_mb=2000", "-timeout=30")


def seeds(kind: str) -> dict[str, bytes]:
    """Returns whole files to begin with."""
    if kind == "image":
        return images.whole_images()
    from tests.io.model_files import write_all

    with tempfile.TemporaryDirectory() as name:
        return write_all(Path(name))


def main(kind: str, corpus: Path, *options: str) -> None:
    warnings.simplefilter("ignore")
    corpus.mkdir(parents=True, exist_ok=True)
    for name, content in seeds(kind).items():
        (corpus / f"seed-{name.replace(' ', '-')}").write_bytes(content)
    path = Path(tempfile.mkdtemp()) / f"a.{kind}"

    def one(content: bytes) -> None:
        path.write_bytes(content)
        if kind == "image":
            images.read(path)
            return
        try:
            load(path)
        except fastmaf.CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 1200 and str(error).isprintable()

    found = f"-artifact_prefix={corpus}-"  # where an input that is not handled goes
    atheris.Setup([sys.argv[0], *LIMITS, found, *options, str(corpus)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
