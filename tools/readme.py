"""Keeps README true.

python tools/readme.py table            write the result table from benchmarks/results
python tools/readme.py table --check    fail if README's table is another
python tools/readme.py commands         print README's shell commands that CI runs
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "skills_state.json"
BEGIN, END = "<!-- skills:begin -->", "<!-- skills:end -->"


def percent(value):
    return f"{100 * value:.0f} %"


def rate(entry):
    low, high = entry["ci"]
    return f"{percent(entry['success'])} ({100 * low:.0f} to {100 * high:.0f})"


def table(result):
    """Markdown of the eight skills and their mean, and a line on where it was measured."""
    lines = [
        "| skill, success in the simulator (95 % interval) | before | after | dreamed after |",
        "|---|---|---|---|",
    ]
    tasks = result["tasks"]
    for task, t in tasks.items():
        before, after = rate(t["base"]), rate(t["finetuned"])
        lines.append(f"| {task} | {before} | {after} | {percent(t['imagined_final'])} |")
    means = [
        statistics.mean(t["base"]["success"] for t in tasks.values()),
        statistics.mean(t["finetuned"]["success"] for t in tasks.values()),
        statistics.mean(t["imagined_final"] for t in tasks.values()),
    ]
    lines.append(f"| **mean** | {' | '.join(f'**{percent(m)}**' for m in means)} |")
    one = next(iter(tasks.values()))
    demos = sorted(t["demos"] for t in tasks.values())
    steps = sum(t["finetune_env_steps"] for t in tasks.values())
    lines += [
        "",
        f"{one['play_transitions']:,} transitions of play, {demos[0]} to {demos[-1]} "
        f"demonstrations per skill, {steps} simulator steps in fine-tuning. Source: "
        "[skills_state.json](benchmarks/results/skills_state.json), learned on "
        f"{result['meta']['device']}.",
    ]
    return "\n".join(lines)


def with_table(readme, text):
    """README with `text` between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def commands(readme):
    """Lines of the shell blocks marked `<!-- run -->`."""
    return "\n".join(re.findall(r"<!-- run -->\n```sh\n(.*?)\n```", readme, re.S))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("table", "commands"))
    parser.add_argument("--check", action="store_true", help="change nothing")
    arguments = parser.parse_args()
    readme = README.read_text(encoding="utf-8")
    if arguments.what == "commands":
        print(commands(readme))
        return 0
    if not RESULT.exists():
        print(f"{RESULT.name} does not exist yet; run benchmarks/skills_state.py")
        return 0
    wanted = with_table(readme, table(json.loads(RESULT.read_text(encoding="utf-8"))))
    if arguments.check and wanted != readme:
        print("README's table is not that of the results; run `python tools/readme.py table`")
        return 1
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
