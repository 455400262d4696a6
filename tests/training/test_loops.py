"""Training by the tools of others: torch's optimisers and averages, several processes, Lightning and Accelerate."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import fastmaf
from tests.core.composed import EACH, Density, data, maf, padding_is_zero
from tests.tolerances import F32, assert_close
from tests.training.loops import NLL, RUNS, batches, distributed, fit

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (torch.optim.Adam, {}),
    "Adam foreach": (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
    "Adam fused": (torch.optim.Adam, {"fused": True, "amsgrad": True}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True}),
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "SGD foreach": (torch.optim.SGD, {"foreach": True, "momentum": 0.9, "nesterov": True}),
    "SGD fused": (torch.optim.SGD, {"fused": True, "momentum": 0.9}),
    "LBFGS": (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
    "RMSprop": (torch.optim.RMSprop, {"foreach": True, "momentum": 0.5}),
}


@pytest.mark.parametrize("which", list(OPTIMIZERS))
def test_optimizers_of_torch(which: str, backend: str) -> None:
    """The packed weights follow the steps that dense weights take with masked gradients."""
    kind, options = OPTIMIZERS[which]
    flow, x = maf(), data(16)
    naive = fastmaf.MAF.from_transforms(flow.features, flow._transforms()[1:]).to_naive()
    rest, z = fastmaf.Flow(flow.features, flow._transforms()[1:]), flow.transforms[0](x)[0].detach()
    losses: list[list[float]] = []
    for model in (rest, naive):
        optimizer = kind(model.parameters(), lr=1e-3, **options)

        def closure(model: Any = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = -model.log_prob(z).mean()
            loss.backward()
            return loss  # type: ignore[no-any-return]

        losses.append([optimizer.step(closure).item() for _ in range(4)])
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-8, atol=1e-8)
    assert padding_is_zero(rest)


@EACH
def test_loops_by_hand(name: str, backend: str) -> None:
    """Clipping by value and norm, accumulation, and gradients that are set to zero and not removed."""
    models = [Density(name) for _ in range(2)]
    x = data(8)
    for model, parts in zip(models, ([x], x.split(4)), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad(set_to_none=False)
            for part in parts:
                (-model(part).mean() / len(parts)).backward()
            nn.utils.clip_grad_value_(model.parameters(), 0.5)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            assert bool(norm > 1.0), "nothing was clipped"
            optimizer.step()
    for actual, expected in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    assert padding_is_zero(models[0])


AVERAGES: dict[str, dict[str, Any]] = {
    "mean": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "EMA by tensor": {"avg_fn": get_ema_avg_fn(0.9)},
}


@EACH
@pytest.mark.parametrize("which", list(AVERAGES))
def test_averages_of_weights(name: str, which: str) -> None:
    model, x = Density(name), data(8)
    average = AveragedModel(model, **AVERAGES[which])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    kept: list[Tensor] = []
    for _ in range(4):
        optimizer.zero_grad()
        (-model(x).mean()).backward()
        optimizer.step()
        average.update_parameters(model)
        average(x)  # what is derived from the weights follows them
        new = nn.utils.parameters_to_vector(model.parameters()).detach()
        share = 1 / (len(kept) + 1) if which == "mean" else 0.1
        kept.append(new if not kept else kept[-1] + share * (new - kept[-1]))
    assert padding_is_zero(average)
    expected = Density(name)
    nn.utils.vector_to_parameters(kept[-1], expected.parameters())
    assert_close("values", average(x).detach(), expected(x).detach())
    restored = Density(name)
    restored.load_state_dict(average.module.state_dict())
    assert torch.equal(restored(x).detach(), average(x).detach())


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed, (str(tmp_path),), nprocs=2)  # type: ignore[attr-defined, no-untyped-call]
    for name, options in RUNS:
        expected, fresh = fit(NLL(name), batches()), NLL(name)
        assert not torch.equal(*(nn.utils.parameters_to_vector(m.parameters()) for m in (expected, fresh)))
        for rank in range(2):
            model = NLL(name)
            model.load_state_dict(torch.load(tmp_path / f"{name} {options} {rank}.pt", weights_only=True))
            for actual, other in zip(model.parameters(), expected.parameters(), strict=True):
                torch.testing.assert_close(actual, other, rtol=1e-12, atol=1e-13)


class TestLightning:
    @pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}], ids=str)
    @pytest.mark.parametrize("optimizer", [torch.optim.Adam, fastmaf.optim.FusedAdam])
    def test_automatic_optimisation(self, options: dict[str, Any], optimizer: Any, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning")

        class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.flow = maf()

            def training_step(self, batch: list[Tensor]) -> Tensor:
                return -self.flow.log_prob(batch[0]).mean()

            def configure_optimizers(self) -> Any:
                return optimizer(self.parameters(), lr=1e-2)

        x = torch.cat(batches())
        model, quiet = Model(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **quiet, **options
        )
        trainer.fit(model, DataLoader(TensorDataset(x), 4))
        by_hand = maf()
        step = torch.optim.Adam(by_hand.parameters(), lr=1e-2)
        together = options.get("accumulate_grad_batches", 1)
        for both in x.split(4 * together):
            step.zero_grad()
            for part in both.split(4):
                (-by_hand.log_prob(part).mean() / together).backward()
            nn.utils.clip_grad_norm_(by_hand.parameters(), options.get("gradient_clip_val", torch.inf))
            step.step()
        for actual, expected in zip(model.flow.parameters(), by_hand.parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
        trainer.save_checkpoint(tmp_path / "model.ckpt")
        again = Model.load_from_checkpoint(tmp_path / "model.ckpt")
        assert torch.equal(again.flow.log_prob(x).detach(), model.flow.log_prob(x).detach())

    def test_mixed_precision_stays_in_float32(self, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning")
        seen: list[torch.dtype] = []

        class Model(lightning.LightningModule):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                self.embed, self.flow = nn.Linear(7, 7), maf(F32)

            def training_step(self, batch: list[Tensor]) -> Tensor:
                density = self.flow.log_prob(self.embed(batch[0]))
                seen.append(density.dtype)
                return -density.mean()

            def configure_optimizers(self) -> Any:
                return torch.optim.Adam(self.parameters(), lr=1e-2)

        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        trainer = lightning.Trainer(
            accelerator="cpu", max_epochs=1, precision="bf16-mixed", enable_checkpointing=False, **quiet
        )
        trainer.fit(Model(), DataLoader(TensorDataset(data(8, F32)), 4))
        assert seen == [F32, F32]


class TestAccelerate:
    @pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2}, {"mixed_precision": "bf16"}], ids=str)
    def test_loops(self, options: dict[str, Any], tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, **options)
        model, x = Density("MAF", F32), torch.cat(batches()).float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        call, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(TensorDataset(x), 4))
        for (part,) in loader:
            with accelerator.accumulate(call):
                density = call(part)
                assert density.dtype == F32
                accelerator.backward(-density.mean())
                accelerator.clip_grad_norm_(call.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        trained = accelerator.unwrap_model(call, keep_fp32_wrapper=False)
        assert padding_is_zero(trained) and bool(trained(x).mean() > Density("MAF", F32)(x).mean())
        accelerator.save_state(tmp_path)
        before = copy.deepcopy(trained(x).detach())
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        accelerator.load_state(tmp_path)
        assert torch.equal(trained(x).detach(), before)
        accelerate.state.AcceleratorState._reset_state(True)
