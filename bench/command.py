"""The command ``fastmaf bench``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fastmaf.bench import figures, rows, tables
from fastmaf.bench.cases import planned
from fastmaf.bench.run import run
from fastmaf.images.progress import Progress


def bench(
    out: Path,
    *,
    quick: bool,
    device: str = "cpu",
    libraries: Sequence[str] = (),
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> bool:
    """Runs the suite of all or some libraries, prints its table and writes CSV, JSON and figures to a folder.

    Returns whether the results of all measured libraries were correct.
    """
    if device not in ("cpu", "cuda"):
        raise ValueError(
            f"the device must be cpu or cuda (CUDA_VISIBLE_DEVICES selects one of several); found {device!r}"
        )
    out.mkdir(parents=True, exist_ok=True)  # fails now rather than after the measurement
    plan = planned("quick" if quick else "full", device, libraries)
    with Progress("measuring", "result", total=plan.total, leave=True, show=progress) as bar:

        def show(text: str, done: int) -> None:
            bar.set_description(text)
            bar.update(done)

        result = run(plan, show, device=device)
    path = out / f"{device}{'-quick' if quick else ''}.csv"
    rows.write(result.rows, result.about, path)
    written = [path, path.with_suffix(".json"), *figures.write(result.rows, result.about, out, path.stem)]
    say(tables.table(result.rows))
    say("\n" + "\n".join(tables.aligned(list(result.about.items()), (0, 1))))
    for heading, lines in (("Not measured:", result.left_out), ("WRONG, and not timed:", result.wrong)):
        if lines:
            say("\n".join(["", heading, *(f"  {line}" for line in lines)]))
    say("\nThe results of each library were compared with another implementation's before timing; see 'error'.")
    say(f"Written: {', '.join(map(str, written))}")
    return not result.wrong
