"""The cage: right programs pass, hostile ones neither pass nor harm, nothing is left behind."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from spg.core.errors import InputError
from spg.sandbox import host
from spg.sandbox.host import NAMESPACES, NONE, UID, USER, Cage, CageError, Outcome
from tests.helpers import ROOT

RIGHT = "def f(x):\n    return x + 1\n"
TEST = "from solution import f\nassert f(1) == 2\nassert f(-1) == 0\n"


def new_cage(**settings: object) -> Cage:
    """Return a cage with short limits, or skip the test where this machine has none."""
    try:
        return Cage(**{"wall_seconds": 2.0, "memory_mb": 256, **settings})  # type: ignore[arg-type]
    except InputError as error:
        pytest.skip(str(error))


def at_level(level: str, monkeypatch: pytest.MonkeyPatch) -> Cage:
    """Return a cage of one kind of isolation, or skip the test where this machine has not got it."""
    cage = Cage(wall_seconds=1.0, memory_mb=256, isolation="none")
    cage.level = level
    for interpreter in (sys.executable, "/usr/bin/python3"):
        monkeypatch.setattr(sys, "executable", interpreter)
        try:
            if cage.run("import fractions\nassert __import__('sys').version_info >= (3, 11)").passed[0]:
                return cage
        except RuntimeError as error:
            pytest.skip(f"{level}: {error}")
    pytest.skip(f"{level}: the interpreter's library can't be read by other users here")


def strangers() -> list[str]:
    """Return the files in public folders that belong to a user id without a name."""
    known = {entry.pw_uid for entry in pwd.getpwall()}
    places = [Path(place) for place in ("/tmp", "/var/tmp", "/dev/shm") if Path(place).is_dir()]
    return sorted(str(f) for place in places for f in place.iterdir() if f.lstat().st_uid not in known)


def processes() -> list[str]:
    """Return the command lines of the cages of this process that are alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode()
            except OSError:
                continue
            if str(host.SCRIPT) in line and f'"parent": {os.getpid()}' in line:
                found.append(f"{entry.name}: {line}")
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """After each test no process is left, no file in the folder for such, no mount and no descriptor."""
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def state() -> tuple[object, ...]:
        mounts = Path("/proc/self/mounts").read_text()
        shared = [name for name in os.listdir("/dev/shm") if name.startswith("spg")]
        return mounts, shared, len(os.listdir("/proc/self/fd")), strangers()

    before = state()
    yield
    assert processes() == []
    assert list(scratch.iterdir()) == []
    assert state() == before


def test_right_and_wrong_programs() -> None:
    cage = new_cage()
    outcome = cage.run(RIGHT, [TEST])
    assert (outcome.kind, outcome.passed, outcome.error) == ("passed", (True,), "")
    outcome = cage.run(
        "def f(x):\n    return x + 2\nprint('seen')", [TEST, "from solution import f", "1 / 0"]
    )
    assert (outcome.kind, outcome.passed) == ("failed", (False, True, False))
    assert outcome.error.startswith("AssertionError")
    assert outcome.output == "seen\n"
    for broken in ("def f(:", "raise ValueError('no')", "1 / 0", "import nowhere", "", "x = input()"):
        assert cage.run(broken, [TEST]).kind == "failed", broken


def test_a_run_without_tests_passes_only_where_the_program_loads() -> None:
    cage = new_cage(wall_seconds=0.5)
    for program, kind in {RIGHT: "passed", "1 / 0": "failed", "while True: pass": "timeout"}.items():
        outcome = cage.run(program, [])
        assert (outcome.kind, outcome.passed) == (kind, ())
    assert cage.run("import os\nos._exit(0)", []).kind == "killed"


def test_it_is_quick() -> None:
    cage = new_cage()
    assert min(cage.run(RIGHT, [TEST]).seconds for _ in range(5)) < 0.5


def test_each_test_finds_the_program_as_it_was_loaded() -> None:
    """A test that leaves, hangs or changes what is global does not hide the others."""
    program = (
        "import os, sys\nseen = []\n"
        "def f(x):\n"
        "    seen.append(x)\n"
        "    if x == 1: os._exit(0)\n"
        "    if x == 2: sys.exit(0)\n"
        "    while x == 3: pass\n"
        "    return len(seen)\n"
    )
    tests = [f"from solution import f\nassert f({x}) == 1" for x in (0, 1, 2, 3, 4, 5)]
    outcome = new_cage().run(program, tests)
    assert outcome.passed == (True, False, False, False, True, True)
    assert outcome.seconds < 4


def test_many_tests() -> None:
    assert new_cage(wall_seconds=20.0).run(RIGHT, [TEST] * 200).kind == "passed"


# --- what crosses between tests and program ----------------------------------------------------------


def programs(text: str) -> dict[str, str]:
    """Return the programs of a text by the names in the lines that open them."""
    parts = [part.partition("\n") for part in text.split("\n== ")[1:]]
    return {name: program for name, _, program in parts}


