"""How long a rollout and an update of the default run take, compared with an earlier version.

`python -m benchmarks.laptop` checks both versions out, first asks both for the greedy accuracy of the
same weights, which must agree, then trains with each in turn and compares the times that the runs
logged. Rewards, masks and prompts have the same sizes in both; their random draws differ.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
# the version in which the main job first ran as a whole
FIRST = "f820089"
PARTS = ("time/rollout", "time/update")
MU = 4


def run_in_tree(tree: Path, module: str, *arguments: str) -> None:
    """Run an entry point of the version in `tree`; raises RuntimeError with its last lines if it fails."""
    command = [sys.executable, "-m", f"spg.{module}", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} in {tree} failed:\n{(done.stdout + done.stderr)[-2000:]}")


def accuracy(tree: Path, weights: Path, folder: Path) -> dict[str, float]:
    """Return the measures of `weights` on the held-out puzzles, as the version in `tree` decodes them."""
    run_in_tree(tree, "evaluate", f"model.weights={weights}", "split=heldout", f"hydra.run.dir={folder}")
    if (folder / "evaluation.json").is_file():  # of versions before 0.3.0
        (means,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["results"].values()
        return means
    (found,) = json.loads((folder / "results.json").read_text(encoding="utf-8"))["results"].values()
    return {name: measure["mean"] for name, measure in found["measures"].items()}


def times(tree: Path, folder: Path, rollouts: int, threads: int) -> dict[str, list[float]]:
    """Train a little with the version in `tree`; return the seconds of each rollout and update but the first.

    The first rollout pays for what is cached after it.
    """
    settings = (
        f"trainer.max_updates={MU * (rollouts + 1)}",
        f"trainer.threads={threads}",
        "trainer.validate_every=100000",
        "trainer.samples_every=0",
        "task.eval_size=8",
    )
    run_in_tree(tree, "train", *settings, f"hydra.run.dir={folder}")
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["update"]) > MU]
    return {part: [float(row[part]) for row in rows if row[part]] for part in PARTS}


def main() -> None:
    """Compare this version with another, print a table, and write the figures to a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", default=FIRST, help="the other version, a git revision")
    parser.add_argument("--rounds", type=int, default=5, help="trainings with each version, in turn")
    parser.add_argument("--rollouts", type=int, default=6, help=f"timed rollouts, of {MU} updates each")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    given = parser.parse_args()
    git = ["git", "-C", str(ROOT)]
    with tempfile.TemporaryDirectory() as name:
        space = Path(name)
        other = space / "other"
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", other, given.against], check=True)
        try:
            trees = {"other": other, "this": ROOT}
            weights = next((ROOT / "spg" / "assets").glob("*.safetensors"))
            found = {n: accuracy(tree, weights, space / f"accuracy-{n}") for n, tree in trees.items()}
            if found["other"] != found["this"]:
                raise RuntimeError(f"the two versions decode the same weights differently: {found}")
            seconds: dict[str, dict[str, list[float]]] = {n: {part: [] for part in PARTS} for n in trees}
            for number in range(given.rounds):
                for n, tree in trees.items():
                    run = times(tree, space / f"run-{n}-{number}", given.rollouts, given.threads)
                    for part in PARTS:
                        seconds[n][part] += run[part]
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", other], check=True)
    result = {
        "against": given.against,
        "threads": given.threads,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "torch": version("torch"),
        "greedy accuracy of the same weights, both": found["this"],
        "parts": {part: compare(seconds["other"][part], seconds["this"][part]) for part in PARTS},
    }
    lines = [f"{'part':<14}{'other, s':>24}{'this, s':>24}{'ratio':>8}"]
    for part, row in result["parts"].items():
        cells = [f"{row[n]['median']:.4f} ({row[n]['low']:.4f}-{row[n]['high']:.4f})" for n in trees]
        lines.append(f"{part:<14}{cells[0]:>24}{cells[1]:>24}{row['ratio']:>8.2f}")
    sys.stdout.write("\n".join(lines) + "\n")
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def compare(other: list[float], this: list[float]) -> dict[str, object]:
    """Return median and quartiles of both in seconds, how many, and the ratio of the medians."""
    row: dict[str, object] = {}
    for name, values in (("other", other), ("this", this)):
        low, median, high = statistics.quantiles(values, n=4)
        row[name] = {"median": median, "low": low, "high": high, "n": len(values)}
    row["ratio"] = statistics.median(other) / statistics.median(this)
    return row


if __name__ == "__main__":
    main()
