"""The documentation is complete, its links lead somewhere, and the code that it shows works."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spg import config
from spg.config import source
from spg.config.help import documented_keys
from tests import documents, warm
from tests.helpers import ROOT

DOCS = ROOT / "docs"
PARTS = ("estimator", "masking", "objective", "advantage", "task", "model")
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)")


def _hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()
# pages that are made when the site is built
MADE = {
    "reference/configuration.md",
    "reference/api/index.md",
    *(f"reference/api/{name}.md" for name in HOOKS.packages()),
    *HOOKS.SHARED,
}


class _Loader(yaml.SafeLoader):
    """Reads mkdocs.yml, whose tags for Python objects mean nothing here."""


def _pages(nav: object) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    if isinstance(nav, dict):
        return [page for entry in nav.values() for page in _pages(entry)]
    assert isinstance(nav, list)
    return [page for entry in nav for page in _pages(entry)]


def test_every_page_is_in_the_navigation_and_exists() -> None:
    pages = _pages(yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)["nav"])
    written = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    assert len(pages) == len(set(pages))
    assert set(pages) == written | MADE


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=documents.name_of)
def test_links_lead_to_pages(page: Path) -> None:
    for target, _ in LINK.findall(page.read_text()):
        if not target or target.startswith("http"):
            continue
        place = (page.parent / target).resolve()
        assert place.is_file() or str(place.relative_to(DOCS)) in MADE, target


def test_every_group_and_option_is_in_the_table() -> None:
    text = (DOCS / "guide" / "train.md").read_text()
    for group in config.groups():
        (row,) = re.findall(rf"^\| `{group}` \| (.*?) \|", text, flags=re.MULTILINE)
        for path in (config.CONF_DIR / group).glob("*.yaml"):
            assert path.stem in row, f"{group}={path.stem}"


def test_files_that_pages_name_exist() -> None:
    pattern = r"`((?:spg|conf|tests|docs|sweeps|results|benchmarks|examples)/[\w/.]+\.\w+)`"
    for page in documents.PAGES:
        for name in re.findall(pattern, page.read_text()):
            # tables of results stand beside the page that shows them
            assert (ROOT / name).is_file(), f"{documents.name_of(page)}: {name}"


def test_the_reference_has_every_command_option_and_key() -> None:
    text = HOOKS.configuration()
    for path in config.CONF_DIR.rglob("*.yaml"):
        folder = path.parent.relative_to(config.CONF_DIR)
        if str(folder) != ".":
            assert f"`{folder}={path.stem}`" in text
        if str(folder).startswith(("experiment", "tuned")):
            continue
        for key, _, meaning in documented_keys(path):
            assert f"{key}`" in text
            assert meaning.replace("|", "\\|") in text


def test_the_api_has_every_module() -> None:
    pages = "".join(HOOKS.api(name) for name in HOOKS.packages())
    for path in (ROOT / "spg").glob("*/**/*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if "assets" not in parts and not parts[-1].startswith("_"):
            assert f"::: {'.'.join(parts)}\n" in f"{pages}\n"


def test_pages_on_extending_have_a_class_its_file_and_a_test() -> None:
    for part in PARTS:
        group = "algorithm" if part == "objective" else part
        names = documents.files(DOCS / "extending" / f"{part}.md")
        assert "parts.py" in names
        assert any(name.startswith(f"conf/{group}/") for name in names)
        assert f"test_{part}.py" in names


@pytest.mark.long
def test_code_of_the_pages_on_extending_works(tmp_path: Path) -> None:
    """One project with the parts of all pages: their tests pass, and a run uses them, but no objective."""
    for part in PARTS:
        documents.lay_out(DOCS / "extending" / f"{part}.md", tmp_path)
    lines = [
        "import sys, pytest",
        "failed = pytest.main(['-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '.'])",
        "assert not failed, failed",
        "from spg.train import main",
        "main()",
    ]
    options = "estimator=plain masking=suffix advantage=ranked task=sorting model=looped pretrain.steps=2"
    short = "experiment=quick trainer.threads=1 trainer.max_updates=4 trainer.prompts_per_rollout=2"
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"SPG_CACHE": str(tmp_path / "cache"), "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    line = [sys.executable, "-c", "\n".join(lines), "-cd", "conf", *options.split(), *short.split()]
    done = warm.run(line, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert list(tmp_path.glob("runs/sorting-plain-*/weights.safetensors"))


@pytest.mark.long
def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r'(?:src|href)="(https?://[^"]+\.(?:js|css|woff2?))"', page.read_text())
        assert not loaded, page


def test_names_that_pages_give_exist() -> None:
    """Dotted names of modules, classes and functions in code spans and in code."""
    dotted = re.compile(r"(?<![\w/.-])spg(?:\.[a-z_]\w*)+(?:\.[A-Z]\w*)?(?![\w/*-])")
    for page in documents.PAGES:
        for name in dotted.findall(page.read_text()):
            if (config.CONF_DIR / f"{name.removeprefix('spg.')}.yaml").exists() or name == "spg.train":
                continue  # a command
            try:
                source.find(name)
            except source.UnknownError:
                continue  # a module or package, found
            except source.AbsentError as error:
                raise AssertionError(f"{documents.name_of(page)}: {name}: {error}") from error