VALUES = r"""
import collections, datetime, decimal, enum, fractions
def same(x): return x
def kinds():
    point = collections.namedtuple("point", "a b")
    return [
        None, True, -2**70, 0.1, float("inf"), 1 + 2j, "\u00e9\ud800", b"a", (1, [2]), {1}, frozenset({2}),
        {"a": (1,), 2: None}, range(3), collections.deque([1]), collections.Counter("aab"), point(1, 2),
        collections.OrderedDict(a=1), collections.defaultdict(int, a=1), decimal.Decimal("1.10"),
        fractions.Fraction(1, 3), datetime.date(2024, 2, 29), datetime.datetime(2024, 1, 1, 2), int,
        datetime.timedelta(1, 2, 3),
    ]
def sort(xs): xs.sort()
def grow(d): d["new"] = d.pop("old")
def turn(m):
    for row in m: row.reverse()
def count(n):
    for i in range(n): yield i
def twice(g): return lambda x: g(g(x))
def logged(g):
    import functools
    @functools.wraps(g)
    def inner(*a, **k): return ["logged", g(*a, **k)]
    return inner
def refuse(x): raise Odd("no " + x)
class Odd(ValueError): pass
def change(x, *, k=None):
    x[0].append([1])
    if k is not None: k["a"] = [True]
    if len(x[0]) > 2: raise KeyError("k", (1, None))
    return x[0]
def ordered(*pairs): return collections.OrderedDict(pairs)
def views(d): return d.keys(), d.values(), d.items()
def total(xs): return sum(xs)
def first(n, xs): return [x for _, x in zip(range(n), xs)]
def kind_of(x): return type(x).__name__
def drain(g): return list(g())
def pair(a, b): return Point(a, b)
Point = collections.namedtuple("Point", "x y")
class LRU(collections.OrderedDict):
    def __init__(self, n): super().__init__(); self.n = n
    def put(self, k, v):
        self[k] = v
        if len(self) > self.n: self.popitem(last=False)
class Pile(list):
    def top(self): return self[-1]
class Color(str, enum.Enum):
    RED = "red"
def colors(): return [Color.RED]
LIMIT = 7
class Wire:
    _connection, _number, _line = 1, 2, 3
class Stack:
    kind = "stack"
    def __init__(self, *items): self.items = list(items)
    def push(self, x): self.items.append(x); return self
    def __len__(self): return len(self.items)
    def __eq__(self, other): return isinstance(other, Stack) and self.items == other.items
    def __add__(self, other): return Stack(*self.items, *other.items)
    def __iter__(self): return iter(self.items)
    def __getitem__(self, i): return self.items[i]
    def __contains__(self, x): return x in self.items
    def __str__(self): return f"Stack({self.items})"
"""


