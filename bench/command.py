"""The command ``fastmaf bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from fastmaf.bench import figures, rows, tables
from fastmaf.bench.cases import planned
from fastmaf.bench.compare import compare
from fastmaf.bench.run import Result, run

__all__ = ["bench", "compare"]


def bench(
    out: Path,
    *,
    quick: bool,
    device: str = "cpu",
    libraries: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs the suite, prints its table and writes CSV, JSON and figures.

    Args:
        out: folder to write to.
        quick: small sizes, under two minutes.
        device: cpu or cuda.
        libraries: only these and fastmaf; () for all.
        progress: show a progress bar.
        say: prints.

    Returns:
        Whether the results of all measured libraries were correct.

    Raises:
        ValueError: there is no such library.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"the device must be cpu or cuda (CUDA_VISIBLE_DEVICES selects one of several); found {device!r}"
        )
    out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the measurement
    plan = planned("quick" if quick else "full", device, libraries)
    with tqdm(total=plan.total, unit="result", disable=not progress, dynamic_ncols=True) as bar:

        def show(text: str, done: int) -> None:
            bar.set_description_str(text)
            bar.update(done)

        result = run(plan, show, device=device)
    _report(result, out, f"{device}{'-quick' if quick else ''}", say)
    return not result.wrong


def _report(result: Result, out: Path, stem: str, say: Callable[[str], None]) -> None:
    path = out / f"{stem}.csv"
    rows.write(result.rows, result.about, path)
    say(tables.table(result.rows))
    written = figures.write(result.rows, result.about, out, stem)
    say("\n" + tables.about_lines(result.about))
    for heading, lines in (("Not measured:", result.left_out), ("WRONG, and not timed:", result.wrong)):
        if lines:
            say("\n".join(["", heading, *(f"  {line}" for line in lines)]))
    say("\nThe results of each library were compared with another implementation's before timing; see 'error'.")
    say(f"Written: {', '.join(map(str, (path, path.with_suffix('.json'), *written)))}")
