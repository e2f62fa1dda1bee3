"""Old paths of classes and the new ones, for the config.yaml files and checkpoints of earlier versions."""

from __future__ import annotations

RENAMED: dict[str, str] = {
    "spg.preferences.Preferences": "spg.tasks.preferences.Preferences",
}