CROSSINGS = programs(r"""
== plain
from solution import same
for x in [1, 'a', None, [1, (2, {3})], {'k': {1: b'v'}}, 1e300, -0.0, range(2)]:
    assert same(x) == x and type(same(x)) is type(x)
== long and odd numbers
import math
from solution import same
assert math.isnan(same(math.nan)) and same(10**5000) == 10**5000
== kinds
import collections, datetime, decimal, fractions
from solution import kinds
assert kinds() == [
    None, True, -2**70, 0.1, float('inf'), 1 + 2j, '\u00e9\ud800', b'a', (1, [2]), {1}, frozenset({2}),
    {'a': (1,), 2: None}, range(3), collections.deque([1]), {'a': 2, 'b': 1}, (1, 2), {'a': 1}, {'a': 1},
    decimal.Decimal('1.10'), fractions.Fraction(1, 3), datetime.date(2024, 2, 29),
    datetime.datetime(2024, 1, 1, 2), int, datetime.timedelta(1, 2, 3),
]
== in place
from solution import sort, grow, turn
x, d, m = [3, 1], {'old': 1}, [[1, 2], [3, 4]]
assert sort(x) is None and x == [1, 3]
grow(d)
turn(m)
assert d == {'new': 1} and m == [[2, 1], [4, 3]]
== in place, deeper
import pytest
from solution import change
row, held = [0], {'a': [1]}
rows = (row, row)
assert change(rows, k=held) is row and row == [0, [1]] and held['a'][0] is True
with pytest.raises(KeyError) as seen:
    change(rows)
assert row == [0, [1], [1]] and seen.value.args == ('k', (1, None))
inner = [7]
outer = [inner, 'x', inner]
change(outer)
assert outer[0] is inner is outer[2] and inner == [7, [1]]
== contain themselves
from solution import same
x = [1]
x.append(x)
assert same(x) is x and x[1] is x
== order counts
import collections
from solution import ordered, same
assert ordered((1, 2), (3, 4)) == collections.OrderedDict([(1, 2), (3, 4)])
assert ordered((1, 2), (3, 4)) != collections.OrderedDict([(3, 4), (1, 2)])
assert same(collections.Counter('aab'))['z'] == 0
== views and iterators
import itertools
from solution import first, same, total, views
keys, values, items = views({'a': 1, 'b': 2})
assert keys == {'a', 'b'} and list(values) == [1, 2] and list(items) == [('a', 1), ('b', 2)]
assert total({1: 2, 3: 4}.keys()) == 4 and total({1: 2, 3: 4}.values()) == 6 and same({}.items()) == set()
assert total(iter([1, 2])) == 3 and total(x * x for x in range(4)) == 14 and total(map(int, '12')) == 3
assert first(3, itertools.count()) == [0, 1, 2]
== other arguments
import array, datetime, pathlib
from solution import kind_of, same, total
step = datetime.timedelta(days=-1, microseconds=5)
for x in (step, array.array('d', [1, 2]), slice(1, None), pathlib.Path('a/b')):
    assert kind_of(x) == type(x).__name__ and same(x) == x
== generators
from solution import count
assert list(count(20000)) == list(range(20000))
assert list(count(3)) == [0, 1, 2] and next(count(1)) == 0 and sum(count(4)) == 6
== functions
from solution import twice, logged
assert twice(lambda x: x * 3)(2) == 18
@logged
def g(a, b=1):
    return a + b
assert g(1, b=2) == ['logged', 3]
== raises
import pytest
from solution import refuse, Odd
for kind in (ValueError, Odd, (KeyError, Odd), Exception):
    with pytest.raises(kind, match='no way') as seen:
        refuse('way')
    assert str(seen.value) == 'no way'
== module
import solution
assert solution.LIMIT == 7 and not hasattr(solution, 'other')
== star
from solution import *
assert same(1) == 1
== objects
from solution import Stack
s = Stack(1).push(2)
assert len(s) == 2 and list(s) == [1, 2] and s[0] == 1 and 2 in s
assert s == Stack(1, 2) and s != Stack() and s + Stack(3) == Stack(1, 2, 3) and str(s) == 'Stack([1, 2])'
assert isinstance(s, Stack) and s.items == [1, 2] and Stack.kind == 'stack' and s and not Stack()
s.items = [9]
assert s.items == [9] and isinstance(Stack(), Stack) and not isinstance(1, Stack)
== attributes like those of the stand-in
from solution import Wire
w = Wire()
assert (w._connection, w._number, w._line) == (1, 2, 3)
== objects that are containers too
from solution import LRU, Pile, Point, pair
cache = LRU(2)
for n in range(3): cache.put(n, str(n))
assert list(cache) == [1, 2] and cache == {1: '1', 2: '2'} and cache != {1: '1'} and cache.n == 2
pile = Pile([1, 2])
pile.append(3)
assert pile.top() == 3 and len(pile) == 3 and pile == [1, 2, 3] and [1, 2, 3] == pile and pile[0] == 1
p = pair(1, 2)
assert p.x == 1 and p == (1, 2) and p == Point(1, 2) and p != (2, 1) and p in [(1, 2)]
a, b = p
assert (a, b) == (1, 2) and isinstance(p, Point)
== tuples without their class
from solution import pair, colors
assert pair(1, 2) == (1, 2) and isinstance(pair(1, 2), tuple) and colors() == ['red']
== enumerations
from solution import Color, colors
assert Color.RED == 'red' and Color.RED.value == 'red' and Color('red') is Color.RED
assert colors() == [Color.RED]
""")


@pytest.mark.parametrize("name", CROSSINGS)
def test_values_cross(name: str) -> None:
    outcome = new_cage().run(VALUES, [CROSSINGS[name]])
    assert outcome.kind == "passed", outcome


@pytest.mark.parametrize(
    "test",
    [
        "from solution import refuse\nrefuse('x')",
        "import pytest\nfrom solution import same\nwith pytest.raises(ValueError):\n    same(1)",
        "import pytest\nfrom solution import refuse\nwith pytest.raises(KeyError):\n    refuse('x')",
        "from solution import missing",
        "from solution import Stack\nassert Stack(1) == [1]",
        "from solution import Stack\nassert Stack(1) == Stack(2)",
        "import pytest\nfrom solution import same\npytest.raises(ValueError, same, 1)",
    ],
)
def test_what_is_wrong_fails(test: str) -> None:
    assert new_cage().run(VALUES, [test]).kind == "failed"


def test_as_much_of_pytest_as_is_used() -> None:
    test = """
import pytest
from solution import f
@pytest.fixture
def one():
    yield 1
@pytest.mark.slow
@pytest.mark.parametrize("x, y", [(1, 2), pytest.param(2, 3, id="b")])
def test_pairs(x, y, one):
    assert f(x) == y and one == 1
def test_near():
    assert f(0.1 + 0.2) == pytest.approx(1.3) and [f(1.0)] == pytest.approx([2.0])
    assert f(1) != pytest.approx(2.1) and f(1) == pytest.approx(2.1, abs=0.2)
class TestAll:
    def setup_method(self):
        self.x = 4
    def test_it(self):
        assert f(self.x) == 5
def test_call():
    assert "int" in str(pytest.raises(TypeError, f, "1").value)
@pytest.mark.parametrize("x", [1, 2])
def test_wrong(x):
    assert f(x) == 2
@pytest.mark.parametrize("x", [])
def test_nothing(x):
    pass
"""
    calls = ("test_pairs", "test_near", "TestAll().test_it", "test_call", "test_wrong", "test_nothing")
    tests = [f"{test}\n__import__('pytest').run({call})" for call in calls]
    assert new_cage().run(RIGHT, tests).passed == (True, True, True, True, False, False)


