"""README: its Python runs, its commands exist, its numbers are those of the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from diwa import cli

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python_snippets_run_in_order(tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) >= 4
    pytest.importorskip("pybullet", reason="the simulator of README needs pybullet")
    monkeypatch.chdir(tmp_path)
    names = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["picture"].shape == (256, 256, 3)
    assert names["result"]["demos"] == 1
    assert (tmp_path / "runs/mine/collect/result.json").exists()


def test_commands_are_understood(tool):
    lines = [line.partition("#")[0].split() for line in tool.commands(README).splitlines()]
    names = [words[1] for words in lines]
    assert names == [phase.replace("_", "-") for phase in cli.FUNCTIONS]
    for words in lines:
        cli.parse(words[1], words[2:])


def test_every_diwa_command_in_the_text_exists():
    mentioned = set(re.findall(r"`diwa ([a-z-]+)", README))
    assert mentioned <= set(cli.COMMANDS)


def test_presets_are_all_explained():
    from diwa.presets import PRESETS

    presets = README.partition("- Presets:")[2].partition("\n- ")[0]
    assert set(re.findall(r"`(\w+)`", presets)) == set(PRESETS)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_make_targets_exist():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(re.findall(r"\bmake ([a-z]+)(?=`|  )", README)) <= set(targets)


def test_table_is_that_of_the_results(tool):
    if not tool.RESULT.exists():
        pytest.skip("skills_state.json does not exist yet")
    table = tool.table(json.loads(tool.RESULT.read_text(encoding="utf-8")))
    assert tool.with_table(README, table) == README


def test_table_from_results(tool):
    def entry(success, n, ci):
        return {"success": success, "n": n, "ci": ci}

    skill = {
        "base": entry(0.4, 100, [0.31, 0.5]),
        "finetuned": entry(0.9, 100, [0.83, 0.94]),
        "imagined_final": 0.95,
        "finetune_env_steps": 0,
        "play_transitions": 60000,
        "demos": 5,
    }
    other = {**skill, "finetuned": entry(0.8, 100, [0.7, 0.87]), "imagined_final": 0.85}
    result = {"meta": {"device": "a machine"}, "tasks": {"a": skill, "b": other}}
    table = tool.table(result)
    assert "| a | 40 % (31 to 50) | 90 % (83 to 94) | 95 % |" in table
    assert "| **mean** | **40 %** | **85 %** | **90 %** |" in table
    assert "60,000 transitions of play, 5 to 5 demonstrations per skill, 0 simulator steps" in table
    changed = tool.with_table(README, table)
    assert changed != README and changed.count(tool.BEGIN) == 1
    assert tool.with_table(changed, table) == changed


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def test_calvin_numbers_are_those_of_the_result():
    tasks = result("calvin")["tasks"].values()
    before, after = (
        sum(t[name]["success"] for t in tasks) / len(tasks) for name in ("base", "finetuned")
    )
    assert f"{100 * before:.0f} % to {100 * after:.0f} % on average" in README
    assert len(tasks) == 6 and {t["base"]["n"] for t in tasks} == {100}
    assert sum(t["finetune_env_steps"] for t in tasks) == 0


def test_pixel_numbers_are_those_of_the_results():
    text = " ".join(README.split())
    for task, found in result("vision_small")["tasks"].items():
        before, after = (round(100 * found[k]["success"]) for k in ("base", "finetuned"))
        assert re.search(rf"{task} (went )?from {before} to {after} %", text), task
        assert found["finetune_env_steps"] == 0
    row = result("vision_variants")["rows"]["vision-calibrated"]
    before, after = (round(100 * row[k]["success"]) for k in ("base", "finetuned"))
    assert f"move_slider_left went from {before} to {after} % ([vision_variants" in text


def test_steps_of_the_online_baseline_are_those_of_the_results():
    for name in ("compare_state", "compare_calvin"):
        assert f"{result(name)['online_dppo_env_steps_total']:,}" in README
