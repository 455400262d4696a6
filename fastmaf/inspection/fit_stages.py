"""The finished stages of a fit, from which an interrupted one goes on.

For each size these are the whitenings of the folds and of all images, with the augmentation that was selected, and the
local blocks. Everything else is computed again, in a fraction of their time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import fastmaf
from fastmaf.inspection.blocks import SelectedBlocks
from fastmaf.inspection.out_of_fold import OutOfFoldModels
from fastmaf.inspection.recipe import AUGMENTATIONS, Recipe
from fastmaf.inspection.whitening import Whitenings
from fastmaf.io.schema import Anything, ListOf, MapOf, OneOf, Record, SchemaError, Whole

_WHITENINGS = Record({"augmentation": OneOf(AUGMENTATIONS), "figures": MapOf(Anything())})
_LOG_ROW = Record({"step": Anything(), "nll": Anything(), "held_out_nll": Anything()})
_BLOCKS = Record({"kept": Whole(), "log": ListOf(_LOG_ROW), "figures": MapOf(Anything())})


class Stage(NamedTuple):
    """What a finished stage found.

    Attributes:
        flows: the whitening of all images and those of the folds, or the blocks of all images and those of the folds.
        record: what was decided, and the figures that decided it, JSON types.
    """

    flows: tuple[fastmaf.Flow, ...]
    record: Mapping[str, Any]


@dataclass
class Stages:
    """The stages that a fit has finished, by name; a fit that is given some of them begins after these.

    Attributes:
        done: such as ``"64 pixels, whitenings"``.
        seconds: what each size has taken in all runs, unfinished ones included, such as ``{"64 pixels": 40.0}``.
        source: the file that they were read from, for messages.
    """

    done: dict[str, Stage] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    source: str = "state of an interrupted fit"

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the duration of a block to the seconds of a size, also where it is interrupted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def whitenings(self, asked: Recipe) -> tuple[Recipe, Whitenings, dict[str, Any]] | None:
        """Returns what ``select_augmentation`` returned for this size, if it did."""
        stage = self.done.get(f"{asked.size} pixels, whitenings")
        if stage is None:
            return None
        self._check(stage, _WHITENINGS)
        found = [step for flow in stage.flows if flow.features == asked.features for step in flow.transforms]
        whitenings = [step for step in found if isinstance(step, fastmaf.GaussianWhitening)]
        if len(whitenings) != len(found) or len(found) != 1 + asked.folds:
            raise self._refused(f"expected {1 + asked.folds} whitenings of {asked.features} features")
        whole, *folds = whitenings
        recipe = replace(asked, augmentation=stage.record["augmentation"])
        return recipe, Whitenings(folds, whole), dict(stage.record["figures"])

    def keep_whitenings(self, recipe: Recipe, whitenings: Whitenings, figures: Mapping[str, Any]) -> None:
        """Keeps what ``select_augmentation`` returned."""
        flows = (fastmaf.Flow(recipe.features, [each]) for each in (whitenings.whole, *whitenings.folds))
        record = {"augmentation": recipe.augmentation, "figures": figures}
        self.done[f"{recipe.size} pixels, whitenings"] = Stage(tuple(flows), record)

    def blocks(self, recipe: Recipe, models: OutOfFoldModels) -> SelectedBlocks | None:
        """Returns the blocks of this size, if they were trained.

        Args:
            recipe: of the size.
            models: the models of the folds without blocks.
        """
        stage = self.done.get(f"{recipe.size} pixels, blocks")
        if stage is None:
            return None
        self._check(stage, _BLOCKS)
        whole, *folds = ([*flow.transforms] for flow in stage.flows) if stage.flows else ([],)
        steps = [step for blocks in (whole, *folds) for step in blocks]
        if not all(isinstance(step, fastmaf.LocalAutoregressive) for step in steps) or any(
            flow.features != recipe.features for flow in stage.flows
        ):
            raise self._refused(f"expected blocks of {recipe.features} features")
        if len(whole) != stage.record["kept"] or len(folds) not in (0, len(models.flows)):
            raise self._refused(
                f"expected {stage.record['kept']} blocks of all images, and those of none or {len(models.flows)} folds"
            )
        if folds:
            flows = [_with(flow, blocks) for flow, blocks in zip(models.flows, folds, strict=True)]
            models = models.with_flows(flows)
        record = stage.record
        blocks: list[fastmaf.Transform] = list(whole)  # type: ignore[arg-type]
        return SelectedBlocks(record["kept"], models, list(record["log"]), dict(record["figures"]), blocks)

    def keep_blocks(self, recipe: Recipe, before: OutOfFoldModels, found: SelectedBlocks) -> None:
        """Keeps blocks; ``before`` are the models of the folds without them."""
        flows: list[fastmaf.Flow] = []
        if found.blocks:
            flows.append(fastmaf.Flow(recipe.features, found.blocks))
            for flow, plain in zip(found.models.flows, before.flows, strict=True):
                if len(flow.transforms) > len(plain.transforms):
                    flows.append(fastmaf.Flow(recipe.features, [*flow.transforms][len(plain.transforms) :]))  # type: ignore[arg-type]
        record = {"kept": found.kept, "log": found.log, "figures": found.figures}
        self.done[f"{recipe.size} pixels, blocks"] = Stage(tuple(flows), record)

    def _check(self, stage: Stage, schema: Record) -> None:
        try:
            schema.check(stage.record, "record")
        except SchemaError as error:
            raise self._refused(str(error)) from None

    def _refused(self, why: str) -> fastmaf.CheckpointError:
        return fastmaf.CheckpointError(f"{self.source}: {why}")


def _with(flow: fastmaf.Flow, blocks: Sequence[Any]) -> fastmaf.Flow:
    return fastmaf.Flow(flow.features, [*flow.transforms, *blocks]).eval()  # type: ignore[list-item]
