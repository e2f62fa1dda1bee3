"""The benchmarks: the plain way against the authors' numbers, and a small run of each script."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import common, gpu, omega, plain, rollout, update
from benchmarks.laptop import PARTS, compare
from spg.core.errors import RunError
from tests.helpers import GOLDEN, ROOT, golden, golden_policy

DECODINGS = sorted(p.name for p in (GOLDEN / "decoding").glob("*.npz") if "random_remask" not in p.name)
# float32 losses of the authors' code, by a logits' leaf; without guidance, which plain does not do
LOSSES = [p.name for p in sorted((GOLDEN / "spg_loss").glob("*_mix*.npz")) if "underflow" not in p.name]
LOSSES += [p.name for p in sorted((GOLDEN / "spg_loss").glob("grid_*_eubo.npz"))]
TINY = "d_model=32 n_layers=2 n_heads=2 mlp_hidden_size=48 vocab_size=131".split()
SMALL = [
    *(word for size in TINY for word in ("--size", size)),
    *"--prompt 5 --tokens 16 --block 4 --rounds 2 --threads 1".split(),
]


def test_medians_quartiles_and_their_ratio() -> None:
    row = compare([4.0, 2.0, 6.0], [1.0, 2.0, 3.0])
    assert row["other"] == {"median": 4.0, "low": 2.0, "high": 6.0, "n": 3}
    assert row["this"]["median"] == 2.0
    assert row["ratio"] == 2.0


@pytest.mark.parametrize("name", DECODINGS)
def test_plain_decodes_as_the_authors_do(name: str) -> None:
    """Sampled ones too: the noise is the authors', number by number."""
    z, args = golden(f"decoding/{name}")
    policy, prompt = golden_policy(), z["prompt"]
    masks = torch.full((len(prompt), args["gen_length"]), policy.mask_id)
    done = plain.rollout(
        policy,
        torch.cat([prompt, masks], 1),
        prompt.shape[1],
        args["block_length"],
        args["steps"],
        args["temperature"],
        torch.Generator().manual_seed(5),
    )
    assert torch.equal(done, z["output"])


@pytest.mark.parametrize("name", LOSSES)
def test_plain_loss_and_gradient_are_the_authors(name: str) -> None:
    z, args = golden(f"spg_loss/{name}")
    completion = z["completion_mask"].bool()
    length = completion.shape[1]
    logits = z["logits"].requires_grad_()
    logps, probabilities = plain.at_targets(logits[:, :, -length:], z["completion_ids"])
    loss = plain.group_loss(
        logps,
        probabilities,
        (z["perturbed"][:, :, -length:] == args["mask_id"]) & completion.unsqueeze(1),
        completion.sum(-1),
        z["advantages"],
        args["eubo_beta"],
        {"mix": args["mix_weight"], "eubo": 1.0}[args["logp_estimation"]],
    )
    loss.backward()
    assert logits.grad is not None
    assert float(loss.detach()) == pytest.approx(float(z["loss"]), abs=1e-6)
    assert torch.allclose(logits.grad, z["grad_logits"], atol=1e-7, rtol=1e-5)


def ran(main, monkeypatch: pytest.MonkeyPatch, path: Path, *words: str) -> dict:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["benchmark", *SMALL, *words, "--output", str(path)])
    try:
        main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


@pytest.mark.long
def test_rollouts_are_checked_then_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # the update's test measures them
    monkeypatch.setattr(rollout, "rates", lambda *_: {"operations_per_s": 1e11, "bytes_per_s": 1e10})
    words = "--steps 8 --caches none,dual --lengths 7".split()
    result = ran(rollout.main, monkeypatch, tmp_path / "r.json", *words)
    assert "none, EOS at 7" in capsys.readouterr().out
    greedy, sampled = result["temperatures"]["0.0"], result["temperatures"]["0.9"]
    for part, tokens in (("block 0", 6 * 16), ("block 2", 6 * 8)):
        checked = greedy["checked"][part]
        assert (checked["tokens"], checked["of"]) == ("identical", tokens)
        assert 0.5 < checked["dual_equals_none"] <= 1
    assert sampled["checked"]["first_step"]["relative_error"] <= 1e-5
    assert sampled["checked"]["draws"]["draws"] == 4 * 6 * 4
    for figures in (greedy, sampled):
        assert list(figures["seconds"]) == ["none", "none, EOS at 7", "dual", "dual, EOS at 7"]
        for row in figures["seconds"].values():
            assert row["ratio"] == pytest.approx(row["plain"]["median"] / row["ours"]["median"])
            assert row["ours"]["n"] == 2
        operations = [figures["floors"][way]["operations"] for way in ("plain", "none", "dual")]
        assert operations == sorted(operations, reverse=True)
    assert result["settings"]["network"]["head"] == 131
    assert {"machine", "versions"} <= result.keys()


@pytest.mark.long
def test_updates_are_checked_then_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a process for each would take seconds to start
    monkeypatch.setattr(
        update, "memory", lambda bench, argv: {n: {"bytes": 2**20, "by": "nothing"} for n in bench.ways()}
    )
    result = ran(update.main, monkeypatch, tmp_path / "u.json", "--more-draws", "3")
    assert "1 MiB (1.00 of plain)" in capsys.readouterr().out
    for way in ("one pass", "in pieces"):
        assert result["checked"][way]["loss"] <= 1e-5
        assert 0 < result["checked"][way]["gradient"] <= 1e-5
    seconds = result["seconds"]
    assert seconds["ratio"] == pytest.approx(seconds["plain"]["median"] / seconds["ours"]["median"])
    assert seconds["ours, m=3, in pieces"]["n"] == 1
    assert result["floors"]["plain"]["operations"] > result["floors"]["ours"]["operations"]


