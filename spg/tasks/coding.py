"""What the coding tasks share: finding the program in a completion, its unit tests, rewards, the caged run.

Each test is a text of its own that imports the program as `solution`, so that one that fails hides no
other. What a test needs beside the function under test comes from the data set, never from the program.
"""

from __future__ import annotations

import ast
import logging
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from spg.core.errors import InputError
from spg.core.examples import Chat, Example, Template
from spg.core.limits import check_limits
from spg.sandbox.host import Cage, Outcome
from spg.tasks.base import Split, check_choices
from spg.tasks.datasets import Published, load
from spg.tasks.parsing.tags import CLOSE, OPEN
from spg.tasks.prompts import PromptFile, instruct

log = logging.getLogger(__name__)

REWARDS = ("intended", "released")
PARSERS = ("fenced",)
KODCODE = Published("KodCode/KodCode-Light-RL-10K", "train", ("question", "solution", "test"))

FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = ("python", "python3", "py")
NO_TEXT = re.compile(r"\ufeff|<\|(?:endoftext|eot_id)\|>")
# characters of a program: the interpreter's own parser crashes on some that are far longer
LONGEST = 64_000
# SPG's coding reward is not public; these are the modules that the public one of d1 refuses
BLOCKED = frozenset(
    ("os", "sys", "subprocess", "shutil", "socket", "psutil", "ctypes", "pathlib", "builtins")
)


def python_block(text: str, name: str | None = None) -> str | None:
    """Return the preferred ```python block of a text, None where it has none."""
    return preferred([body for kind, body in FENCE.findall(text) if kind.strip().lower() in PYTHON], name)


def preferred(blocks: Sequence[str], name: str | None) -> str | None:
    """Return the last block that defines `name`, else that defines anything, else the last one."""
    blocks = [outdented(block) for block in blocks]
    for wanted in (rf"def {name}\b", r"(?:async )?def |class "):
        found = [block for block in blocks if re.search(rf"^{wanted}", block, re.MULTILINE)]
        if found:
            return found[-1]
    return blocks[-1] if blocks else None


def outdented(block: str) -> str:
    """Return a block of whole statements that stands indented, as in a list, without that indentation."""
    whole = len(block) <= LONGEST and re.match(r"\s+(?:async def|def|class|import|from|@)\b", block)
    return textwrap.dedent(block) if whole else block


def in_answer(completion: str) -> str:
    """Return what follows the last opening answer tag, up to the closing one; empty without a tag."""
    _, opened, inside = completion.rpartition(OPEN)
    return inside.partition(CLOSE)[0] if opened else ""


def program_in(completion: str, name: str | None = None) -> str | None:
    """Return the program that a completion answers with; None where it gives none.

    That is a ```python block in the answer tags, else a block of the text, else what the tags hold, else,
    where the text knows neither tags nor blocks, the text. Of several blocks it is the last one that
    defines `name`, else that defines anything, else the last.
    """
    completion = NO_TEXT.sub("", completion)
    inside = in_answer(completion)
    block = python_block(inside, name)
    if block is None:
        block = preferred([body for _, body in FENCE.findall(completion)], name)
    if block is None:
        block = inside if OPEN in completion else completion
    return block if block.strip() else None


def parsed(program: str) -> ast.Module | None:
    """Return a program's syntax tree, None where it is no Python or longer than `LONGEST`."""
    return _tree(program) if len(program) <= LONGEST else None


