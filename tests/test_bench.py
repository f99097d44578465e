"""The benchmark suite: its peers are right, its gate closes, its files and comparisons hold."""

import copy
import importlib
import json
import math

import pytest
import torch

from diwa import bench, cli
from diwa.errors import DiwaError

bench.suite()
chain, harness, inputs, operators, rssm = (
    importlib.import_module(f"diwa.benchmarks.{name}")
    for name in ("chain", "harness", "inputs", "operators", "rssm")
)
peers = importlib.import_module("diwa.benchmarks.peers.chain")
TINY = inputs.TINY
FAST = harness.Settings(rounds=3, case_seconds=0.1, compile=False)


@pytest.fixture(scope="module")
def roof():
    return harness.Roof(harness.Clock(1))


@pytest.fixture(autouse=True, scope="module")
def short_samples():
    before, harness.MIN_SAMPLE_S = harness.MIN_SAMPLE_S, 1e-4
    yield
    harness.MIN_SAMPLE_S = before


def test_peers_compute_the_chain_of_the_policy():
    base, tuned = inputs.policies(TINY)
    _, _, feature = inputs.latents(TINY, 5)
    noise = inputs.chain_noise(TINY, 5)
    for explore in (True, False):
        kf = TINY.ft_steps
        ours = tuned.sample(feature, noise, base=base, ft_steps=kf, explore=explore)
        for form in (peers.Original, peers.Needed, peers.Hoisted):
            model = form(base, tuned, kf, explore)
            chunk, path = model(feature, noise.flatten(2))
            torch.testing.assert_close(path, ours.chain.flatten(2), atol=1e-5, rtol=0)
            torch.testing.assert_close(chunk, ours.chunk.flatten(1), atol=1e-5, rtol=0)
            if explore:  # evaluation samples with other deviations than log-probabilities have
                _, _, old = model.rollout(feature, noise.flatten(2))
                torch.testing.assert_close(old, ours.log_prob.flatten(2), atol=1e-4, rtol=0)


def test_original_wastes_what_it_says():
    """The published form evaluates both networks on every row of a log-probability pass."""
    base, tuned = inputs.policies(TINY)
    rows = {"base": 0, "tuned": 0}
    model = peers.Original(base, tuned, TINY.ft_steps)
    for name in rows:

        def count(_, args, name=name):
            rows[name] += len(args[0])

        getattr(model, name).register_forward_pre_hook(count)
    _, _, feature = inputs.latents(TINY, 4)
    model.rollout(feature, inputs.chain_noise(TINY, 4).flatten(2))
    kf, k = TINY.ft_steps, TINY.steps
    assert rows == {"base": 4 * (k + kf), "tuned": 4 * (kf + kf)}


