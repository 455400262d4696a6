"""What ``fastmaf bench`` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from fastmaf.bench import plot, report, rows
from fastmaf.bench.cases import planned
from fastmaf.bench.compare import compare
from fastmaf.bench.run import Result, run

__all__ = ["bench", "compare", "show"]


def bench(
    out: Path,
    *,
    quick: bool,
    device: str = "cpu",
    sides: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs the suite, prints its table and writes CSV, JSON and figures.

    Args:
        out: folder to write to.
        quick: small sizes, under two minutes.
        device: cpu or cuda.
        sides: only these beside fastmaf; () for all.
        progress: show a bar.
        say: prints.

    Returns:
        Whether all sides that were measured gave right results.

    Raises:
        ValueError: there is no such side.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"the device must be cpu or cuda (CUDA_VISIBLE_DEVICES chooses among several); found {device!r}"
        )
    out.mkdir(parents=True, exist_ok=True)  # now, rather than after half an hour, does a folder show that cannot be
    plan = planned("quick" if quick else "full", device, sides)
    with tqdm(total=plan.parts, unit="number", disable=not progress, dynamic_ncols=True) as bar:

        def tell(text: str, parts: int) -> None:
            bar.set_description_str(text)
            bar.update(parts)

        result = run(plan, tell, device=device)
    show(result, out, f"{device}{'-quick' if quick else ''}", say)
    return not result.wrong


def show(result: Result, out: Path, stem: str, say: Callable[[str], None]) -> None:
    """Prints a run and writes its files."""
    path = out / f"{stem}.csv"
    rows.write(result.rows, result.about, path)
    say(report.table(result.rows))
    figures = plot.figures(result.rows, result.about, out, stem)
    say("\n" + report.about_lines(result.about))
    for heading, sentences in (("not measured:", result.left_out), ("WRONG, and not timed:", result.wrong)):
        if sentences:
            say("\n".join(["", heading, *(f"  {sentence}" for sentence in sentences)]))
    say("\nEach side was compared with fastmaf on the same weights before it was timed: 'error' is how far it was off.")
    say(f"Written: {path}, the same as JSON, and {', '.join(figure.name for figure in figures)}")
