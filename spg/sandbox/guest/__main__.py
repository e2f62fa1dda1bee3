"""The script that the host starts: load the modules of the guest, hide the import, run the keeper.

The interpreter runs with `-S -P`, so that a program under test can import the standard library only. The
guest's folder is on the path while its modules are loaded, and no longer. They leave `sys.modules` too: a
program that imports `rpc` or `guest` gets the same ImportError as in any other interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from types import ModuleType


def load_keeper() -> ModuleType:
    """Import the keeper and all that it needs, without leaving a module or a path behind."""
    above, name = os.path.split(os.path.dirname(os.path.abspath(__file__)))
    sys.path.append(above)  # last, so that no file beside the guest hides one of the standard library
    try:
        return importlib.import_module(f"{name}.keeper")
    finally:
        sys.path.remove(above)
        for place in [place for place in sys.path_importer_cache if place.startswith(above)]:
            del sys.path_importer_cache[place]
        for loaded in [m for m in sys.modules if m.partition(".")[0] == name]:
            del sys.modules[loaded]
        sys.dont_write_bytecode = True  # until here, compiled modules are kept beside the source, as usual


if __name__ == "__main__":
    keeper = load_keeper()
    keeper.run_and_exit(lambda: keeper.run_keeper(json.loads(sys.argv[1])))