@pytest.mark.long
def test_memory_is_that_of_one_pass_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "benchmarks.update", *SMALL, "--tokens", "64", "--alone", "plain"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    # log-softmax and softmax of 12 sequences, in float32, at the least
    assert 2 * 12 * 64 * 131 * 4 < json.loads(done.stdout)["bytes"] < 2**27


def small_bench(temperature: float, *words: str) -> rollout.Bench:
    given = common.parse(common.make_parser("", 1), [*SMALL, *words])
    for name, value in {"steps": 8, "full": False, "caches": ["none"], "lengths": []}.items():
        setattr(given, name, value)
    return rollout.Bench(common.make_policy(given), given, temperature)


def test_other_tokens_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small_bench(0.0)
    rollout.check(bench)
    right = plain.choose

    def wrong(logits: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        ids, confidence = right(logits, *rest)
        return (ids + 1) % 100, confidence

    monkeypatch.setattr(plain, "choose", wrong)
    with pytest.raises(RunError, match="differently"):
        rollout.check(bench)


def test_draws_at_another_temperature_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small_bench(0.9, "--group", "64")
    rollout.check(bench)
    right = plain.choose
    monkeypatch.setattr(plain, "choose", lambda logits, t, generator: right(logits, 0.5, generator))
    with pytest.raises(RunError, match="standard deviations"):
        rollout.check(bench)


def test_choices_in_bfloat16_are_near_the_best_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = small_bench(0.0)
    bench.policy.precision = "bf16-mixed"
    found = rollout.check(bench)["block 0"]
    assert found["tokens"] == "near"
    other = bench.ours(0)
    with pytest.raises(RunError, match="below"):
        rollout.check_choices(
            bench, dataclasses.replace(other, completion_ids=other.completion_ids.roll(1, 0))
        )


def test_operations_are_those_of_the_products() -> None:
    """Two operations a weight and position; the attention's two products over what is seen."""
    sizes = common.Sizes.of(small_bench(0.0).policy)
    layer, attention, head = 4 * 32 * 32 + 3 * 32 * 48, 4 * 32 * 21, 32 * 131
    assert sizes.forward(6, 21, 21, 21, 21) == 6 * 21 * (2 * (2 * layer + attention) + 2 * head)
    keys = 2 * 2 * 32 * 32
    lean = 21 * (2 * layer + attention) + 21 * keys + 4 * (2 * layer + attention - keys) + 4 * 2 * head
    assert sizes.forward(6, 21, 21, 4, 4) == 6 * lean


@pytest.mark.long
def test_one_command_compares_two_versions(tmp_path: Path) -> None:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, check=False)
    if git.returncode:
        pytest.skip("no git checkout, so there is no other version to check out")
    output = tmp_path / "figures.json"
    line = ["--against", "HEAD", "--rounds", "1", "--rollouts", "2", "--output", str(output)]
    command = [sys.executable, "-m", "benchmarks.laptop", *line]
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result = json.loads(output.read_text())
    for part in PARTS:
        assert part in text
        assert result["parts"][part]["this"]["n"] == {"time/rollout": 2, "time/update": 8}[part]
        assert 0.2 < result["parts"][part]["ratio"] < 5, "the same version twice"


def test_the_noise_of_the_mixture_at_each_omega() -> None:
    found = omega.measure(2, 6, None, seed=0)
    variances = found["variance"]
    assert found["variance at the adaptive omega"] > 0
    best = found["best omega"]
    nearest = min(variances, key=lambda name: abs(float(name) - best))
    assert variances[nearest] == min(variances.values())
    assert 0 <= found["adaptive omega"] <= 1
    assert found["adaptive omega"] != 0.5, "it has learned from the sets of masks"


def test_a_gpu_part_that_fails_or_has_no_time_is_recorded_and_the_others_go_on(tmp_path: Path) -> None:
    def part(name: str, code: str, seconds: float = 20.0) -> gpu.Part:
        return gpu.Part(name, seconds, (sys.executable, "-S", "-c", code))

    todo = [
        part("fails", "raise SystemExit('a reason')"),
        part("hangs", "import time; time.sleep(60)", 0.2),
        part("update-2", "print('noise'); print('{}')"),
        part("tests", "print('3 passed')"),
    ]
    found = gpu.run_parts(todo, 30.0, tmp_path)
    assert [result["state"] for result in found.values()] == ["failed", "failed", "passed", "passed"]
    assert "a reason" in found["fails"]["error"]
    assert "took more than" in found["hangs"]["error"]
    assert found["tests"]["said"] == "3 passed"
    assert gpu.run_parts(todo, 0.0, tmp_path)["fails"]["state"] == "skipped"
    row = {"seconds": 1.0, "planned_seconds": 2.0, "bytes": 2**30, "planned_bytes": 2**31}
    shown = gpu.table({**found, "rollouts": {"state": "passed", "figures": {"rollout": row}}})
    assert "| rollout | passed | 1 s | 2 s | 1 GiB | 2 GiB |" in shown
    assert "| fails | failed |" in shown


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.long
def test_the_gpu_command_is_rehearsed_at_the_size_of_a_toy(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "figures.json").read_text())["parts"]
    assert {part["state"] for part in found.values()} == {"passed"}
    for part in gpu.MEASURED:
        for name, row in found[part]["figures"].items():
            assert row["planned_bytes"] == pytest.approx(row["bytes"], rel=0.1), name
    assert (tmp_path / "table.md").read_text() in done.stdout
