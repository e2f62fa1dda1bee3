"""HumanEval and MBPP: data, prompts, the program in a completion, its tests, rewards; canonical solutions."""

from __future__ import annotations

import gzip
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from spg.core.errors import InputError
from spg.tasks.coding import Coding
from spg.tasks.datasets import read
from spg.tasks.humaneval import HumanEval
from spg.tasks.mbpp import MBPP
from spg.tasks.parsing.programs import BLOCKED, LONGEST, compiles, find_program, is_blocked, parse_program
from tests.helpers import real_data

# problems of our own, in the form of the data sets
KODCODE: list[dict[str, Any]] = [
    {
        "question": "Return the numbers that are above their left neighbour.",
        "solution": "def risers(numbers: list[int]) -> list[int]:\n"
        "    return [b for a, b in zip(numbers, numbers[1:]) if b > a]\n",
        "test": "from solution import risers\n\n"
        "def test_some():\n    assert risers([1, 3, 2, 5]) == [3, 5]\n\n"
        "def test_none():\n    assert risers([3, 2, 1]) == []\n    assert risers([]) == []\n",
    },
    {
        "question": "Make a counter that can be pressed, and refuses to be pressed by less than one.",
        "solution": "class Counter:\n    def __init__(self):\n        self.total = 0\n\n"
        "    def press(self, by=1):\n        if by < 1:\n            raise ValueError('by less than one')\n"
        "        self.total += by\n        return self.total\n",
        "test": "import pytest\nfrom solution import Counter\n\n"
        "@pytest.fixture\ndef counter():\n    return Counter()\n\n"
        "@pytest.mark.parametrize('by,total', [(1, 1), (3, 3)])\n"
        "def test_press(counter, by, total):\n    assert counter.press(by) == total == counter.total\n\n"
        "class TestRefusal:\n    def test_less(self):\n"
        "        with pytest.raises(ValueError, match='less'):\n            Counter().press(0)\n",
    },
    {
        "question": "Double a number.",
        "solution": "def double(x):\n    return 2 * x\n",
        "test": "assert double(2) == 4\nassert double(0) == 0\n"
        "for x in range(3):\n    assert double(x) == x + x\n",
    },
]  # fmt: skip
PROBLEMS: list[dict[str, Any]] = [
    {
        "task_id": 900,
        "text": "Write a function that adds up the common divisors of two numbers.",
        "code": "def sum(a, b):\n    total = 0\n    for d in range(1, a + 1):\n"
        "        if a % d == b % d == 0:\n            total += d\n    return total",
        "test_list": ["assert sum(10, 15) == 6", "assert sum(100, 150) == 93", "assert sum(4, 6) == 3"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 901,
        "text": "Write a function that finds the length of a circle's outline.",
        "code": "import math\r\ndef outline(r):\r\n  return 2 * math.pi * r",
        "test_list": ["assert math.isclose(outline(1), 6.283185, rel_tol=1e-6)", "assert outline(0) == 0"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    {
        "task_id": 902,
        "text": "Write a function that finds the depth of a tree.",
        "code": "class Node:\n  def __init__(self, left=None, right=None):\n    self.left = left\n"
        "    self.right = right\n\ndef depth(node):\n"
        "  return 0 if node is None else 1 + max(depth(node.left), depth(node.right))",
        "test_list": ["assert depth(root) == 3", "assert depth(root.left) == 2", "assert depth(None) == 0"],
        "test_setup_code": "root = Node()\nroot.left = Node()\nroot.left.right = Node()",
        "challenge_test_list": [],
    },
    {
        "task_id": 903,
        "text": "Write a function that sorts pairs by their second item.",
        "code": "def by_second(pairs):\n  return sorted(pairs, key=lambda p: p[1])",
        "test_list": ["assert by_second([('a', 2), ('b', 1)]) == [('b', 1), ('a', 2)]"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
]
FUNCTIONS: list[dict[str, Any]] = [
    {
        "task_id": "Own/0",
        "prompt": "from typing import List\n\n\ndef square(x):\n    return x * x\n\n\n"
        'def squares(numbers: List[int]) -> List[int]:\n    """ Square each number. """\n',
        "entry_point": "squares",
        "canonical_solution": "    return [square(x) for x in numbers]\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    import random\n"
        "    assert True, 'never counts'\n"
        "    assert candidate([1, 2]) == [1, 4]\n    assert candidate([]) == []\n"
        "    for _ in range(3):\n        x = random.randrange(9)\n"
        "        assert candidate([x]) == [square(x)]\n",
    }
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(kind: type[Coding], folder: Path, **settings: Any) -> Coding:
    """Return a task on our own problems, or skip the test where no program can be walled in."""
    rows = FUNCTIONS if kind is HumanEval else PROBLEMS
    task = kind(
        path=write(folder / f"{kind.name}.jsonl", rows),
        train_path=write(folder / "train.jsonl", KODCODE),
        **{"wall_seconds": 4.0, "workers": 2, **settings},
    )
    try:
        task.cage()
    except InputError as error:
        pytest.skip(str(error))
    return task


def fenced(program: str, reasoning: str = "So it is.") -> str:
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>\n```python\n{program}\n```\n</answer>"


# --- real data ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def humaneval() -> HumanEval:
    task = HumanEval(path=str(real_data("humaneval/HumanEval.jsonl.gz")), wall_seconds=20.0)
    try:
        task.cage()
    except InputError as error:
        pytest.skip(str(error))
    return task


@pytest.mark.long
def test_all_canonical_solutions_pass(humaneval: HumanEval) -> None:
    rows = humaneval.examples("heldout")
    assert len(rows) == 164
    with ThreadPoolExecutor(2) as pool:
        measured = list(pool.map(humaneval.measure, rows, map(humaneval.target, rows)))
    right = {"accuracy": 1.0, "tests": 1.0}
    assert [row["task_id"] for row, m in zip(rows, measured, strict=True) if m != right] == []


@pytest.mark.long
def test_all_truncated_solutions_fail(humaneval: HumanEval) -> None:
    """Half of the body's lines are kept, or none; what then goes on without end is cut off sooner."""
    rows = humaneval.examples("heldout")
    cut = []
    for row in rows:
        body = row["solution"].removeprefix(row["question"]).rstrip().split("\n")
        cut.append(fenced(row["question"] + "\n".join(body[: len(body) // 2])))
    task = HumanEval(wall_seconds=0.5)
    with ThreadPoolExecutor(2) as pool:
        measured = list(pool.map(task.measure, rows, cut))
    assert [row["task_id"] for row, m in zip(rows, measured, strict=True) if m["accuracy"] != 0.0] == []


def test_the_data_set_s_own_form_of_completion_is_the_body(humaneval: HumanEval) -> None:
    """Files of samples hold a task_id and the bare body; the sample's example is found by its id."""
    line = {"task_id": "HumanEval/2", "completion": "    return number % 1.0\n"}
    row = humaneval.example_of(line)
    assert row["entry_point"] == "truncate_number"
    assert humaneval.measure(row, line["completion"])["accuracy"] == 1.0
    assert humaneval.measure(row, "return number % 1.0")["accuracy"] == 1.0
    body = "if number < 1:\n        return number\n    return number % 1.0"
    assert humaneval.measure(row, fenced(body))["accuracy"] == 1.0, "the first line's indentation is lost"
    assert humaneval.measure(row, "    return 0.0\n") == {"accuracy": 0.0, "tests": 0.0}
    for further in (
        "def check(candid",
        "class A:",
        "if __name__ == '__main__':",
        "print(1 /",
        "# Now I",
        "#",
    ):
        body = f"    part = number % 1.0\n# of one\n    return part\n\n\n{further}\n"
        assert humaneval.measure(row, body)["accuracy"] == 1.0, further
    helped = "    return helper(number)\n\ndef helper(x):\n    return x % 1.0\n"
    assert humaneval.measure(row, helped)["accuracy"] == 0.0, "the published evaluation cuts here too"


def test_ways_of_writing_the_whole_function(humaneval: HumanEval) -> None:
    row = humaneval.example_of({"task_id": "HumanEval/2"})
    whole = "def truncate_number(number):\n    return number % 1.0\n"
    typed = f"from __future__ import annotations\nimport math\n{whole}".replace("number):", "number: Any):")
    example = "```python\nprint(truncate_number(3.5))\n```"
    indented = whole.replace("\n", "\n   ")
    other = "```python\ndef main():\n    print(truncate_number(3.5))\n```"
    for text in (
        fenced(typed),
        fenced("\ufeff" + whole),
        whole + "<|endoftext|><|endoftext|>",
        f"```python\n{whole}```\nIt is used so:\n{example}\n{other}",
        fenced(f"{whole}```\n{example}\n```python\ntruncate_number(1)"),
        f"1. As a function:\n   ```python\n   {indented}\n   ```\n<|eot_id|>",
    ):
        assert humaneval.measure(row, text)["accuracy"] == 1.0, text


def test_published_halves(humaneval: HumanEval) -> None:
    validation, test = humaneval.examples("validation"), humaneval.examples("test")
    assert [len(validation), len(test)] == [82, 82]
    assert validation[0]["task_id"] == "HumanEval/0"
    assert test[0]["task_id"] == "HumanEval/1"


# --- the task protocol on problems of our own --------------------------------------------------------


@pytest.mark.parametrize("kind", [HumanEval, MBPP])
@pytest.mark.parametrize("reward", ["intended", "released"])
def test_targets_earn_everything(kind: type[Coding], reward: str, tmp_path: Path) -> None:
    task = make(kind, tmp_path, reward=reward)
    for example in [*task.examples("train"), *task.examples("heldout")]:
        json.dumps(example)  # it is written beside saved generations
        target = task.target(example)
        assert task.reward(example, target) == {"format": 0.5, "tests": 1.0}, example
        assert task.measure(example, target) == {"accuracy": 1.0, "tests": 1.0}
        assert task.answer(example, target) == example["solution"].strip("\n") + "\n"
        assert task.template(example) is None
        assert task.example_of({"example": example}) == example
    assert (
        task.examples("heldout")
        == [row for pair in [task.examples("validation"), task.examples("test")] for row in pair]
        or len(task.examples("heldout")) > 2
    )


@pytest.mark.parametrize("kind", [HumanEval, MBPP])
def test_empty_programs_pass_no_test(kind: type[Coding], tmp_path: Path) -> None:
    """A test that nothing can fail would give every completion a share."""
    task = make(kind, tmp_path)
    for example in [*task.examples("train"), *task.examples("heldout")]:
        assert task.measure(example, fenced("pass"))["tests"] == 0.0


def test_each_test_counts_by_itself(tmp_path: Path) -> None:
    humaneval, mbpp = make(HumanEval, tmp_path), make(MBPP, tmp_path)
    (squares,) = humaneval.examples("heldout")
    assert len(humaneval.tests(squares)) == 3, "a constant is no test"
    wrong = "def squares(numbers):\n    return [] if not numbers else 1 / 0"
    assert humaneval.measure(squares, fenced(wrong)) == {"accuracy": 0.0, "tests": 1 / 3}
    sums = mbpp.examples("heldout")[0]
    assert mbpp.measure(sums, fenced("def sum(a, b): return 6"))["tests"] == 1 / 3
    hangs = "def sum(a, b):\n    while a == 10: pass\n    return {100: 93, 4: 3}[a]"
    assert mbpp.measure(sums, fenced(hangs))["tests"] == 2 / 3
    risers = mbpp.examples("train")[0]
    assert mbpp.measure(risers, fenced("def risers(numbers): return []"))["tests"] == 1 / 2


def test_what_tests_need_is_never_the_program_s(tmp_path: Path) -> None:
    """A program can't define away the helper that a test compares with, nor a builtin."""
    task = make(HumanEval, tmp_path)
    (example,) = task.examples("heldout")
    cheat = (
        "class Any(list):\n    def __eq__(self, other): return True\n"
        "def square(x): return None\nlen = isinstance = all = lambda *a: True\n"
        "def squares(numbers): return [None] * len(numbers) if numbers else Any()\n"
    )
    assert task.measure(example, fenced(cheat))["tests"] < 1.0
    assert task.measure(example, fenced("def squares(numbers): return [square(x) for x in numbers]"))[
        "accuracy"
    ], "the prompt's imports and helpers are at hand"


def test_prompts(tmp_path: Path) -> None:
    humaneval, mbpp = make(HumanEval, tmp_path), make(MBPP, tmp_path)
    (message,) = humaneval.prompt(humaneval.examples("heldout")[0])
    assert isinstance(message, dict)
    text = message["content"]
    assert FUNCTIONS[0]["prompt"].strip() in text
    assert all(part in text for part in ("<reasoning>", "</answer>", "```python"))
    text = str(mbpp.prompt(mbpp.examples("heldout")[0]))
    assert "assert sum(10, 15) == 6" in text, "which alone tells the function's name"
    texts = [str(mbpp.prompt(example)) for example in mbpp.examples("train")]
    assert "def risers(numbers: list[int]) -> list[int]" in texts[0]
    assert "class Counter" in texts[1]
    assert "return" not in texts[1], "the solution stays hidden"


def test_prompts_of_another_code_base(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Complete: {question}")
    task = make(MBPP, tmp_path, prompt_file=str(tmp_path / "prompt.txt"))
    example = task.examples("train")[2]
    assert task.prompt(example) == [{"role": "user", "content": f"Complete: {example['question']}"}]


# --- the program in a completion ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1", "```python\nx = 0\n```"), "x = 1\n"),
        ("<answer>```python\nx = 1\n```\nor\n```python\nx = 2\n```</answer>", "x = 2\n"),
        ("<answer>\n```python\nx = 1\n", "x = 1\n"),
        ("```python\nx = 1\n```\n<answer>see above</answer>", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 1\n```\nprints\n```\n1\n```", "1\n"),
        ("```python\ndef f(): pass\n```\nprints\n```\n1\n```", "def f(): pass\n"),
        ("<answer>```python\nclass A: pass\n```\nor\n```python\nA()\n```</answer>", "class A: pass\n"),
        ("- so:\n  ```python\n  import x\n  x.y\n  ```", "import x\nx.y\n"),
        ("\ufeffx = 1<|endoftext|>", "x = 1"),
        ("<answer>x = 1</answer>", "x = 1"),
        ("<answer></answer>", None),
        ("    return 1\n", "    return 1\n"),
        ("", None),
        ("<answer>\n```python\n```\n</answer>", None),
    ],
)
def test_where_the_program_is_found(completion: str, program: str | None) -> None:
    assert find_program(completion) == program


def test_reading_is_quick_on_long_nonsense() -> None:
    many = "```python\n x\n```" * 9000
    for text in (
        "<answer>" * 20000,
        "```python\n" * 20000,
        "`" * 100000,
        "```" + "x" * 100000,
        many,
        " " * 99999,
    ):
        find_program(text)


@pytest.mark.parametrize("kind", [HumanEval, MBPP])
def test_a_program_that_crashes_the_parser_is_no_python(kind: type[Coding], tmp_path: Path) -> None:
    """Without the limit of length this ends the test run: the interpreter's compiler overflows its stack."""
    task = make(kind, tmp_path)
    crash = "    return [x " + "for x in y " * 50000 + "]"
    for example in (task.examples("heldout")[0], task.examples("train")[2]):
        for text in (crash, fenced(crash), fenced(f"def f():\n{crash}")):
            assert task.measure(example, text) == {"accuracy": 0.0, "tests": 0.0}
            assert task.reward(example, text)["tests"] == 0.0
    assert not is_blocked(crash)
    assert parse_program("x" * LONGEST) is not None
    assert parse_program("x" * (LONGEST + 1)) is None


@pytest.mark.parametrize(
    ("head", "unit", "tail"),
    [
        ("[x ", "for x in y ", "]"),
        ("async def f():\n  return [x ", "async for x in y ", "]"),
        ("if a: pass\n", "elif a: pass\n", ""),
        ("", "a if b else ", "c"),
        ("", "-", "1"),
        ("", "not ", "1"),
        ("x", ".a", ""),
        ("x", "()", ""),
        ("x", "**x", ""),
        ("", "f(", "1"),
        ("", "lambda:", "1"),
        ("", "x=", "1"),
    ],
)
def test_no_program_of_allowed_length_crashes_it(head: str, unit: str, tail: str) -> None:
    program = head + unit * ((LONGEST - len(head + tail)) // len(unit)) + tail
    parse_program(program)
    compiles(program)


@pytest.mark.parametrize("reward", ["intended", "released"])
@pytest.mark.parametrize(
    ("completion", "format_", "tests"),
    [
        ("```python\ndef double(x): return 2 * x\n```", 0.0, 1.0),
        ("<answer>def double(x): return 2 * x</answer>", 0.0, 0.0),
        ("<answer>\n```\ndef double(x): return 2 * x\n```\n</answer>", 0.0, 0.0),
        ("<answer>\n```python\ndef double(x): return 2 * x\n```", 0.0, 1.0),
        ("def double(x): return 2 * x", 0.0, 0.0),
        (fenced("def double(x): return 3 * x"), 0.5, 1 / 3),
        ("", 0.0, 0.0),
    ],
    ids=["no tags", "no block", "no python block", "never closed", "bare", "wrong", "empty"],
)
def test_rewards_of_both_kinds(
    reward: str, completion: str, format_: float, tests: float, tmp_path: Path
) -> None:
    task = make(MBPP, tmp_path, reward=reward)
    example = task.examples("train")[2]
    assert task.reward(example, completion) == {"format": format_, "tests": tests}


def test_rewards_differ_for_blocked_modules_and_for_what_is_no_python(tmp_path: Path) -> None:
    intended, released = make(MBPP, tmp_path), make(MBPP, tmp_path, reward="released")
    example = intended.examples("train")[2]
    imports = fenced("import os\ndef double(x): return 2 * x")
    assert intended.reward(example, imports) == {"format": 0.5, "tests": 1.0}
    assert released.reward(example, imports) == {"format": 0.0, "tests": 0.0}
    assert released.measure(example, imports)["accuracy"] == 1.0, "a rule of the reward, not of the measure"
    nonsense = fenced("I would double it.")
    assert intended.reward(example, nonsense) == {"format": 0.0, "tests": 0.0}
    assert released.reward(example, nonsense) == {"format": 0.5, "tests": 0.0}


@pytest.mark.parametrize(
    ("program", "blocked"),
    [
        ("import os", True),
        ("import os.path as p", True),
        ("def f():\n    from subprocess import run", True),
        ("import math, sys", True),
        ("__import__('os')", True),
        ("import math  # system, os", False),
        ("from osmosis import x", False),
        ("print(' os')", False),
        ("import os(", False),
    ],
)
def test_blocked_modules(program: str, blocked: bool) -> None:
    assert is_blocked(program) == blocked


def test_reward_and_measure_share_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = make(MBPP, tmp_path)
    example = task.examples("train")[2]
    runs = []
    run = task.cage().run
    monkeypatch.setattr(task.cage(), "run", lambda *a: runs.append(a) or run(*a))
    task.reward(example, task.target(example))
    task.measure(example, task.target(example))
    assert len(runs) == 1


# --- what the user gives -----------------------------------------------------------------------------


def test_bad_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"reward='luck' is out of range; allowed: one of: intended, released"
    ):
        MBPP(reward="luck")
    with pytest.raises(ValueError, match=r"parser='d1' is out of range; allowed: one of: fenced"):
        HumanEval(parser="d1")
    for setting in (
        {"isolation": "some"},
        {"isolation": "user id"},
        {"wall_seconds": 0.0},
        {"memory_mb": 0},
        {"workers": -1},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(setting))}=.* is out of range; allowed"):
            MBPP(**setting)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="split='dev' is unknown; allowed: train, validation"):
        MBPP().examples("dev")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MBPP, {"test_list": "assert f()"}, r"mbpp, task_id 900: test_list must be a list of assertions"),
        (MBPP, {"test_list": []}, r"test_list must be a list of assertions, not \[\]"),
        (HumanEval, {"test": "def check(:"}, r"humaneval, heldout, row 1: its tests can't be read"),
        (HumanEval, {"test": "x = 1"}, r"humaneval, heldout, row 1: its tests can't be read: .*check"),
        (
            HumanEval,
            {"test": "def check(candidate):\n    pass"},
            r"humaneval, heldout, row 1: it has no tests",
        ),
    ],
)
def test_bad_rows_are_named(kind: type[Coding], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = [{**(FUNCTIONS if kind is HumanEval else PROBLEMS)[0], **change}]
    with pytest.raises(InputError, match=message):
        kind(path=write(tmp_path / "bad.jsonl", rows)).examples("heldout")


def test_training_goes_without_rows_that_have_no_tests(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    untested = {**KODCODE[0], "test": "from solution import risers"}
    task = MBPP(train_path=write(tmp_path / "some.jsonl", [KODCODE[0], untested, KODCODE[1]]))
    assert len(task.examples("train")) == 2
    assert "1 of 3 training rows are left out, as row 2: it has no tests" in caplog.text
    with pytest.raises(InputError, match="mbpp, train, row 1: it has no tests"):
        MBPP(train_path=write(tmp_path / "none.jsonl", [untested])).examples("train")


def test_lines_of_saved_generations_that_tell_of_nothing(tmp_path: Path) -> None:
    task = make(MBPP, tmp_path)
    assert task.example_of({"task_id": 901, "generation": "x"})["task_id"] == 901
    assert task.example_of({"task_id": "901"})["task_id"] == 901
    with pytest.raises(InputError, match=r"needs `example`, or a `task_id` .* the line has task_id, .* 77"):
        task.example_of({"task_id": 77})
    with pytest.raises(InputError, match="the line has answer"):
        task.example_of({"answer": 1})


def test_nothing_runs_before_a_program_is_scored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Looking at data or prompts needs no cage; scoring refuses where there is none."""

    def refuse(_: str) -> str:
        raise InputError("programs can't be walled in here")

    monkeypatch.setattr("spg.sandbox.host.best_level", refuse)
    task = MBPP(path=write(tmp_path / "test.jsonl", PROBLEMS))
    example = task.examples("test")[0]
    assert task.prompt(example)
    with pytest.raises(InputError, match="can't be walled in"):
        task.measure(example, task.target(example))


def test_packed_files(tmp_path: Path) -> None:
    packed = tmp_path / "test.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    assert read(packed, ["a"]) == [{"a": 1}, {"a": 2}]
    (tmp_path / "test.csv.gz").write_bytes(gzip.compress(b"a\n1\n"))
    assert read(tmp_path / "test.csv.gz", ["a"]) == [{"a": "1"}]
    for content in (b"no gzip", gzip.compress(b'{"a": 1}')[:-6], gzip.compress(b"{")):
        packed.write_bytes(content)
        with pytest.raises(InputError, match=r"test\.jsonl\.gz can't be read"):
            read(packed, ["a"])
    with pytest.raises(InputError, match=r"\.gz is unknown; one of \.json"):
        read(tmp_path / "test.parquet.gz", ["a"])


def test_a_folder_may_hold_packed_files(tmp_path: Path) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in PROBLEMS)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    assert len(MBPP(path=str(tmp_path)).examples("heldout")) == len(PROBLEMS)
    write(tmp_path / "test.jsonl", PROBLEMS)
    with pytest.raises(InputError, match="has 2 files named test"):
        MBPP(path=str(tmp_path)).examples("heldout")


def test_some_of_the_held_out_problems(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", PROBLEMS * 2)
    task = MBPP(path=path, eval_size=1)
    assert [len(task.examples(split)) for split in ("validation", "test", "heldout")] == [1, 1, 2]
    assert task.examples("heldout") == MBPP(path=path).examples("heldout")[:2]


def test_the_list_of_blocked_modules_is_not_the_defence() -> None:
    assert "os" in BLOCKED
    assert not is_blocked('eval("__im" + "port__(\'os\')")'), "which is why there is a cage"
