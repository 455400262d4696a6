"""What a training run tells its user: in words, and as JSON types for programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import fastmaf
from fastmaf.io.safe_json import finite
from fastmaf.io.wording import count

Row: TypeAlias = dict[str, float | None]


@dataclass(frozen=True)
class TrainResult:
    """A finished or interrupted run.

    Attributes:
        flow: the trained flow.
        log: one row per epoch.
        model: the model file.
        interrupted: whether Ctrl-C ended the run.
    """

    flow: fastmaf.MAF
    log: list[Row]
    model: Path
    interrupted: bool

    def describe(self) -> str:
        """Returns the last epoch, the model file and the next step as text."""
        lines = []
        if self.log:
            last = self.log[-1]
            held_out = "" if last["val_nll"] is None else f", held-out NLL {last['val_nll']:,.0f} nats"
            bits = f"{last['bits_per_dim']:.3f} bits/dim on [0, 1]"
            lines.append(f"epoch {len(self.log)}: NLL {last['nll']:,.0f} nats{held_out}, {bits}")
        if self.interrupted:
            lines.append(f"stopped after {count(len(self.log), 'whole epoch')}; --resume continues")
        return "\n".join([*lines, f"model: {self.model}"])

    def summary(self) -> dict[str, Any]:
        """Returns the last epoch, the seconds of all and the model file, as JSON types; what is not known is None."""
        last = self.log[-1] if self.log else {}
        return {
            "model": str(self.model),
            "interrupted": self.interrupted,
            "epochs": len(self.log),
            **{name: finite(last.get(name)) for name in ("nll", "val_nll", "bits_per_dim")},
            "seconds": finite(sum(row["seconds"] or 0.0 for row in self.log)),
        }