# --- programs that want to pass without being right --------------------------------------------------


# how a program gets hold of its own end of the connection, which is not a module that it could import
REACH = """
import gc
Connection = next(c for c in gc.get_objects() if type(c) is type and c.__name__ == 'Connection')
"""
CHEATS = programs(
    r"""
== leave
import sys
sys.exit(0)
== leave hard
import os
os._exit(0)
== leave in the call
import os
def f(x): os._exit(0)
== exit in the call
def f(x): raise SystemExit(0)
== at exit
import atexit, os
atexit.register(lambda: os._exit(0))
raise SystemExit
== print a success
print('{"test": 0, "outcome": ["passed", ""]}')
def f(x): print('OK'); return 0
== assertion
import builtins
builtins.AssertionError = type('A', (), {})
def f(x): return 0
== builtins
import builtins
builtins.__dict__.update(abs=lambda x: 0, all=lambda x: True)
def f(x): return 0
== own check
def check(*a): pass
def f(x): return 0
import sys
sys.modules['tests'] = sys.modules['solution']
== always equal
class A:
    def __eq__(s, o): return True
    def __bool__(s): return True
def f(x): return A()
== always equal int
class Always(int):
    def __eq__(s, o): return True
    __hash__ = None
def f(x): return Always(x)
== always equal list
class L(list):
    def __eq__(s, o): return True
def f(x): return L()
== lying class
class C:
    __class__ = int
    def __eq__(s, o): return True
def f(x): return C()
== subtracts to nothing
class A:
    def __sub__(s, o): return 0
    __rsub__ = __sub__
    __eq__ = __sub__
def f(x): return A()
== catch everything
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: continue
== frames
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals['AssertionError'] = Exception
        for name in ('report', 'attempt', 'run_test', 'examine'): frame.f_globals[name] = lambda *a, **k: None
        frame = frame.f_back
    return 0
== search memory
import gc
def f(x):
    found = [o for o in gc.get_objects() if isinstance(o, (dict, list))
        and len(o) < 99 and 'f(-1)' in str(o)]
    return 2 if x == 1 and found else 0
== write to all descriptors
import os
for n in range(64):
    try: os.write(n, b'{"loaded": ["passed", ""]}\n{"test": 0, "outcome": ["passed", ""]}\n')
    except OSError: pass
def f(x): return 0
== answer for the other side
{reach}
Connection.encode = lambda self, v, seen: ['there', 0]
def f(x): return 0
== unreadable answers
{reach}
Connection.encode = lambda self, v: {'a': 1}
def f(x): return 0
== flood the other side
{reach}
def flood(self, message):
    while True:
        self.file.write(b'[' * (1 << 20))
Connection.send = flood
def f(x): return 0
== nest without end
def f(x):
    y = []
    for _ in range(10 ** 5): y = [y]
    return y
== contain oneself
def f(x):
    y = []
    y.append(y)
    return y
== odd characters in an error
def f(x): raise ValueError('\ud800')
== wake up the examiner
import os, signal, time
if os.fork() == 0:
    while True:
        for s in (signal.SIGALRM, signal.SIGINT, signal.SIGCHLD): os.kill(1, s)
def f(x): return 0
== ask back
{reach}
Connection.serve = lambda self, *a: self.send(['ask', 'getattr', ['tuple', []], ['dict', []]])
def f(x): return 0
== trace
import sys
sys.settrace(lambda *a: None)
sys.excepthook = lambda *a: None
def f(x): return 0
== make a class beside the tests
import sys
def f(x):
    frame = sys._getframe()
    while type(line := frame.f_locals.get('self')).__name__ != 'Connection': frame = frame.f_back
    yes, zero = lambda *a: True, lambda *a: 0
    body = {'__eq__': yes, '__call__': yes, '__sub__': zero, '__rsub__': zero}
    return line.ask('call', line.ask('call', type, 'A', (object,), body))
== name a class of the tests
{reach}
encode = Connection.encode
def forged(self, value, seen): return ['class', 'property'] if value == 'p' else encode(self, value, seen)
def f(x):
    Connection.encode = forged
    return 'p'
== ask with what was not lent
{reach}
serve = Connection.serve
def asking(self, *request):
    named = ['dict', ['tuple', []]]
    self.send(['ask', 'call', ['tuple', [['class', 'exec'], 'raise SystemExit']], named, True])
    print(self.receive())
    serve(self, *request)
Connection.serve = asking
def f(x): return 0
== an object in an error
{reach}
Connection.as_argument = lambda self, value: value
class A:
    def __str__(s): return 'x'
def f(x): raise ValueError(A())
== read the tests
import os
def f(x):
    for root, _, files in os.walk('/tmp'):
        for name in files: return 2
    return 2 if x == 1 and os.path.exists('/proc/1/environ') else 0
== kill the first process
import os, signal
for s in (9, 15, 14, 19, 2):
    os.kill(1, s)
def f(x): return 0
== kill everything
import os
os.kill(-1, 9)
""".replace("{reach}", REACH)
)


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(name: str) -> None:
    started = time.monotonic()
    outcome = new_cage(wall_seconds=0.5).run(CHEATS[name], [TEST])
    assert outcome.kind != "passed", outcome
    assert outcome.passed == (False,)
    assert time.monotonic() - started < 8


