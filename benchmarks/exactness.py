"""The promises of an adapter, checked on every layer kind for PEFT, LyCORIS, loralib and visionlora in one run.

    pip install "visionlora[bench]"
    python benchmarks/exactness.py [--libraries visionlora PEFT] [--json results.json] > tables.md

It prints Markdown. Every library is used the way its documentation says (exactness_libraries.py, exactness_others.py);
what is checked, and how, is in exactness_promises.py. docs/exactness.md holds the tables and how to read them.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from exactness_drift import COLUMNS, batch_norms, drift, settled_resnet
from exactness_libraries import Peft, VisionLoRA
from exactness_others import Loralib, Lycoris
from exactness_promises import passed_over, verdicts
from exactness_report import Column, Found, counts, details, drift_table, overview, plain, setting
from exactness_rows import ROWS, Row

LIBRARIES: dict[str, Callable[[], Any]] = {
    "PEFT": Peft,
    "LyCORIS": Lycoris,
    "loralib": Loralib,
    "visionlora": VisionLoRA,
}
OTHERS = {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}
BY_TENSOR = "ᵗ"


def check(library: Any, row: Row, variant: str = "lora", alpha: float = 4) -> tuple[Found, str]:
    """Return the verdicts and the mark of the way: for layers or, where that one says no, for single tensors."""
    found = verdicts(partial(library.put, variant=variant, alpha=alpha), row)
    if found["attaches"].state == "no" and hasattr(library, "put_on_tensors"):
        second = verdicts(partial(library.put_on_tensors, variant=variant, alpha=alpha), row)
        if second["attaches"].state == "kept":
            return second, BY_TENSOR
    return found, ""


def table(library: Any, rows: dict[str, Row], variant: str = "lora", alpha: float = 4) -> Column:
    """Return the verdicts on one library by layer kind."""
    return {label: check(library, row, variant, alpha) for label, row in rows.items()}


def other_variants(libraries: dict[str, Any]) -> dict[str, Column]:
    columns = {
        f"{title} {name}": table(library, ROWS, variant)
        for variant, title in OTHERS.items()
        for name, library in libraries.items()
        if variant in library.variants
    }
    if "LyCORIS" in libraries:
        columns |= {
            f"{OTHERS[v]} LyCORIS, alpha = r": table(libraries["LyCORIS"], ROWS, v, alpha=2) for v in ("loha", "lokr")
        }
    return columns


def second_ways(libraries: dict[str, Any]) -> dict[str, Column]:
    """Return the verdicts on the way for single tensors, of the libraries that have one."""
    return {
        name: {k: (verdicts(partial(library.put_on_tensors, variant="lora"), row), "") for k, row in ROWS.items()}
        for name, library in libraries.items()
        if hasattr(library, "put_on_tensors")
    }


def left_out(libraries: dict[str, Any], found: dict[str, Column]) -> dict[str, list[str]]:
    """Return the layer kinds that the way for layers refuses alone, and leaves out without a word beside a Linear."""
    left: dict[str, list[str]] = {}
    for name, library in libraries.items():
        refused = [k for k, (v, mark) in found[name].items() if mark or v["attaches"].state == "no"]
        place = partial(library.put, variant="lora")
        left[name] = [k for k in refused if ROWS[k].spot.modules and passed_over(place, ROWS[k])]
    return left


def drifts(libraries: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    places: dict[str, Any] = {name: partial(library.put, variant="lora") for name, library in libraries.items()}
    if "PEFT" in libraries:
        norms = list(batch_norms(settled_resnet()))
        places["PEFT, BatchNorms in modules_to_save"] = partial(
            libraries["PEFT"].put, variant="lora", modules_to_save=norms
        )
    return {name: drift(place) for name, place in places.items()}


def chapters(libraries: dict[str, Any], results: dict[str, Any]) -> Iterator[str]:
    """Yield the report piece by piece; fill the results for JSON on the way."""
    found = {name: table(library, ROWS) for name, library in libraries.items()}
    results["lora"] = plain(found)
    yield setting(library.package for library in libraries.values())
    yield f"### LoRA on {len(ROWS)} layer kinds\n\n{overview(found)}"
    yield f"### Promises\n\nKept / not made / broken, over the layer kinds that get that far.\n\n{counts(found)}"
    for name, column in found.items():
        yield f"#### {name}\n\n{details(column)}"
    if ways := second_ways(libraries):
        results["lora, single tensors"] = plain(ways)
        yield f"### LoRA by the way for single tensors\n\n{overview(ways)}\n\n{counts(ways)}"
    silent = results["left out"] = left_out(libraries, found)
    yield "### Refused alone, left out without a word beside a layer that is not\n\n" + "\n".join(
        f"- {name}: {', '.join(labels) or 'none'}" for name, labels in silent.items()
    )
    others = other_variants(libraries)
    results["other variants"] = plain(others)
    yield f"### DoRA, LoHa, LoKr\n\n{overview(others)}\n\n{counts(others)}"
    moved = results["drift"] = drifts(libraries)
    yield f"### BatchNorm behind a frozen base\n\n{drift_table(moved, COLUMNS)}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), help="all by default")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")
    args = parser.parse_args()
    modules = {"PEFT": "peft", "LyCORIS": "lycoris", "loralib": "loralib", "visionlora": "visionlora"}
    missing = [name for name in args.libraries if find_spec(modules[name]) is None]
    if missing:
        packages = " ".join(LIBRARIES[name].package for name in missing)  # type: ignore[attr-defined]
        print(f"{', '.join(missing)} missing: pip install {packages}", file=sys.stderr)
        print('all of them: pip install "visionlora[bench]"; without them: --libraries visionlora', file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for chapter in chapters({name: LIBRARIES[name]() for name in args.libraries}, results):
        print(chapter, end="\n\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
