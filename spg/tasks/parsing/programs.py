"""Programs in completions and unit tests as texts: find, read and rewrite Python source."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Sequence

from spg.tasks.parsing.tags import CLOSE, OPEN

FENCE = re.compile(r"```([^\n`]*)\n(.*?)(?:```|\Z)", re.DOTALL)
PYTHON = ("python", "python3", "py")
NO_TEXT = re.compile(r"\ufeff|<\|(?:endoftext|eot_id)\|>")
# characters of a program; the parser of Python crashes on some much longer ones
LONGEST = 64_000
# SPG's coding reward is not public; these are the modules that the public reward of d1 refuses
BLOCKED = frozenset(
    ("os", "sys", "subprocess", "shutil", "socket", "psutil", "ctypes", "pathlib", "builtins")
)


def python_block(text: str, name: str | None = None) -> str | None:
    """Return the preferred ```python block of a text, or None if it has none."""
    return prefer_block([body for kind, body in FENCE.findall(text) if kind.strip().lower() in PYTHON], name)


def prefer_block(blocks: Sequence[str], name: str | None) -> str | None:
    """Return the last block that defines `name`, else the last that defines anything, else the last."""
    blocks = [dedent_block(block) for block in blocks]
    for wanted in (rf"def {name}\b", r"(?:async )?def |class "):
        found = [block for block in blocks if re.search(rf"^{wanted}", block, re.MULTILINE)]
        if found:
            return found[-1]
    return blocks[-1] if blocks else None


def dedent_block(block: str) -> str:
    """Return a block of whole statements without its common indentation, such as that of a list item."""
    whole = len(block) <= LONGEST and re.match(r"\s+(?:async def|def|class|import|from|@)\b", block)
    return textwrap.dedent(block) if whole else block


def answer_part(completion: str) -> str:
    """Return the text after the last opening answer tag, up to the closing one; empty without a tag."""
    _, opened, inside = completion.rpartition(OPEN)
    return inside.partition(CLOSE)[0] if opened else ""


def find_program(completion: str, name: str | None = None) -> str | None:
    """Return the program of a completion, or None if there is none.

    It is a ```python block in the answer tags, else a block anywhere, else the content of the tags, else
    the text if it has neither tags nor blocks. Of several blocks it is the last one that defines `name`,
    else the last one that defines anything, else the last one.
    """
    completion = NO_TEXT.sub("", completion)
    inside = answer_part(completion)
    block = python_block(inside, name)
    if block is None:
        block = prefer_block([body for _, body in FENCE.findall(completion)], name)
    if block is None:
        block = inside if OPEN in completion else completion
    return block if block.strip() else None


def parse_program(program: str) -> ast.Module | None:
    """Return the syntax tree of a program, or None if it is not Python or longer than `LONGEST`."""
    return _tree(program) if len(program) <= LONGEST else None


def _tree(text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def compiles(program: str) -> bool:
    """Return whether a program compiles. This refuses a `return` outside a function, which a tree allows."""
    try:
        compile(program if len(program) <= LONGEST else "(", "solution.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def is_blocked(program: str) -> bool:
    """Return whether a program imports a module of `BLOCKED`, or names `__import__`."""
    for node in ast.walk(parse_program(program) or ast.Module([], [])):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        if any(name.split(".")[0] in BLOCKED for name in names):
            return True
        if isinstance(node, ast.Name) and node.id == "__import__":
            return True
    return False


def find_definitions(body: Iterable[ast.stmt]) -> dict[str, ast.stmt]:
    """Return the names that statements define, each with the last statement that defines it."""
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


def imports_for(tests: str, solution: str) -> str:
    """Return the imports that tests without imports need: the names of the program that they use.

    Names from other modules are imported as in the reference solution.
    """
    tree = _tree(tests) or ast.Module([], [])
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    known = find_definitions((_tree(solution) or ast.Module([], [])).body)
    imports = (ast.Import, ast.ImportFrom)
    lines = {ast.unparse(s) for n, s in known.items() if n in used and isinstance(s, imports)}
    names = [n for n, s in known.items() if n in used and not isinstance(s, imports)]
    return "\n".join([*sorted(lines), *(f"from solution import {name}" for name in names)])


def has_assert(statement: ast.stmt) -> bool:
    """Return whether a statement asserts something that is not constant."""
    asserts = [node for node in ast.walk(statement) if isinstance(node, ast.Assert)]
    return any(not isinstance(node.test, ast.Constant) for node in asserts)


def split_by_assertion(body: Sequence[ast.stmt]) -> list[list[ast.stmt]]:
    """Return one copy of the statements for each assertion, without the other assertions."""
    asserting = [s for s in body if has_assert(s)]
    shared = [s for s in body if not any(isinstance(node, ast.Assert) for node in ast.walk(s))]
    return [[s for s in body if s in shared or s is which] for which in asserting]


def tests_of_check(test: str, prompt: str, entry_point: str) -> list[str]:
    """Return the tests of a text that defines `check(candidate)`; they can use the definitions of the prompt.

    Raises:
        ValueError: if the text does not define it.
    """
    tree = ast.parse(test)
    check = find_definitions(tree.body).get("check")
    if not isinstance(check, ast.FunctionDef):
        raise ValueError("they define no function check(candidate)")
    given = prompt if _tree(prompt) else ""
    tests = []
    for body in split_by_assertion(check.body):
        one = _text([*(s for s in tree.body if s is not check), _with_body(check, body)])
        tests.append(f"{given}\n{one}\nfrom solution import {entry_point}\ncheck({entry_point})\n")
    return tests


def _text(body: list[ast.stmt]) -> str:
    return ast.unparse(ast.Module(body, []))


def _with_body(function: ast.FunctionDef, body: list[ast.stmt]) -> ast.FunctionDef:
    return ast.FunctionDef(**{**dict(ast.iter_fields(function)), "body": body}, lineno=1)


def pytest_tests(test: str, solution: str) -> list[str]:
    """Return the tests of a pytest file: its functions and methods `test...`, else its assertions."""
    tree = ast.parse(test)
    calls = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
            calls.append(node.name)
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            methods = [m.name for m in node.body if isinstance(m, ast.FunctionDef)]
            calls += [f"{node.name}().{name}" for name in methods if name.startswith("test")]
    if calls:
        head = test if re.search(r"\bsolution\b", test) else f"{imports_for(test, solution)}\n{test}"
        return [f"{head}\n\n__import__('pytest').run({call})\n" for call in calls]
    texts = [_text(body) for body in split_by_assertion(tree.body)]
    return [f"{imports_for(text, solution)}\n{text}\n" for text in texts]


def imported_names(test: str) -> list[str]:
    """Return the names that a test file imports from `solution`."""
    nodes = ast.walk(_tree(test) or ast.Module([], []))
    froms = [n for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "solution"]
    return [alias.name for node in froms for alias in node.names]


def signatures(solution: str, names: Sequence[str]) -> list[str]:
    """Return the declarations of those names that the reference solution defines."""
    known = find_definitions((_tree(solution) or ast.Module([], [])).body)
    declared = []
    for name in names:
        node = known.get(name)
        if isinstance(node, ast.FunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            declared.append(f"def {name}({ast.unparse(node.args)}){returns}")
        elif isinstance(node, ast.ClassDef):
            declared.append(f"class {name}")
    return declared
