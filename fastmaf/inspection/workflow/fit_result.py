"""What a fit tells its user: in words, and as JSON types for programs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmaf.inspection.decisions import decisions
from fastmaf.inspection.fit import Fitted
from fastmaf.inspection.framed import FramedModel
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.kinds import FittedTexture
from fastmaf.inspection.posed import PosedModel
from fastmaf.inspection.report.content import REPORT_FILE
from fastmaf.inspection.sizes import FittedSizes
from fastmaf.io.safe_json import finite
from fastmaf.io.wording import count
from fastmaf.metrics.results import bits_per_dim
from fastmaf.training.checkpoints import MODEL_FILE

LOG_FILE = "training_log.csv"


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted model and the folder that it was written to.

    Attributes:
        fitted: the model and its fold models.
        images: number of good images that it was fitted to.
        out: the folder.
        outer: the model that was written, where it frames or turns images before that of ``fitted`` sees them.
    """

    fitted: Fitted | FittedSizes | FittedTexture
    images: int
    out: Path
    outer: FramedModel | PosedModel | None = None

    @property
    def model(self) -> AnomalyModel:
        """The model that was written."""
        return self.outer or self.fitted.model

    def describe(self, explain: bool = False) -> str:
        """Returns decisions, threshold and files as text; ``explain`` adds figures and assumptions."""
        model, folder = self.fitted.model, f'"{self.out}"' if " " in str(self.out) else str(self.out)
        lines = self._texture() if isinstance(self.fitted, FittedTexture) else self._density(explain)
        lines += [f"{name}: {decision}" for name, decision in decisions(model, explain).items()]
        lines.append(model.calibration.describe(explain))
        files = f"model: {self.out / MODEL_FILE}; report: {self.out / REPORT_FILE}"
        lines.append(f"{files}; next: fastmaf inspect score {folder} NEW_IMAGES")
        return "\n".join(lines)

    def _texture(self) -> list[str]:
        """Returns what was fitted, for a texture."""
        nll = self.fitted.model.about["texture_nll"]
        return [f"{count(self.images, 'good image')} as a texture; held-out NLL of a location {nll:,.1f} nats"]

    def _density(self, explain: bool) -> list[str]:
        """Returns what was fitted, and its NLL."""
        assert not isinstance(self.fitted, FittedTexture)
        density = self.fitted.density
        nll, bits = self._held_out_nll
        recipe = density.about["recipe"]
        at_most = "at most " if recipe["dequantize"] else ""
        lines = [
            f"{count(self.images, 'good image')} at {density.shape[0]} x {density.shape[1]} pixels"
            f"{', grey: one channel' if density.channels == 1 else ''}; "
            f"held-out NLL {nll:,.0f} nats, {at_most}{bits:.3f} bits/dim of 8-bit data"
        ]
        if explain:
            lines[0] += f"; whitening alone {density.about['held_out_nll_of_whitening']:,.0f} nats"
            lines.append(
                "Held-out NLL: mean negative log-likelihood of an image under a model fitted without its fold "
                f"({recipe['folds']} folds); lower is better."
            )
        return lines

    def summary(self) -> dict[str, Any]:
        """Returns what was fitted, selected and written, as JSON types."""
        model, log = self.fitted.model, self.out / LOG_FILE
        return {
            "images": self.images,
            "size": model.size,
            **(self._texture_figures() if isinstance(self.fitted, FittedTexture) else self._density_figures()),
            "decisions": decisions(model),
            "calibration": model.calibration.summary(),
            "files": {"model": str(self.out / MODEL_FILE), "report": str(self.out / REPORT_FILE), "log": str(log)},
            "seconds": {"total": sum(self.fitted.seconds.values()), **self.fitted.seconds},
        }

    def _texture_figures(self) -> dict[str, Any]:
        about = self.fitted.model.about
        return {"held_out_nll": finite(about["texture_nll"]), "levels": about["texture_levels"]}

    def _density_figures(self) -> dict[str, Any]:
        assert not isinstance(self.fitted, FittedTexture)
        density, (nll, bits) = self.fitted.density, self._held_out_nll
        recipe = density.about["recipe"]
        return {
            "held_out_nll": finite(nll),
            "held_out_nll_of_whitening": finite(density.about["held_out_nll_of_whitening"]),
            "bits_per_dim": finite(bits),
            "augmentation": recipe["augmentation"],
            "blocks": recipe["blocks"],
            "score": recipe["score"],
            "anomaly_map": recipe["map_config"],
        }

    @property
    def _held_out_nll(self) -> tuple[float, float]:
        """The mean held-out NLL of an image in nats, and in bits per dimension of 8-bit data."""
        assert not isinstance(self.fitted, FittedTexture)
        density = self.fitted.density
        nll = density.about["held_out_nll"]
        return nll, bits_per_dim(nll, density.flow.features) + math.log2(255)