def test_exp_mish_is_mish():
    x = torch.linspace(-30, 60, 301)
    torch.testing.assert_close(peers.exp_mish(x), torch.nn.functional.mish(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("entry", list(operators.entries([TINY])), ids=lambda e: e.name)
def test_every_case_at_a_tiny_size(entry, roof):
    try:
        case = entry.build(False)
        item, details = harness.measure(case, FAST, roof)
    except harness.Skip as reason:
        pytest.skip(str(reason))
    assert (item["op"], item["case"], item["dtype"]) == (entry.op, entry.case, entry.dtype)
    assert tuple(item) == harness.KEYS
    assert item["median_s"] > 0 and item["vs_original"] > 0
    assert item["vs_best_peer"] == min(details["vs"].values())
    assert item["best_peer"] in details["peers_s"]
    assert item["error_vs_fp64"] < 0.2 and item["eager_error_vs_fp64"] < 1e-3
    json.dumps([item, details])


def _case(ours=lambda: torch.zeros(1), error=0.0, **peers):
    calls = peers or {"original": lambda: torch.zeros(1)}
    return harness.Case("op", "B=1", "fp32", ours, calls, lambda: (error, 0.0, 1e-3), 1e6)


@pytest.mark.parametrize("error", [1.0, math.nan])
def test_gate_refuses_a_wrong_result(error, roof):
    with pytest.raises(harness.GateError, match=r"op B=1 fp32: error"):
        harness.measure(_case(error=error), FAST, roof)


def test_failed_and_skipped_items_are_named():
    def wrong(_):
        return _case(error=1.0)

    def missing(_):
        raise harness.Skip("not there")

    entries = [operators.Entry("mish", "x", "fp32", b) for b in (wrong, missing)]
    entries.append(operators.Entry("onehot_st", "x", "fp32", wrong))
    result = operators.run(entries, FAST, lambda _: None)
    assert result["items"] == []
    assert "above" in result["details"]["failed"][0]["reason"]
    assert result["details"]["skipped"] == [
        {"item": "mish x fp32", "reason": "not there"},
        {"item": "onehot_st x fp32", "reason": "diwa.ops.onehot_st has no compiled variant"},
    ]


def test_ratios_see_work(roof):
    """More work takes longer, far more than a busy machine adds; the best peer is the quickest."""
    a = torch.randn(64, 64)

    def work(n):
        def call():
            for _ in range(n):
                torch.mm(a, a)

        return call

    peers = {"original": work(200), "compile x": work(20)}
    item, _ = harness.measure(_case(work(2), **peers), FAST, roof)
    assert item["vs_original"] > item["vs_best_compile"] > 1.5
    assert item["best_peer"] == "compile x" and item["vs_best_peer"] == item["vs_best_compile"]


def test_sum_of_parts(roof):
    calls = {"diwa": lambda: None, "original": lambda: torch.mm(torch.ones(9, 9), torch.ones(9, 9))}
    case = harness.Sum(
        "s", "c", "fp32", {"a": (3, calls), "b": (2, calls)}, lambda: (0.0, 0.0, 1.0), 1.0
    )
    item, details = harness.measure(case, FAST, roof)
    a, b = (details["parts_s"][part]["original"] for part in "ab")
    assert details["peers_s"]["original"] == pytest.approx(3 * a + 2 * b, rel=0.9)
    assert item["vs_original"] > 1


def _result(ratio=2.0, **changes):
    meta = {"device": "d", "threads": 1, "commit": "c", **changes}
    item = {"op": "o", "case": "B=1", "dtype": "fp32", "vs_original": ratio}
    return {"meta": meta, "items": [item]}


@pytest.mark.parametrize(("ratio", "code"), [(2.0, 0), (1.72, 0), (1.68, 1), (3.0, 0)])
def test_comparison_of_two_files(tmp_path, capsys, ratio, code):
    for name, r in (("old", 2.0), ("new", ratio)):
        (tmp_path / name).write_text(json.dumps(_result(r)))
    arguments = ["bench", "--compare", str(tmp_path / "old"), str(tmp_path / "new")]
    assert cli.main(arguments) == code
    out = capsys.readouterr().out
    assert f"{ratio / 2:5.2f}" in out and ("REGRESSION" in out) == bool(code)


@pytest.mark.parametrize("change", [{"device": "other"}, {"threads": 2}])
def test_comparison_refuses_other_machines(change):
    with pytest.raises(DiwaError, match=rf"different {next(iter(change))} cannot be compared"):
        bench.compare_results(_result(), _result(**change))


def test_comparison_needs_a_common_item():
    other = copy.deepcopy(_result())
    other["items"][0]["op"] = "p"
    with pytest.raises(DiwaError, match="no item in common"):
        bench.compare_results(_result(), other)


def test_command_writes_a_result_file(tmp_path, monkeypatch, capsys):
    one = [operators.Entry("mish", "B=1", "fp32", lambda _: _case(), True)]
    monkeypatch.setattr(operators, "entries", lambda sizes: one)
    out = tmp_path / "results" / "cpu.json"
    assert cli.main(["bench", "--quick", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert set(result["meta"]) == {"commit", "date", "device", "threads", "versions"}
    assert [tuple(item) for item in result["items"]] == [harness.KEYS]
    assert "op B=1 fp32" in capsys.readouterr().out
    again = ["bench", "--quick", "--compare", str(out)]
    assert cli.main(again) in (0, 1)
    assert "speed-up over the original" in capsys.readouterr().out
    monkeypatch.setattr(
        operators, "entries", lambda sizes: [one[0].__class__("mish", "B=1", "fp32", None)]
    )
    assert cli.main(["bench", "--only", "nothing"]) == cli.USAGE_ERROR


def test_suite_is_found_or_said_to_be_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    for name in [n for n in importlib.sys.modules if n.startswith("diwa.benchmarks")]:
        monkeypatch.delitem(importlib.sys.modules, name)
    monkeypatch.setattr(importlib, "import_module", _not_there)
    with pytest.raises(DiwaError, match="not there; install diwa again"):
        bench.suite()


def _not_there(name):
    raise ModuleNotFoundError(name)


def test_quick_names_exist():
    names = {entry.name for entry in operators.entries()}
    assert names >= operators.QUICK
    assert len(names) == len(list(operators.entries()))