def test_a_program_reaches_its_end_of_the_connection() -> None:
    """So the cheats above do what they say, and do not fail before they begin."""
    program = REACH + "found = [n for n in ('ask', 'encode', 'serve', 'send', 'as_argument')"
    program += " if hasattr(Connection, n)]\n"
    assert new_cage().run(program, ["from solution import found\nassert len(found) == 5"]).kind == "passed"


def test_the_guest_leaves_no_trace_of_its_own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a program nor a test imports a module of the guest, even if its files can be read."""
    names = [path.stem for path in host.SCRIPT.parent.glob("*.py") if path.stem != "__main__"]
    look = f"""
import importlib, sys
for name in {["guest", "spg", "host", *names]}:
    try:
        importlib.import_module(name)
        raise RuntimeError(name)
    except ImportError:
        pass
folder = {str(host.SCRIPT.parent.parent)!r}
files = {{n: getattr(m, '__file__', None) or '' for n, m in sys.modules.items() if n != '__main__'}}
assert not [name for name, file in files.items() if file.startswith(folder)]
assert not [place for place in [*sys.path, *sys.path_importer_cache] if place.startswith(folder)]
"""
    assert "rpc" in names
    for level in (NAMESPACES, NONE):
        outcome = at_level(level, monkeypatch).run(f"{look}\n{RIGHT}", [f"{look}\n{TEST}"])
        assert outcome.kind == "passed", outcome


def test_an_always_equal_class_passes_only_tests_that_name_it() -> None:
    """What a class of the program says of itself has to be believed; a function's answer has not."""
    program = (
        "class A:\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\ndef f(x): return A()"
    )
    tests = [
        "from solution import A\nassert A() == A()",
        "from solution import f\nassert f(1) == f(2)",
        "from solution import f\nassert f(1) < 5",
        "from solution import f\nassert f(1) == 5",
        "from solution import A\nassert A() == 5",
    ]
    assert new_cage().run(program, tests).passed == (True, False, False, False, False)


FORGE = """
def f(g):
    yes = lambda *a: True
    return g(g(type, 'A', (object,), {'__eq__': yes, '__call__': yes}))
def pass_on(g, x): return g(x)
"""


def test_a_function_that_calls_what_it_is_given_makes_no_class() -> None:
    """What a test hands over may be called with anything that the program sends, hence no classes."""
    tests = [
        "from solution import f\nassert f(lambda h, *a: h(*a)) == 5",
        "from solution import pass_on\nassert pass_on(lambda h: h('7'), int) == 7",
    ]
    assert new_cage().run(FORGE, tests).passed == (False, True)


def test_only_a_class_is_believed() -> None:
    """A test that imports a constant in capitals trusts the program no more for it."""
    always = "class A:\n    def __eq__(s, o): return True\n    def __lt__(s, o): return True\n"
    test = "from solution import {}, f\nassert f(1) < 5"
    tests = [test.format("LIMIT"), test.format("MAX_SIZE"), test.format("A")]
    program = f"{always}LIMIT, MAX_SIZE = A(), A\ndef f(x): return A()"
    assert new_cage().run(program, tests).passed == (False, False, True)


def test_an_error_that_holds_an_object_hides_no_later_test() -> None:
    tests = ["from solution import A, f\nassert f(1) == 2", "from solution import g\nassert g(1) == 2"]
    outcome = new_cage().run(CHEATS["an object in an error"] + "\ndef g(x): return 2\n", tests)
    assert outcome.passed == (False, True)
    assert outcome.error == "ValueError"


# --- programs that want to harm ----------------------------------------------------------------------

