"""Preference pairs: the file, its completions token for token, the command that makes it, a run on it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from spg import config
from spg.algorithms.advantages import GroupMean
from spg.cli import pairs
from spg.cli.train import resume
from spg.config import ConfigError
from spg.core.errors import InputError, Interrupted, RunError
from spg.core.files import read_csv
from spg.core.types import Experience
from spg.models import hub
from spg.models.llada import LLaDA, LLaDAConfig
from spg.models.policy import Policy
from spg.models.tokenizer import END_OF_TURN, EOS, MASK, PAD, byte_tokenizer
from spg.rollout.collect import collect
from spg.rollout.decoder import Decoder
from spg.rollout.prompt_order import PromptStream
from spg.rollout.recorded import Recorded, check_pairs, make_pairs
from spg.tasks.gsm8k import GSM8K
from spg.tasks.preferences import Preferences
from spg.tasks.sudoku import Sudoku
from tests import faults
from tests.helpers import run, same_run, small_policy, train_here

PUZZLE = {"puzzle": "0023301020300302", "solution": "4123321424311342"}
RIGHT, WRONG = "41 23\n32 14\n24 31\n13 42\n", "11 23\n32 14\n24 33\n33 42\n"
PAIR = {"prompt": "<answer>", "chosen": RIGHT, "rejected": WRONG, "example": PUZZLE}
VRPO = ("algorithm=vrpo", "preferences=pairs", "mu=2", "num_mc=2", "trainer.prompts_per_rollout=4")


def file_of(folder: Path, *lines: Any) -> str:
    """Write a file of pairs, texts as they are, and return its path."""
    path = folder / "pairs.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return str(path)


def sudoku(**settings: Any) -> Sudoku:
    return Sudoku(**{"train_size": 64, "eval_size": 4} | settings)


def collected(policy: Policy, task: Preferences, gen_length: int) -> Experience:
    """Return the experience of all pairs of a file."""
    recorded = Recorded(gen_length)
    check_pairs(policy, recorded, task)
    return collect(policy, recorded, task, GroupMean(), task.examples("train"), 2, 0)[0]


def bytes_policy() -> Policy:
    sizes = LLaDAConfig(32, 1, 2, 2, 48, vocab_size=265, embedding_size=272, rope_theta=100.0)
    return Policy(LLaDA(sizes, seed=0), byte_tokenizer())


def asked(tmp_path: Path) -> GSM8K:
    path = tmp_path / "train.jsonl"
    made = [{"question": f"What is {n} and {n}?", "answer": f"#### {2 * n}"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return GSM8K(path=str(path), eval_size=3)


def test_a_pair_is_a_group_of_two_that_differ_in_their_advantage(tmp_path: Path) -> None:
    policy = small_policy()
    other = {**PAIR, "chosen": WRONG, "rejected": RIGHT}
    task = Preferences(sudoku(), file_of(tmp_path, PAIR, "", other))
    got = collected(policy, task, 24)
    assert got.rollout.texts == (RIGHT, WRONG, WRONG, RIGHT), "the mark decides, not what the task thinks"
    assert got.rewards.tolist() == [1, 0, 1, 0]
    assert got.advantages.tolist() == [0.5, -0.5, 0.5, -0.5]
    assert got.rollout.group.tolist() == [0, 0, 1, 1]
    assert bool((got.rollout.commit_step == -1).all())
    assert not got.rollout.commit_logps.any()
    assert [pair["line"] for pair in task.examples("train")] == [1, 3]


def test_all_but_the_training_examples_is_the_tasks_own(tmp_path: Path) -> None:
    own = sudoku()
    task = Preferences(own, file_of(tmp_path, PAIR))
    for split in ("validation", "test", "heldout"):
        assert task.examples(split) == own.examples(split)
    example = own.examples("validation")[0]
    assert task.prompt(example) == own.prompt(example)
    assert task.template(example) == own.template(example)
    assert task.reward(example, RIGHT) == own.reward(example, RIGHT)
    assert task.measure(example, RIGHT) == own.measure(example, RIGHT)
    assert (task.name, task.workers, task.shots, task.parser) == ("sudoku", 1, 0, "exact")


def test_given_tokens_stay_and_eos_follows_to_the_end(tmp_path: Path) -> None:
    policy = small_policy()
    done = collected(policy, Preferences(sudoku(), file_of(tmp_path, PAIR)), 27).rollout
    ids = policy.encode(RIGHT)
    assert done.completion_ids[0].tolist() == ids + [policy.eos_id] * 3
    holes = [place for place, (a, b) in enumerate(zip(RIGHT, template_text(), strict=True)) if a != b]
    assert done.holes[0].nonzero().flatten().tolist() == holes
    # a completion that ends in a hole: what the template gives behind it is still there
    cut = {**PAIR, "rejected": ""}
    done = collected(policy, Preferences(sudoku(), file_of(tmp_path, cut)), 24).rollout
    row = done.completion_ids[1].tolist()
    assert row[0] == policy.eos_id
    assert [row[i] for i, fixed in enumerate(done.given[1].tolist()) if fixed] == [
        ids[i] for i in range(24) if i not in holes
    ]
    assert done.completion_mask[1].sum() == 1


def template_text() -> str:
    return "".join("?" * part if isinstance(part, int) else part for part in sudoku().template(PUZZLE) or ())


def test_a_free_completion_ends_in_eos_and_may_fill_all_there_is(tmp_path: Path) -> None:
    policy = small_policy()
    pair = {"prompt": "0023301020300302<answer>", "chosen": "4123", "rejected": "41234"}
    task = Preferences(sudoku(format="completion"), file_of(tmp_path, pair))
    done = collected(policy, task, 5).rollout
    assert done.completion_ids[0].tolist() == [*policy.encode("4123"), policy.eos_id]
    assert done.completion_ids[1].tolist() == policy.encode("41234")
    assert done.lengths.tolist() == [5, 5]
    with pytest.raises(InputError, match=r"line 1: `rejected` has 5 .*gen_length=4; give gen_length=6"):
        check_pairs(policy, Recorded(4), task)


def test_a_chat_is_asked_in_the_models_form(tmp_path: Path) -> None:
    policy = bytes_policy()
    chat = [{"role": "user", "content": "Häi?"}, {"role": "assistant", "content": "<reasoning>\n"}]
    pair = {"prompt": chat, "chosen": "dō\n</answer>\n", "rejected": "no"}
    task = Preferences(asked(tmp_path), file_of(tmp_path, pair))
    done = collected(policy, task, 24).rollout
    assert done.texts == ("dō\n</answer>\n", "no")
    ids = done.prompt_ids[0][done.prompt_mask[0]].tolist()
    assert ids == policy.encode(chat)
    assert policy.tokenizer.decode(ids).endswith(f"{END_OF_TURN}{header('assistant')}<reasoning>\n")
    with pytest.raises(InputError, match=r"line 1: .*no chat template"):
        check_pairs(
            small_policy(), Recorded(24), Preferences(sudoku(format="completion"), task.path.as_posix())
        )


def header(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


BROKEN = [
    ("{", "read as JSON .*expected one object per line"),
    ("[1]", "not an object; expected one object per line"),
    ({"prompt": "<answer>", "chosen": RIGHT}, "no rejected; a pair has prompt, chosen and rejected"),
    ({**PAIR, "prompt": 3}, "`prompt` is neither a text nor a chat"),
    ({**PAIR, "prompt": [{"role": "user"}]}, "`prompt` is neither a text nor a chat"),
    ({**PAIR, "prompt": []}, "`prompt` is neither a text nor a chat"),
    ({**PAIR, "chosen": ["a"]}, r"`chosen` is \[\"a\"\]; expected the completion's text"),
    ({**PAIR, "rejected": RIGHT}, "the same text"),
    ({**PAIR, "example": None}, "no example; sudoku has a template"),
    ({**PAIR, "example": {"puzzle": "12"}}, "needs `example` {puzzle, solution}"),
    ({**PAIR, "chosen_tokens": "1"}, "`chosen_tokens` is not a list of whole numbers"),
    ({**PAIR, "chosen_tokens": [True]}, "`chosen_tokens` is not a list of whole numbers"),
]


@pytest.mark.parametrize(("line", "words"), BROKEN)
def test_a_line_that_is_no_pair_is_named(tmp_path: Path, line: Any, words: str) -> None:
    with pytest.raises(InputError, match=rf"pairs.jsonl, line 2: .*{words}"):
        Preferences(sudoku(), file_of(tmp_path, PAIR, line)).examples("train")


UNFIT = [
    (RIGHT.replace("3", "1", 1), r"at token 5 it has '1', where '3' is given"),
    (RIGHT[:4], r"at token 5 it ends, where '3' is given"),
    (RIGHT + "4", "has 25 tokens and no room in gen_length=24; give gen_length=26"),
    ("a" + RIGHT[1:], "no tokens for parts of"),
    (EOS + RIGHT, f"holds the end-of-text token '{EOS.replace('|', '.')}'"),
    (MASK + RIGHT[1:], f"holds the mask token '{MASK.replace('|', '.')}'"),
]


@pytest.mark.parametrize(("text", "words"), UNFIT)
def test_a_completion_that_does_not_fit_is_named(tmp_path: Path, text: str, words: str) -> None:
    task = Preferences(sudoku(), file_of(tmp_path, *[PAIR] * 70, {**PAIR, "rejected": text}))
    with pytest.raises(InputError, match=rf"pairs.jsonl, line 71: `?.*{words}"):
        check_pairs(small_policy(), Recorded(24), task)


def test_a_text_behind_its_template_is_named(tmp_path: Path) -> None:
    task = Preferences(sudoku(), file_of(tmp_path, {**PAIR, "rejected": RIGHT + "4"}))
    with pytest.raises(InputError, match=r"line 1: `rejected` .* at token 25 it has '4', where '<.endoftext"):
        check_pairs(small_policy(), Recorded(30), task)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no lines"):
        Preferences(sudoku(), file_of(tmp_path, "")).examples("train")
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="can't be read"):
        Preferences(sudoku(), str(tmp_path / "pairs.jsonl")).examples("train")


def remade(
    policy: Policy, task: Any, length: int, tmp_path: Path, **decoding: Any
) -> tuple[list[dict[str, Any]], int]:
    """Make pairs, read them again, compare token for token; return the lines and the number of ties."""
    decoder = Decoder(length, block_size=4, steps=length, temperature=3.0, **decoding)
    kept: list[Any] = []

    def noting(*given: Any) -> Any:
        kept.append(decoder(*given))
        return kept[-1]

    noting.gen_length = length  # type: ignore[attr-defined]
    examples = task.examples("train")[:16]
    found = [p for batch in make_pairs(policy, noting, task, examples, 4, 8, 0) for p in batch]  # type: ignore[arg-type]
    assert (len(found), len(kept)) == (16, 8), "two examples at a time"
    lines = [line for line in found if line is not None]
    rollout = collected(policy, Preferences(task, file_of(tmp_path, *lines)), length).rollout
    decoded = {  # up to and including its end
        (text, tuple(ids[seen].tolist()))
        for done in kept
        for text, ids, seen in zip(done.texts, done.completion_ids, done.completion_mask, strict=True)
    }
    for text, ids, seen in zip(rollout.texts, rollout.completion_ids, rollout.completion_mask, strict=True):
        assert (text, tuple(ids[seen].tolist())) in decoded
    return lines, found.count(None)


def test_pairs_made_here_come_back_token_for_token(tmp_path: Path) -> None:
    policy, task = small_policy(), sudoku()
    lines, ties = remade(policy, task, 24, tmp_path)
    assert len(lines) + ties == 16
    assert any("rejected_tokens" not in line for line in lines), "most texts say it all"
    for line in lines:
        for side in ("chosen", "rejected"):
            rewards = sum(task.reward(line["example"], line[side]).values())
            assert rewards == line[f"{side}_reward"]
        assert line["chosen_reward"] > line["rejected_reward"]
        assert line["prompt"] == task.prompt(line["example"])


class Length(GSM8K):
    """Rewards long texts, so that random bytes make pairs."""

    def reward(self, example: Any, completion: str) -> dict[str, float]:
        return {"length": float(len(completion))}


def test_so_do_bytes_that_are_no_text(tmp_path: Path) -> None:
    task = asked(tmp_path)
    task.__class__ = Length
    lines, _ = remade(bytes_policy(), task, 12, tmp_path, remasking="random")
    assert any("chosen_tokens" in line for line in lines), "bytes above 127 alone are no UTF-8"
    assert isinstance(lines[0]["prompt"], list)


def test_tokens_of_another_tokenizer_or_an_older_text_are_not_taken(tmp_path: Path) -> None:
    policy = small_policy()
    pad = policy.tokenizer.convert_tokens_to_ids(PAD)
    free = {"prompt": "<answer>", "chosen": "12", "rejected": "21"}
    one, two = policy.encode("12")
    for saved, taken in (
        ([one, pad, two], [one, pad, two]),
        ([one, one], [one, two]),  # of another text
        ([one, 10**6], [one, two]),
        ([one, -1], [one, two]),
    ):
        task = Preferences(sudoku(format="completion"), file_of(tmp_path, {**free, "chosen_tokens": saved}))
        ids = collected(policy, task, 6).rollout.completion_ids[0].tolist()
        assert ids == taken + [policy.eos_id] * (6 - len(taken))


def test_which_completions_are_decoded_together_changes_no_pair() -> None:
    policy, task = small_policy(), sudoku()
    decoder, examples = Decoder(24, block_size=12, steps=8, temperature=2.0), task.examples("train")[:6]
    made = [
        [pair for batch in make_pairs(policy, decoder, task, examples, 6, size, 0) for pair in batch]
        for size in (1, 13, 100)
    ]
    assert made[0] == made[1] == made[2]
    assert sum(pair is not None for pair in made[0][1:]) > 1


def test_mistakes_are_answered_before_a_job_starts(tmp_path: Path) -> None:
    path = file_of(tmp_path, PAIR)
    cfg = config.compose("config", ["algorithm=vrpo", "preferences=pairs", f"preferences.path={path}"])
    assert cfg.group_size == 2
    for key, value, words in (
        ("group_size", 8, r"group_size=8, but .* give group_size=2"),
        ("preferences.path", "nowhere", r"preferences\.path=nowhere is not a file; .*spg\.pairs"),
        ("preferences.path", "???", r"preferences\.path must be given"),
    ):
        other = cfg.copy()
        OmegaConf.update(other, key, value)
        with pytest.raises(ConfigError, match=words):
            config.check(other)
    steps = ["algorithm=vrpo", "preferences=pairs", f"preferences.path={path}", "masking=trajectory"]
    with pytest.raises(ConfigError, match=r"masking=trajectory .* give masking=random"):
        config.check(config.compose("config", steps))
    assert "preferences" not in config.compose("config", ["preferences=null"])


def test_the_commands_mistakes_are_answered_before_it_starts(tmp_path: Path) -> None:
    path = file_of(tmp_path, PAIR)
    cfg = of_pairs()
    for key, value, words in (
        ("samples", 1, r"samples=1: a pair is two completions"),
        ("temperature", 0, r"samples=3 with temperature=0"),
        ("prompts", 0, "prompts=0: out of range"),
    ):
        with pytest.raises(ConfigError, match=words):
            pairs.settings(OmegaConf.merge(cfg, {key: value}), [])
    with pytest.raises(ConfigError, match=r"pairs have their own: temperature="):
        pairs.settings(cfg, ["decoding.temperature=0.5"])
    with pytest.raises(ConfigError, match="is there already; remove it, or give another"):
        pairs.destination(OmegaConf.merge(cfg, {"output": path}))
    with pytest.raises(ConfigError, match="can't be written"):
        pairs.destination(OmegaConf.merge(cfg, {"output": f"{path}/x"}))


def test_a_path_holds_in_another_directory_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file_of(tmp_path, PAIR)
    monkeypatch.chdir(tmp_path)
    cfg = hub.settle(OmegaConf.create({"preferences": {"path": "pairs.jsonl"}}))
    assert cfg.preferences.path == str(tmp_path / "pairs.jsonl")


MAKE = ("prompts=12", "samples=3", "threads=1", "accelerator=cpu", "task.train_size=100")


@cache
def of_pairs() -> Any:
    """Return the configuration of the command with MAKE, composed once."""
    return config.compose("pairs", list(MAKE))


def making(folder: Path, *overrides: str) -> Path:
    """Make pairs in this process, as `spg.pairs` would."""
    output = folder / "made" / "pairs.jsonl"
    cfg = pairs.settings(
        OmegaConf.merge(of_pairs(), OmegaConf.from_dotlist([f"output={output}", *overrides])), []
    )
    pairs.make(cfg, pairs.destination(cfg))
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making(tmp_path_factory.mktemp("pairs"))


def test_the_command_makes_the_same_file_again(made: Path, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    assert making(tmp_path).read_text() == made.read_text()
    lines = [json.loads(line) for line in made.read_text().splitlines()]
    ties = 12 - len(lines)
    assert lines
    assert f"{len(lines)} pairs of 12 prompts, {ties} skipped as ties; mean reward of chosen" in caplog.text
    examples = PromptStream(sudoku(train_size=100).examples("train"), 12, 1, 0).examples(0)
    assert [line["example"] for line in lines] == [e for e in examples if e in [p["example"] for p in lines]]
    assert making(tmp_path / "other", "seed=1").read_text() != made.read_text()


def test_where_no_pair_comes_of_it_no_file_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"prompts=101, but sudoku has 100 .*; give prompts=100 or fewer"):
        making(tmp_path, "prompts=101")
    monkeypatch.setattr(Sudoku, "reward", lambda *_: {"same": 1.0})
    with pytest.raises(RunError, match=r"none of 12 prompts .* give more samples than 3"):
        making(tmp_path)
    assert not (tmp_path / "made" / "pairs.jsonl").exists()


def test_stopped_it_keeps_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    calls, reward = [], Sudoku.reward

    def stopping(*given: Any) -> dict[str, float]:
        calls.append(given)
        if len(calls) > 15:
            raise KeyboardInterrupt
        return reward(*given)

    monkeypatch.setattr(Sudoku, "reward", stopping)
    with pytest.raises(Interrupted, match=r"has the \d+ pairs of the first 5 of 12 prompts"):
        making(tmp_path, "eval_batch_size=15")
    kept = (tmp_path / "made" / "pairs.jsonl").read_text()
    assert kept
    assert made.read_text().startswith(kept)


def test_a_run_on_pairs_goes_on_bit_for_bit(made: Path, tmp_path: Path) -> None:
    lines = (*VRPO, f"preferences.path={made}", "task.eval_size=4")
    whole = train_here(tmp_path / "whole", *lines)
    rows = [row for row in read_csv(whole / "metrics.csv") if row["loss"]]
    assert len(rows) == 8
    assert [row["reward"] for row in rows] == ["0.5", ""] * 4
    assert [row["frac_reward_zero_std"] for row in rows[::2]] == ["0.0"] * 4
    assert json.loads((whole / "summary.json").read_text())["accuracy.before"] < 1, "the task's own measure"
    with pytest.MonkeyPatch.context() as patch:
        faults.interrupted("4", patch.setattr)
        with pytest.raises(Interrupted):
            train_here(tmp_path / "cut", *lines)
    resume(str(tmp_path / "cut"), [])
    assert same_run(whole, tmp_path / "cut")
    assert not torch.equal(*(torch.tensor(float(rows[n]["loss"])) for n in (0, -1)))


@pytest.mark.long
def test_the_commands_on_a_terminal(tmp_path: Path) -> None:
    text = run("pairs", *MAKE, f"output={tmp_path / 'p.jsonl'}")
    assert "pairs of 12 prompts" in text
    assert "output=" in run("pairs", "--help")
    text = run("pairs", *MAKE, f"output={tmp_path / 'p.jsonl'}", check=False)
    assert "is there already" in text
