"""Where configuration files lie, and which groups and options there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hydra._internal.utils import get_args_parser

_PACKAGED = Path(__file__).parent.parent / "conf"
CONF_DIR = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[2] / "conf"

# groups of which no option need be chosen
OPTIONAL = ("experiment", "model/lora", "tuned", "tuned/task", "tuned/method", "preferences")


def folder_of_user(argv: Sequence[str]) -> Path | None:
    """Return the folder of the user's own configuration files that a command line gives (-cd), or None."""
    given = get_args_parser().parse_known_args(list(argv))[0].config_dir
    return None if given is None else Path(given).resolve()


def groups(own: Path | None = None) -> list[str]:
    """Return the names of the config groups, nested ones as `model/lora`.

    Args:
        own: A folder of the user's, whose groups count too.
    """
    found = {str(path.relative_to(CONF_DIR)) for path in CONF_DIR.rglob("*") if path.is_dir()}
    if own is not None and own.is_dir():
        inside = [path for path in own.iterdir() if path.is_dir() and any(path.glob("*.yaml"))]
        found |= {path.name for path in inside if not path.name.startswith((".", "_"))}
    return sorted(found)


def files(group: str, own: Path | None = None) -> list[Path]:
    """Return the files of a group's options by name; one of the user's takes the place of a shipped one."""
    folders = [CONF_DIR, *([] if own is None else [own])]
    found = {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}
    return [found[name] for name in sorted(found)]


def group_choices(argv: Sequence[str]) -> list[str]:
    """Write choices as Hydra reads them: an option of a nested group with `/`, none as `~group`."""
    own = folder_of_user(argv)
    found = []
    for line in argv:
        key, equals, value = line.partition("=")
        nested = key.replace(".", "/")
        is_group = any(folder.joinpath(nested).is_dir() for folder in (CONF_DIR, own) if folder is not None)
        if equals and "." in key and is_group and not value.startswith("{"):
            line = f"{nested}={value}"
        if line in [f"{name}=null" for name in OPTIONAL]:
            line = f"~{line.removesuffix('=null')}"
        found.append(line)
    return found
