"""`diwa bench`: measures the operators on this machine and compares result files.

The suite is the folder `benchmarks` of the source tree; installing diwa installs it too, as
`diwa.benchmarks`, because who asks what diwa gains on a robot's computer has a wheel there and no
source tree.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoint import read_json, write_json
from .errors import DiwaError

ROOT = Path(__file__).resolve().parent.parent
ALLOWED_FALL = 0.15
"""An item may lose this share of its speed-up over the original before it is a regression."""

_SAME = ("device", "threads")


def suite() -> ModuleType:
    """The module `diwa.benchmarks`, from the source tree if diwa is imported from one.

    Raises:
        DiwaError: there is neither.
    """
    name = "diwa.benchmarks"
    if name in sys.modules:
        return sys.modules[name]
    source = ROOT / "benchmarks" / "__init__.py"
    if source.exists() and (ROOT / "setup.py").exists():
        spec = importlib.util.spec_from_file_location(
            name, source, submodule_search_locations=[str(source.parent)]
        )
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise DiwaError("the benchmark suite is not there; install diwa again") from None


def parser() -> argparse.ArgumentParser:
    """Of `diwa bench`."""
    p = argparse.ArgumentParser(
        "diwa bench",
        description="Measure the operators against plain torch, torch.compile and other libraries.",
    )
    p.add_argument("--quick", action="store_true", help="under two minutes; nothing is compiled")
    p.add_argument("--only", action="append", metavar="TEXT", help="items whose name has TEXT")
    p.add_argument(
        "--size", choices=("paper", "compact"), help="items of one size of the models [both]"
    )
    p.add_argument("--threads", type=int, default=1, help="torch threads [1]")
    p.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    p.add_argument("--rounds", type=int, help="samples per item [9; 5 if quick]")
    p.add_argument("--list", action="store_true", help="print the names of the items")
    p.add_argument("--out", type=Path, metavar="FILE", help="result file [see below]")
    p.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="OLD: compare this run with it. OLD NEW: compare the files and measure nothing",
    )
    p.epilog = (
        "A full run writes benchmarks/results/cpu.json in a source tree, diwa-bench.json in the "
        "current folder elsewhere; with --quick, --only or --size nothing is written without --out."
    )
    return p


def main(arguments: list[str]) -> int:
    """Run `diwa bench`; 0, or 1 after a failed correctness check or a regression."""
    options = parser().parse_args(arguments)
    compare = options.compare or []
    if len(compare) > 2:
        raise DiwaError("--compare takes one or two result files")
    if len(compare) == 2:
        return _print_comparison(*(read_json(path) for path in compare))
    old = read_json(compare[0]) if compare else None
    suite()
    operators = importlib.import_module("diwa.benchmarks.operators")
    harness = importlib.import_module("diwa.benchmarks.harness")
    inputs = importlib.import_module("diwa.benchmarks.inputs")
    sizes = [s for s in (inputs.PAPER, inputs.COMPACT) if options.size in (None, s.name)]
    chosen = [
        e
        for e in operators.entries(sizes)
        if (e.quick or not options.quick)
        and (not options.only or any(text in e.name for text in options.only))
    ]
    if not chosen:
        wanted = " or ".join(options.only or ["such a size"])
        raise DiwaError(f"no item has {wanted} in its name; see --list")
    if options.list:
        print("\n".join(e.name for e in chosen))
        return 0
    settings = harness.Settings(
        threads=options.threads,
        rounds=options.rounds or (5 if options.quick else 9),
        case_seconds=6.0 if options.quick else 60.0,
        compile=not (options.quick or options.no_compile),
    )
    result = operators.run(chosen, settings, lambda text: print(text, flush=True))
    out = options.out
    if out is None and not (options.quick or options.only or options.size):
        source = (ROOT / "setup.py").exists()
        out = ROOT / "benchmarks" / "results" / "cpu.json" if source else Path("diwa-bench.json")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, result)
        print(f"written to {out}")
    code = 1 if result["details"]["failed"] else 0
    return code if old is None else max(code, _print_comparison(old, result))


def compare_results(
    old: dict[str, Any], new: dict[str, Any]
) -> tuple[list[tuple[str, float]], list[str]]:
    """Speed-up over the original of every item that both files have, new over old.

    Returns:
        (item, ratio) and the names of items whose ratio is below 1 - `ALLOWED_FALL`.

    Raises:
        DiwaError: another device or number of threads, or no item in common.
    """
    for key in _SAME:
        if old["meta"][key] != new["meta"][key]:
            raise DiwaError(
                f"results of different {key} cannot be compared: "
                f"{old['meta'][key]} and {new['meta'][key]}"
            )
    before = {_name(item): item["vs_original"] for item in old["items"]}
    ratios = [
        (_name(item), item["vs_original"] / before[_name(item)])
        for item in new["items"]
        if _name(item) in before
    ]
    if not ratios:
        raise DiwaError("the result files have no item in common")
    return ratios, [name for name, ratio in ratios if ratio < 1 - ALLOWED_FALL]


def _name(item: dict[str, Any]) -> str:
    return f"{item['op']} {item['case']} {item['dtype']}"


def _print_comparison(old: dict[str, Any], new: dict[str, Any]) -> int:
    ratios, worse = compare_results(old, new)
    print(f"speed-up over the original, {new['meta']['commit']} over {old['meta']['commit']}")
    for name, ratio in ratios:
        print(f"  {name:<44} {ratio:5.2f}{'  REGRESSION' if name in worse else ''}")
    both = {name for name, _ in ratios}
    gone = [_name(item) for item in old["items"] if _name(item) not in both]
    if gone:
        print(f"  not measured now: {', '.join(gone)}")
    print(f"{len(worse)} of {len(ratios)} items fell by more than {100 * ALLOWED_FALL:.0f} %")
    return 1 if worse else 0