def _tree(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def compiles(program: str) -> bool:
    """Whether a program is Python; unlike its tree alone, this refuses a `return` outside of a function."""
    try:
        compile(program if len(program) <= LONGEST else "(", "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_blocked(program: str) -> bool:
    """Whether a program imports a module of `BLOCKED`, or names `__import__`."""
    for node in ast.walk(parsed(program) or ast.Module([], [])):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in BLOCKED for name in names):
            return True
        if isinstance(node, ast.Name) and node.id == "__import__":
            return True
    return False


# --- unit tests as texts -----------------------------------------------------------------------------


def defined(body: Iterable[ast.stmt]) -> dict[str, ast.stmt]:
    """Return the names that statements bind, each with the last statement that does."""
    found: dict[str, ast.stmt] = {}
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[statement.name] = statement
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).split(".")[0]: statement for a in statement.names}
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found |= {n.id: statement for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def borrowed(tests: str, solution: str) -> str:
    """Return the imports that tests without any need: the names of the program that they use.

    What they use of other modules is imported as the reference solution does it.
    """
    tree = _tree(tests) or ast.Module([], [])
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = defined((_tree(solution) or ast.Module([], [])).body)
    imports = (ast.Import, ast.ImportFrom)
    lines = {ast.unparse(s) for n, s in known.items() if n in used and isinstance(s, imports)}
    names = [n for n, s in known.items() if n in used and not isinstance(s, imports)]
    return "\n".join([*sorted(lines), *(f"from solution import {name}" for name in names)])


def has_assert(statement: ast.stmt) -> bool:
    """Whether a statement asserts something that is not constant."""
    asserts = [node for node in ast.walk(statement) if isinstance(node, ast.Assert)]
    return any(not isinstance(node.test, ast.Constant) for node in asserts)


def one_by_one(body: Sequence[ast.stmt]) -> list[list[ast.stmt]]:
    """Return the statements once for each that asserts, without the others that do."""
    asserting = [s for s in body if has_assert(s)]
    shared = [s for s in body if not any(isinstance(node, ast.Assert) for node in ast.walk(s))]
    return [[s for s in body if s in shared or s is which] for which in asserting]


def check_tests(test: str, prompt: str, entry_point: str) -> list[str]:
    """Return the tests of a text that defines `check(candidate)`, with what the prompt defines at hand.

    Raises ValueError where it defines none.
    """
    tree = ast.parse(test)
    check = defined(tree.body).get("check")
    if not isinstance(check, ast.FunctionDef):
        raise ValueError("they define no function check(candidate)")
    given = prompt if _tree(prompt) else ""
    tests = []
    for body in one_by_one(check.body):
        one = _text([*(s for s in tree.body if s is not check), _with_body(check, body)])
        tests.append(f"{given}\n{one}\nfrom solution import {entry_point}\ncheck({entry_point})\n")
    return tests


def _text(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(body, []))


def _with_body(function: ast.FunctionDef, body: list[ast.stmt]) -> ast.FunctionDef:
    return ast.FunctionDef(**{**dict(ast.iter_fields(function)), "body": body}, lineno=1)


def pytest_tests(test: str, solution: str) -> list[str]:
    """Return the tests of a file for pytest: its functions and methods `test...`, else its assertions."""
    tree = ast.parse(test)
    calls = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            calls.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
            calls += [f"{node.name}().{name}" for name in methods if name.startswith("test")]
    if calls:
        head = test if re.search(r"\bsolution\b", test) else f"{borrowed(test, solution)}\n{test}"
        return [f"{head}\n\n__import__('pytest').run({call})\n" for call in calls]
    texts = [_text(body) for body in one_by_one(tree.body)]
    return [f"{borrowed(text, solution)}\n{text}\n" for text in texts]


def imported_names(test: str) -> list[str]:
    """Return what a test file imports from `solution`."""
    nodes = ast.walk(_tree(test) or ast.Module([], []))
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "solution"]
    return [alias.name for node in froms for alias in node.names]


