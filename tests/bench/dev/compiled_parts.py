"""Prints, for each part of ``parts.PARTS``, which kernels its cases launch without it alone, and what these spill."""

from __future__ import annotations

import json
import sys

from fastmaf.bench.dev import one, parts, resources


def main(arch: int) -> None:
    flow, found = resources.published_flow(blocks=1), []
    for name, part in parts.PARTS.items():

        def use(part: parts.Part = part) -> None:
            for case in part.cases:
                one.op(flow, *case).run()

        with_part = set(map(repr, map(resources.source_of, resources.recorded(arch, use))))
        with part.without():
            sources = {repr(source): source for source in map(resources.source_of, resources.recorded(arch, use))}
            other = [source for text, source in sources.items() if text not in with_part]
            reports = [resources.compiled(source, arch) for source in other]
        kernels = sorted({source.kernel for source in other})
        found.append({"part": name, "kernels": kernels, "spills": sum(report["spills"] for report in reports)})
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]))
