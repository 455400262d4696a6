from __future__ import annotations

import sys
import warnings

import pytest

from fastmaf import cli
from tests.cli.command import Done, Fastmaf


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Fastmaf:
    """Runs the command in this process, without the time to import torch; an unexpected error fails the test."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["fastmaf", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        code = exit_.value.code
        return Done(code if isinstance(code, int) else int(code is not None), *capsys.readouterr())

    return call