SECRET = "a-secret-of-the-parent"
HARM = programs(r"""
== loop
while True: pass
== sleep
import time
time.sleep(1000)
== big int
x = 9 ** 9 ** 9
== fork bomb
import os
while True:
    try: os.fork()
    except OSError: pass
== threads
import threading, time
while True: threading.Thread(target=time.sleep, args=(999,)).start()
== 10 GB
x = bytearray(10 << 30)
== 10 GB bit by bit
x = []
while True: x.append(bytearray(1 << 20))
== 10 GB nowhere
import os
n = os.memfd_create('x')
while True: os.write(n, b'0' * (1 << 20))
== shared memory of System V
import ctypes
assert ctypes.CDLL(None).shmget(0, 300 << 20, 0o1600) != -1
== semaphores
import ctypes
assert ctypes.CDLL(None).semget(0, 1, 0o1600) != -1
== message queue
import ctypes
assert ctypes.CDLL(None).msgget(0, 0o1600) != -1
== keyring
import ctypes, os
assert ctypes.CDLL(None).syscall(250 if os.uname().machine == 'x86_64' else 219, 0, -3, 0) >= 0
== io_uring
import ctypes
assert ctypes.CDLL(None).syscall(425, 1, bytes(120)) >= 0
== calls of 32 bits
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=7)
page.write(b'\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3')  # int 0x80: getpid
assert ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))() > 0
== virtual machine's socket
import socket
socket.socket(40, socket.SOCK_STREAM)
== core file
import resource
assert resource.getrlimit(resource.RLIMIT_CORE)[0] != 1
== remove
import os
os.remove({canary!r})
== read
print(open({canary!r}).read())
== overwrite
open({canary!r}, 'w').write('gone')
== symlink
import os
os.symlink({canary!r}, '/tmp/link')
open('/tmp/link', 'a').write('gone')
== hard link
import os
os.link({canary!r}, '/tmp/link')
== remove all
import os, shutil
for name in os.listdir('/'): shutil.rmtree('/' + name)
1 / 0
== change the library
import heapq
open(heapq.__file__, 'a').write('x = 1')
== open up the library
import os
os.chmod(os.path.dirname(os.__file__), 0o777)
== environment
import os
print(dict(os.environ))
for n in ('self', '1', os.getppid(), {parent}):
    print(open('/proc/%s/environ' % n).read())
== other memory
print(open('/proc/{parent}/mem', 'rb').read(1))
== network
import socket
socket.create_connection(('127.0.0.1', {port}), timeout=1)
== udp
import socket
socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('8.8.8.8', 53))
== abstract socket
import socket
socket.socket(socket.AF_UNIX).connect('\0{abstract}')
== raw socket
import socket
socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)
== print without end
while True: print('x' * 1000)
== kill the parent
import os
os.kill({parent}, 9)
== kill above
import os, signal
for n in range(2, 70000):
    if n != os.getpid():
        try: os.kill(n, 9)
        except ProcessLookupError: pass
1 / 0
== kill groups
import os
os.killpg(0, 9)
== deaf
import signal, time
for s in range(1, 65):
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(1)
== daemon
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: time.sleep(1)
    os._exit(0)
1 / 0
== orphans
import os, time
for _ in range(5):
    if os.fork() == 0:
        os.setsid()
        time.sleep(999)
1 / 0
== shared memory
open('/dev/shm/spg-cage-test', 'w').write('x')
== fill the folder
f = open('/tmp/x', 'wb')
for n in range(1 << 20):
    open('/tmp/%d' % n, 'wb').write(b'0' * (1 << 20))
== many files
for n in range(1 << 20): open('/tmp/%d' % n, 'w').close()
== descriptors
x = [open('/dev/null') for _ in range(10 ** 6)]
== ptrace
import ctypes
libc = ctypes.CDLL(None)
assert libc.ptrace(16, 1, 0, 0) == 0 or libc.ptrace(16, {parent}, 0, 0) == 0
== mount
import ctypes
assert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, None) == 0
== unwall
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
== leave the root
import os
os.chroot('.')
== become root
import os
os.setuid(0)
print(open('/etc/shadow').read())
1 / 0
== raise the limits
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
== segfault
import ctypes
ctypes.string_at(0)
== deep recursion
import sys
sys.setrecursionlimit(10 ** 9)
def g(): g()
g()
== import the project
import spg
== import the project by its path
import sys
sys.path.insert(0, {root!r})
import spg
== import torch
import sys
sys.path += {path!r}
import numpy
== run a shell
import subprocess
subprocess.run(['/bin/sh', '-c', 'true'], check=True)
== run the interpreter
import subprocess, sys
subprocess.run([sys.executable, '-c', ''], check=True)
""")


@pytest.fixture(scope="module")
def listener() -> Iterator[tuple[int, str]]:
    """Listen on a local port and on an abstract address, neither of which a program may reach."""
    import socket

    name = f"spg-cage-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as port, socket.socket(socket.AF_UNIX) as abstract:
        abstract.bind(f"\0{name}")
        abstract.listen()
        yield port.getsockname()[1], name


