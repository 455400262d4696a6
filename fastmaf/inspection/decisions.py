"""What the fit of a model selected, in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fastmaf.inspection.combined import CombinedModel
from fastmaf.inspection.framed import seen_by
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.model import InspectionModel
from fastmaf.inspection.recipe import Recipe
from fastmaf.inspection.texture.model import TextureModel
from fastmaf.io.wording import count


def decisions(model: AnomalyModel, explain: bool = False) -> dict[str, str]:
    """Returns what the fit of a model selected and why, by name; with ``explain`` the figures that decided it."""
    model = seen_by(model)
    selected = {"kind": model.about.get("kind"), "model": _candidate(model.about, explain)}
    if isinstance(model, CombinedModel):
        for standard, part in zip(model.standards, model.parts, strict=True):
            of_part = _of_part(part, explain)
            selected |= {f"{standard.name}, {name}": text for name, text in of_part.items() if name != "groups"}
    else:
        selected |= _of_part(model, explain)
    selected["groups"] = model.about.get("groups")
    return {name: text for name, text in selected.items() if text is not None}


def _of_part(model: AnomalyModel, explain: bool) -> dict[str, str | None]:
    if isinstance(model, InspectionModel):
        return _of_pixels(model, explain)
    if isinstance(model, TextureModel):
        return _of_texture(model, explain)
    return {"features": _features(model.about, explain)}


def _features(about: Mapping[str, Any], explain: bool) -> str | None:
    """Returns which features a model is of, and which Gaussian of them was chosen."""
    if (found := about.get("features")) is None:
        return None
    rows, columns = found["grid"]
    text = f"{found['channels']} channels of {found['network']} at {rows} x {columns} locations; one Gaussian "
    text += found["gaussian"]
    if found["shrinkage"] is not None:
        text += f", {found['shrinkage']:.0%} of its covariance from the mean of all"
    areas, nll = about.get("drawn_auroc_of_gaussians"), about.get("held_out_nll_of_gaussians")
    if explain and areas:
        text += (
            f" (image AUROC on synthetic defects: {', '.join(f'{name} {area:.3f}' for name, area in areas.items())})"
        )
    elif explain and nll:
        text += (
            f" (NLL of held-out images, in nats: {', '.join(f'{name} {value:,.0f}' for name, value in nll.items())})"
        )
    return text


def _of_pixels(model: InspectionModel, explain: bool) -> dict[str, str | None]:
    about = model.about
    recipe = {**asdict(Recipe()), **about.get("recipe", {})}
    return {
        "augmentation": _augmentation(recipe, about, explain),
        "logit": _logit(recipe, about, explain),
        "blocks": _blocks(recipe, about, explain),
        "score": _score(model, about, explain),
        "standardised by": _reference(model, about, explain),
        "anomaly map": _anomaly_map(model, about, explain),
    }


def _of_texture(model: TextureModel, explain: bool) -> dict[str, str | None]:
    levels, kept = model.about.get("texture_levels", {}), model.about.get("texture_blocks", [])
    if not levels:
        return {}
    text = f"at {', '.join(kept)}" if 0 < len(kept) < len(levels) else "at all levels" if kept else "none"
    if not explain:
        return {"blocks": f"{text} (where held-out features are more likely with them)"}
    nll = "; ".join(f"{n} {v['held_out_nll']:,.1f}, {v['held_out_nll_of_whitening']:,.1f}" for n, v in levels.items())
    return {"blocks": f"{text} (NLL of held-out features in nats, with blocks and without: {nll})"}


def _candidate(about: Mapping[str, Any], explain: bool) -> str | None:
    """Returns which of several models, or which combination of them, was chosen."""
    areas, chosen = about.get("drawn_auroc_of_candidates", {}), about.get("chosen")
    if chosen not in areas:
        return None
    skipped = " and ".join(f"{size}" for size in about.get("skipped_sizes", ()))
    more = f"; not fitted within the budget: {skipped} pixels" if skipped else ""
    if explain or len(areas) == 1:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in areas.items())
        return f"{chosen} (image AUROC on synthetic defects: {figures}{more})"
    others = ", ".join(f"{name} {value:.3f}" for name, value in areas.items() if name != chosen)
    return f"{chosen} (image AUROC on synthetic defects {areas[chosen]:.3f}; {others}{more})"


def _augmentation(recipe: Mapping[str, Any], about: Mapping[str, Any], explain: bool) -> str | None:
    tried: dict[str, float] = about.get("held_out_nll_of_augmentations") or {}
    if not tried:
        return None
    kind = recipe["augmentation"]
    text = {
        "shifts": f"shifts up to {recipe['shift_radius'] * recipe['shift_step']:g} px",
        "rotations": f"rotations by multiples of {360 / recipe['angles']:g}°",
    }.get(kind, kind)
    best = min(tried, key=lambda other: tried[other])
    if explain:
        nll = ", ".join(f"{other} {value:,.0f}" for other, value in tried.items())
        reason = f"mean NLL of the images held out by the first folds, in nats: {nll}"
        return f"{text} ({reason}; {'the lowest is selected' if kind == best else 'kept as requested'})"
    if kind != best:
        return f"{text} (as requested; held-out images are more likely with {_with(best)})"
    others = " and ".join(_with(other) for other in tried if other != kind)
    verb = "fits" if others == "no augmentation" else "fit"
    return f"{text} ({others} {verb} held-out images worse)"


def _with(augmentation: str) -> str:
    return "no augmentation" if augmentation == "none" else augmentation


def _logit(recipe: Mapping[str, Any], about: Mapping[str, Any], explain: bool) -> str | None:
    without = about.get("held_out_nll_without_logit")
    if without is None:
        return None
    reason = f"mean NLL of the images held out by the first folds, without it: {without:,.0f} nats" if explain else ""
    return f"alpha {recipe['logit']:g}, as requested{f' ({reason})' if reason else ''}"


def _blocks(recipe: Mapping[str, Any], about: Mapping[str, Any], explain: bool) -> str | None:
    with_blocks = about.get("held_out_nll_with_blocks")
    if with_blocks is None:
        return None
    kept, without = recipe["blocks"], about["held_out_nll_of_whitening"]
    text = count(kept, "local block") if kept else "none"
    if explain:
        return f"{text} (mean NLL of held-out images, in nats: {with_blocks:,.0f} with them, {without:,.0f} without)"
    if with_blocks < without:
        return f"{text} (held-out images are more likely with {'them' if kept != 1 else 'it'})"
    return f"{text} ({'as requested; ' * bool(kept)}held-out images are no more likely with local blocks)"


def _score(model: InspectionModel, about: Mapping[str, Any], explain: bool) -> str | None:
    baselines: Mapping[str, float] = about.get("drawn_auroc_of_baselines", {})
    if name := about.get("baseline"):
        others = {**{_smoothing(key): value for key, value in about["drawn_auroc"].items()}, **baselines}
        if explain:
            return f"{name} (image AUROC on synthetic defects: {', '.join(f'{k} {v:.3f}' for k, v in others.items())})"
        best = max(about["drawn_auroc"].values())
        compared = f"{baselines[name]:.3f}; {best:.3f} with the whitening"
        return f"{name}, a baseline (image AUROC on synthetic defects {compared})"
    sigma = f"{model.settings.presmooth_sigma:g}"
    text = "no smoothing before squaring" if sigma == "0" else f"whitened values smoothed by {sigma} px before squaring"
    areas = {_smoothing(name): value for name, value in about.get("drawn_auroc", {}).items()}
    chosen = _on_defects(text, _smoothing(f"presmooth {sigma}"), areas, "image AUROC", explain)
    if explain and chosen is not None and baselines:
        listed = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        return f"{chosen.removesuffix(')')}; baselines: {listed})"
    return chosen


def _reference(model: InspectionModel, about: Mapping[str, Any], explain: bool) -> str | None:
    if about.get("baseline"):
        return None
    areas = {f"{name} images": area for name, area in about.get("drawn_auroc_of_references", {}).items()}
    chosen = f"{model.settings.reference} images"
    return _on_defects(chosen, chosen, areas, "image AUROC", explain)


def _anomaly_map(model: InspectionModel, about: Mapping[str, Any], explain: bool) -> str | None:
    chosen = f"{model.map_config.factors} factors"
    return _on_defects(chosen, chosen, about.get("drawn_maps", {}), "mean of pixel AUROC and AU-PRO", explain)


def _smoothing(name: str) -> str:
    """Returns the name of a candidate, such as ``presmooth 0.7``, in words."""
    sigma = name.removeprefix("presmooth ")
    return name if sigma == name else "no smoothing" if sigma == "0" else f"smoothing by {sigma} px"


def _on_defects(text: str, chosen: str, values: Mapping[str, float], metric: str, explain: bool) -> str | None:
    """Returns why one of several candidates was selected on synthetic defects."""
    if not values:
        return None
    if explain:
        return f"{text} ({metric} on synthetic defects: {', '.join(f'{k} {v:.3f}' for k, v in values.items())})"
    if chosen not in values:  # a model of an earlier version, which named the candidates otherwise
        return text
    others = " and ".join(name for name in values if name != chosen)
    if all(value < values[chosen] for name, value in values.items() if name != chosen):
        return f"{text} (better on synthetic defects than {others})"
    return f"{text} (no clear gain on synthetic defects from {others})"
