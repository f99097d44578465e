"""benchmarks/README.md is that of the committed results, honest about what was missed."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("page", ROOT / "benchmarks" / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _item(op, case, dtype, original, compiled):
    return {
        "op": op,
        "case": case,
        "dtype": dtype,
        "median_s": 0.002,
        "vs_original": original,
        "vs_best_compile": compiled,
        "best_peer": "hoisted",
        "vs_best_peer": 1.5,
        "roof_fraction": 0.8,
        "error_vs_fp64": 1e-6,
        "eager_error_vs_fp64": 2e-6,
    }


@pytest.fixture
def result():
    items = [
        _item("denoise_chain", "B=256", "fp32", 6.0, 1.3),
        _item("denoise_chain", "B=1", "fp32", 19.0, 2.0),
        _item("denoise_chain", "B=256", "bf16", 5.0, 1.0),
    ]
    details = [
        {
            "item": f"{i['op']} {i['case']} {i['dtype']}",
            "peers_s": {"original": 0.012, "hoisted": 0.003},
            "gflop": 6.0,
            "roof_gflop_per_s": 100.0,
            "skipped_peers": {"torchrl RSSM": "not installed"},
            "note": "",
        }
        for i in items
    ]
    details[1] |= {"p99_s": 0.003, "original_p99_s": 0.05}
    return {
        "meta": {"commit": "c", "date": "d", "device": "x", "threads": 1, "versions": {"t": "1"}},
        "items": items,
        "details": {
            "roofs": {"fp32": {"gflop_per_s": 100.0, "by": "mm 512"}},
            "native_bf16": False,
            "items": details,
            "skipped": [{"item": "rssm_imagine B=1 fp32", "reason": "not there"}],
            "failed": [],
        },
    }


def test_bars_are_met_missed_or_not_measured(tool, result):
    lines = {line.split("|")[1].strip(): line for line in tool.bars(result)}
    assert lines["denoise_chain B=256 fp32"].endswith("| 6.00x (5.3x) | 1.30x (1.25x) | met |")
    assert lines["denoise_chain B=1 fp32"].endswith("| 19.00x (18x) | 2.00x (3x) | **partly** |")
    assert lines["denoise_chain B=256 bf16"].endswith("| **missed** |")
    assert "not measured" in lines["rssm_imagine B=16 fp32"]


def test_page_says_what_was_not_measured(tool, result):
    page = tool.page(result)
    assert "**not measured**, and nothing is claimed" in page
    assert "- rssm_imagine B=1 fp32: not there" in page
    assert "- peer `torchrl RSSM`: not installed" in page
    assert "99th percentile 3 ms; original 12 ms and 50 ms" in page


def test_page_and_plots_are_written_and_small(tool, result, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    assert tool.main([str(tmp_path / "cpu.json"), "--out", str(tmp_path)]) == 0
    files = sorted(p.name for p in (tmp_path / "plots").iterdir())
    assert files == ["batch.png", "roof.png", "speedup.png"]
    assert sum(p.stat().st_size for p in (tmp_path / "plots").iterdir()) < 300_000
    assert tool.main([str(tmp_path / "missing.json")]) == 2


def test_committed_page_is_that_of_the_committed_results(tool):
    if not tool.RESULT.exists():
        pytest.skip("results/cpu.json does not exist yet; run diwa bench")
    result = json.loads(tool.RESULT.read_text(encoding="utf-8"))
    assert (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") == tool.page(result)
    plots = {p.name: p.stat().st_size for p in (ROOT / "benchmarks" / "plots").glob("*.png")}
    ours = set(re.findall(r"plots/(\w+\.png)", tool.page(result)))
    assert len(ours) == 3 and sum(plots[name] for name in ours) < 300_000
    others = set(re.findall(r"plots/(\w+\.png)", (ROOT / "README.md").read_text()))
    assert set(plots) == ours | others and sum(plots[name] for name in others) < 300_000


def test_every_bar_is_an_item_of_the_suite(tool):
    from diwa import bench

    bench.suite()
    names = {e.name for e in importlib.import_module("diwa.benchmarks.operators").entries()}
    assert {bar[0] for bar in tool.BARS} <= names
    assert {e.split()[0] for e in names} == set(tool.OPS)