@pytest.mark.parametrize("name", HARM)
def test_harm_is_not_done(
    name: str, tmp_path: Path, listener: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPG_TEST_SECRET", SECRET)
    canary = tmp_path / "canary"
    canary.write_text(SECRET)
    canary.chmod(0o666)
    tmp_path.chmod(0o777)
    program = HARM[name]
    places = {"canary": str(canary), "parent": os.getpid(), "root": str(ROOT), "path": sys.path}
    for key, value in {**places, "port": listener[0], "abstract": listener[1]}.items():
        program = program.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
    cage = new_cage(wall_seconds=0.5)
    if cage.level == UID:
        pytest.skip("without namespaces the kernel does not wall in: see the guarantees")
    started = time.monotonic()
    outcome = cage.run(f"{program}\n{RIGHT}", [TEST])
    assert outcome.kind != "passed", outcome
    assert time.monotonic() - started < 8
    assert canary.read_text() == SECRET
    assert SECRET not in outcome.output + outcome.error
    assert len(outcome.output) <= host.TAIL


KINDS = {
    "loop": "timeout",
    "10 GB": "memory",
    "print without end": "output",
    "segfault": "killed",
    "10 GB nowhere": "failed",
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_ends(name: str) -> None:
    assert new_cage(wall_seconds=1.0).run(HARM[name], [TEST]).kind == KINDS[name]


def test_a_program_sees_nothing_but_the_library() -> None:
    program = (
        "import os\n"
        "print(sorted(os.environ), os.listdir('/tmp'), os.path.exists('/proc'), os.getcwd())\n"
        "print([n for n in ('/etc/passwd', '/etc/hosts', '/bin/sh', '/home', '/srv', '/var', '/opt', '/run')"
        " if os.path.exists(n)])\n"
        "print(os.listdir('/dev') if os.path.exists('/dev') else '')\n" + RIGHT
    )
    cage = new_cage()
    if cage.level == UID:
        pytest.skip("without namespaces the kernel does not wall in: see the guarantees")
    outcome = cage.run(program, [TEST])
    environment, paths, devices = outcome.output.splitlines()
    assert environment == "['LC_CTYPE', 'PYTHONHASHSEED'] [] False /tmp"
    assert paths == "[]"
    assert sorted(devices[2:-2].split("', '")) == ["null", "urandom", "zero"]
    assert outcome.kind == "passed"


def test_the_library_works() -> None:
    names = (
        "asyncio bisect collections csv datetime decimal fractions functools hashlib heapq itertools json "
    )
    names += (
        "lzma math operator random re sqlite3 ssl statistics string struct threading typing unittest zlib"
    )
    outcome = new_cage().run(f"import {', '.join(names.split())}\n{RIGHT}", [TEST])
    assert outcome.kind == "passed", outcome


def test_the_same_program_ends_the_same() -> None:
    program = "print(list({'a', 'b', 'c', 'd', 'e'}), hash('x'))"
    cage = new_cage()
    assert len({cage.run(program).output for _ in range(3)}) == 1


# --- levels, refusal, limits of the pool -------------------------------------------------------------


@pytest.mark.parametrize("level", [NAMESPACES, USER, UID, NONE])
def test_every_level_runs_and_clears_up(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cage = at_level(level, monkeypatch)
    assert cage.run(RIGHT, [TEST]).kind == "passed"
    for name in ("leave", "always equal", "kill the first process" if level != NONE else "frames"):
        assert cage.run(CHEATS[name], [TEST]).kind != "passed", name
    harm = ["loop", "orphans", "daemon", "deaf", "10 GB", "print without end", "raise the limits"]
    if level in (NAMESPACES, UID):
        harm.append("fork bomb")  # elsewhere root's processes go uncounted
    for name in harm:
        assert cage.run(HARM[name], [TEST]).kind != "passed", name
    assert len(cage.guarantees()) >= 4


@pytest.mark.parametrize("level", [NAMESPACES, USER])
@pytest.mark.parametrize(
    "name",
    "fork bomb/mount/unwall/leave the root/change the library/shared memory of System V/10 GB nowhere/"
    "keyring/virtual machine's socket".split("/"),
)
def test_both_walls_hold(level: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if (level, name) == (USER, "fork bomb") and os.geteuid() == 0:
        pytest.skip("the kernel does not count root's processes, so root never gets this level")
    assert at_level(level, monkeypatch).run(f"{HARM[name]}\n{RIGHT}", [TEST]).kind != "passed"


def test_guarantees_differ_where_the_network_is_open() -> None:
    for level in (NAMESPACES, USER, UID, NONE):
        cage = Cage(isolation="none")
        cage.level = level
        open_ = any("NOT closed" in sentence for sentence in cage.guarantees())
        assert open_ == (level in (UID, NONE))


def test_nothing_runs_where_nothing_walls_in(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An unused user id alone is no wall: it is taken only on request, as `none` is, and both are logged."""
    tried = []

    def broken(program: str, tests: list[str], level: str, *_: object) -> Outcome:
        tried.append(level)
        if level == UID:
            return Outcome("passed", (True,), "", 0.0, "")
        raise CageError("unshare: not permitted")

    monkeypatch.setattr(host, "_best", {})
    monkeypatch.setattr(host, "_warned", set())
    monkeypatch.setattr(host, "_run", broken)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(
        InputError,
        match=r"can't be walled in .*unshare: not permitted.*sysctl.*isolation=user_id.*task\.isolation=none",
    ):
        Cage()
    assert UID not in tried
    assert caplog.text == ""
    for _ in range(2):
        assert Cage(isolation="none").level == NONE
        assert Cage(isolation="user_id").level == UID
    assert [record.message.count("NOT closed") for record in caplog.records] == [1, 1]
    with pytest.raises(RuntimeError, match=r"\(none\) broke, which is not a verdict: unshare"):
        Cage(isolation="none").run(RIGHT)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(host, "_best", {})
    with pytest.raises(InputError, match="user id: only for root"):
        Cage(isolation="user_id")


def test_a_level_that_does_not_wall_in_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel may grant a namespace and yet hide nothing: the probe looks."""
    real = host._run

    def unwalled(program: str, tests: list[str], level: str, *rest: object) -> Outcome:
        return real(program, tests, NONE, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(host, "_best", {})
    monkeypatch.setattr(host, "_run", unwalled)
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    with pytest.raises(InputError, match="user namespace: failed AssertionError: opens"):
        Cage()


def test_the_files_of_an_unused_user_id_are_deleted(monkeypatch: pytest.MonkeyPatch) -> None:
    program = """
import os, stat
for place in ("/tmp", "/dev/shm", "."):
    os.makedirs(place + "/spg-cage-test/inner", mode=0o700)
    open(place + "/spg-cage-test/inner/file", "w").close()
    os.symlink("/etc", place + "/spg-cage-test-link")
    os.chmod(place + "/spg-cage-test/inner", 0)
"""
    cage = at_level(UID, monkeypatch)
    outcome = cage.run(program + RIGHT, [TEST])
    assert outcome.kind == "passed", outcome
    assert not [str(path) for place in ("/tmp", "/dev/shm") for path in Path(place).glob("spg-cage-test*")]
    assert Path("/etc/passwd").exists()


def run_apart(text: str, tmp_path: Path) -> str:
    """Run a text in an interpreter of its own and return what it wrote to the file `said`."""
    said = tmp_path / "said"
    text = f"import os, sys\nfrom spg.sandbox.host import Cage\nsaid = open({str(said)!r}, 'w')\n{text}"
    subprocess.run([sys.executable, "-c", text], cwd=ROOT, timeout=60, check=True)
    return said.read_text()


def test_a_parent_without_standard_files_can_run_programs(tmp_path: Path) -> None:
    text = f"os.closerange(0, 3)\nsaid.write(Cage(isolation='none').run({RIGHT!r}, [{TEST!r}]).kind)"
    assert run_apart(text, tmp_path) == "passed"


def test_a_parent_without_free_descriptors_gets_no_verdict(tmp_path: Path) -> None:
    text = (
        "cage, held = Cage(isolation='none'), []\n"
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))\n"
        "try:\n    while True: held.append(os.open('/dev/null', 0))\nexcept OSError: pass\n"
        f"for _ in range(6):\n    try: said.write(cage.run({RIGHT!r}, [{TEST!r}]).kind + ' ')\n"
        "    except RuntimeError as error: said.write(str('which is not a verdict' in str(error)) + ' ')\n"
        "    os.close(held.pop())\n"
    )
    assert set(run_apart(text, tmp_path).split()) == {"True"}


def test_a_cage_that_breaks_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SCRIPT", Path("/nowhere.py"))
    with pytest.raises(RuntimeError, match=r"not a verdict: it ended without a word; .*nowhere"):
        Cage(isolation="none").run(RIGHT)


def test_no_more_than_workers_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def counted(*_: object) -> Outcome:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return Outcome("passed", (True,), "", 0.0, "")

    monkeypatch.setattr(host, "_run", counted)
    cage = Cage(isolation="none", workers=3)
    with ThreadPoolExecutor(12) as pool:
        assert len(list(pool.map(cage.run, [RIGHT] * 24))) == 24
    assert most == 3


def test_threads_share_a_cage() -> None:
    cage = new_cage(workers=4, wall_seconds=10.0)
    programs = [f"def f(x):\n    return x + {n % 2 + 1}\n" for n in range(12)]
    with ThreadPoolExecutor(12) as pool:
        kinds = [outcome.kind for outcome in pool.map(lambda program: cage.run(program, [TEST]), programs)]
    assert kinds == ["passed", "failed"] * 6


@pytest.mark.parametrize("isolation", ["auto", "none"])
def test_the_cage_dies_with_its_parent(isolation: str, tmp_path: Path) -> None:
    if isolation == "auto":
        new_cage()
    program = "print('up', flush=True)\\nwhile True: pass"
    settings = f"wall_seconds=60.0, isolation={isolation!r}"
    script = f"from spg.sandbox.host import Cage\nCage({settings}).run({program!r}.replace('\\\\n', chr(10)))"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment)

    def caged() -> list[int]:
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    line = (entry / "cmdline").read_bytes().decode()
                except OSError:
                    continue
                if str(host.SCRIPT) in line and f'"parent": {parent.pid}' in line and "60.0" in line:
                    found.append(int(entry.name))
        return found

    def wait_for(count: range) -> list[int]:
        end = time.monotonic() + 20
        while len(found := caged()) not in count and time.monotonic() < end:
            time.sleep(0.05)
        return found

    assert len(wait_for(range(3, 9))) >= 3, "keeper, examiner, candidate"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert wait_for(range(1)) == []
    assert list(tmp_path.iterdir()) == []


def many_runs(count: int) -> None:
    cage = new_cage(wall_seconds=5.0)
    mixed = [RIGHT, CHEATS["leave"], HARM["orphans"], HARM["segfault"], HARM["many files"]]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda n: cage.run(mixed[n % len(mixed)], [TEST]), range(count)))
    assert [outcome.kind == "passed" for outcome in outcomes] == [n % len(mixed) == 0 for n in range(count)]


def test_twenty_runs_leave_nothing() -> None:
    many_runs(20)


@pytest.mark.long
def test_five_hundred_runs_leave_nothing() -> None:
    many_runs(500)