def signatures(solution: str, names: Sequence[str]) -> list[str]:
    """Return how the reference solution declares each of these names that it defines."""
    known = defined((_tree(solution) or ast.Module([], [])).body)
    declared = []
    for name in names:
        node = known.get(name)
        if isinstance(node, ast.FunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            declared.append(f"def {name}({ast.unparse(node.args)}){returns}")
        elif isinstance(node, ast.ClassDef):
            declared.append(f"class {name}")
    return declared


# --- the task ----------------------------------------------------------------------------------------


class Coding(Split):
    """Programs on demand, judged by unit tests in a cage; a subclass names the held-out data.

    Trained on KodCode-Light-RL-10K. reward (paper, G.1): `format` 0.5 if the program stands in a ```python
    block inside the answer tags, and `tests`, the fraction of unit tests passed; both 0 without such a
    block anywhere. `released` is 0 too for a program that imports a module of `BLOCKED`; the paper describes
    it, its code is not public. `intended` has no such list, the cage being the defence, but pays for the
    format only where the program is Python.
    path: file or folder with held-out rows, train_path: with KodCode's; without, the hub. prompt_file:
    prompts of another code base. isolation, wall_seconds, memory_mb: of the cage; workers: runs at once, 0
    for one a CPU. eval_size: held-out rows of each half that are used, None for all. A program of more than
    `LONGEST` characters counts as no Python. Raises InputError for values that are not allowed, and where
    code can't be walled in.
    """

    name: str
    heldout: Published
    shots = 0

    def __init__(
        self,
        reward: str = "intended",
        parser: str = "fenced",
        path: str | None = None,
        train_path: str | None = None,
        prompt_file: str | None = None,
        isolation: str = "auto",
        wall_seconds: float = 8.0,
        memory_mb: int = 1024,
        workers: int = 0,
        eval_size: int | None = None,
    ) -> None:
        check_limits(isolation=isolation, wall_seconds=wall_seconds, memory_mb=memory_mb, workers=workers)
        check_limits(eval_size=eval_size)
        super().__init__()
        check_choices(self.name, reward=(reward, REWARDS), parser=(parser, PARSERS))
        self.reward_name = reward
        self.parser = parser
        self.paths = {"train": train_path, "heldout": path}
        self.eval_size = eval_size
        self.prompts = None if prompt_file is None else PromptFile(prompt_file, ("question",))
        self.workers = workers or os.cpu_count() or 1
        self._new_cage = partial(
            Cage,
            isolation=isolation,
            wall_seconds=wall_seconds,
            memory_mb=memory_mb,
            workers=self.workers,
        )
        self._cage: Cage | None = None
        # reward and measure ask for the same run
        self._run = lru_cache(maxsize=4096)(self._run_anew)

    def _load(self, source: str) -> Sequence[Example]:
        published = KODCODE if source == "train" else self.heldout
        option = "task.train_path" if source == "train" else "task.path"
        rows = load(published, self.paths[source], option)
        if source == "heldout" and self.eval_size is not None:
            rows = rows[: 2 * self.eval_size]
        examples = [self.kodcode(row) if source == "train" else self.example(row) for row in rows]
        problems = [(n, self._problem(example)) for n, example in enumerate(examples, start=1)]
        problems = [(n, problem) for n, problem in problems if problem]
        if problems and (source == "heldout" or len(problems) == len(examples)):
            number, problem = problems[0]
            raise InputError(f"{self.name}, {source}, row {number}: {problem}")
        if problems:
            # training can do without; a held-out set that is not whole would be another one
            log.warning(
                "%d of %d training rows are left out, as row %d: %s", len(problems), len(rows), *problems[0]
            )
        without = {number for number, _ in problems}
        return [example for n, example in enumerate(examples, start=1) if n not in without]

    def _problem(self, example: Example) -> str | None:
        try:
            return None if self.tests(example) else "it has no tests"
        except (SyntaxError, ValueError) as error:
            return f"its tests can't be read: {error}"

    def kodcode(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a row of KodCode is; the question names what the tests will import."""
        question = str(row["question"]).rstrip()
        declared = signatures(row["solution"], imported_names(row["test"]))
        if declared:
            question += "\n\nThe program must define:\n" + "\n".join(declared)
        return {"question": question, "solution": row["solution"], "test": row["test"]}

    def example(self, row: Mapping[str, Any]) -> Example:
        """Return the example that a held-out row is; raises InputError where it can't be used."""
        raise NotImplementedError

    def tests(self, example: Example) -> list[str]:
        """Return an example's unit tests, a program text each; raises ValueError or SyntaxError without."""
        return pytest_tests(example["test"], example["solution"])

    def prompt(self, example: Example) -> str | Chat:
        """Return the chat of `prompt_file`, or one that asks for a ```python block in the answer tags."""
        if self.prompts is not None:
            return self.prompts(example)
        task = "Write a Python program for the task below. Unit tests will call what it defines."
        return instruct(
            task, "the whole program, in one block that opens with ```python", example["question"]
        )

    def demonstrations(self) -> Sequence[Example]:
        return self.examples("train")

    def template(self, example: Example) -> Template | None:
        """Return None: completions are free."""
        return None

    def target(self, example: Example) -> str:
        """Return the reference solution in the published form, without reasoning."""
        program = example["solution"].strip("\n")
        return f"<reasoning>\n</reasoning>\n<answer>\n```python\n{program}\n```\n</answer>\n"

    def reward(self, example: Example, completion: str) -> dict[str, float]:
        """Return `format` and `tests`; a completion without a ```python block earns nothing."""
        program = self.answer(example, completion)
        block = python_block(in_answer(completion), example.get("entry_point"))
        refused = program is None or python_block(completion) is None
        refused = refused or (self.reward_name == "released" and is_blocked(program or ""))
        if refused:
            return {"format": 0.0, "tests": 0.0}
        # an answer that is never closed is no answer in the published form
        well_formed = block is not None and CLOSE in completion.rpartition(OPEN)[2]
        if self.reward_name == "intended":
            well_formed = well_formed and bool(parsed(block or "") and (block or "").strip())
        return {"format": 0.5 * well_formed, "tests": self.fraction(example, program)}

    def answer(self, example: Example, completion: str) -> str | None:
        """Return the program that a completion holds, None where it holds none."""
        return program_in(completion, example.get("entry_point"))

    def measure(self, example: Example, completion: str) -> dict[str, float]:
        """Return accuracy (1 if all tests pass), and the fraction of `tests` that do."""
        passed = self.fraction(example, self.answer(example, completion))
        return {"accuracy": float(passed == 1.0), "tests": passed}

    def fraction(self, example: Example, program: str | None) -> float:
        """Return the fraction of an example's unit tests that a program passes."""
        if program is None:
            return 0.0
        passed = self._run(self.runnable(example, program), tuple(self.tests(example))).passed
        return sum(passed) / len(passed)

    def runnable(self, example: Example, program: str) -> str:
        """Return the text to run for the program of a completion."""
        return program

    def _run_anew(self, program: str, tests: tuple[str, ...]) -> Outcome:
        if parsed(program) is None:
            return Outcome("failed", (False,) * len(tests), "no Python", 0.0, "")
        return self.cage().run(program, tests)

    def cage(self) -> Cage:
        """Return the cage that programs run in; raises InputError where code can't be walled in."""
        if self._cage is None:
            self._cage = self._new_cage()
        return self._cage

    def example_of(self, record: Mapping[str, Any]) -> Example:
        """Return the example that a line of saved generations tells of, by `example` or its `task_id`."""
        example = record.get("example")
        if isinstance(example, Mapping) and {"question", "solution"} <= example.keys():
            return example
        if "task_id" in record:
            for row in self.examples("heldout"):
                if str(row["task_id"]) == str(record["task_id"]):
                    return row
        raise InputError(
            f"a saved completion of {self.name} needs `example`, or a `task_id` of the held-out rows; "
            f"the line has {', '.join(map(str, record))}, with task_id {record.get('task_id')!r}"
        )
