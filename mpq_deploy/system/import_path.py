"""Nothing is imported from the current folder, where an untrusted model may come with a json.py.

Only ``os`` and ``sys``, which are loaded before any folder is searched; devices use it, too.
"""

from __future__ import annotations

import os
import sys

PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def drop_current_folder() -> None:
    """Take the current folder off the import path, where ``python -m`` and ``-c`` put it.

    It stays where this package itself lies there, in a developer's checkout, and where PYTHONPATH
    names it.
    """
    sys.path[:] = [path for path in sys.path if path]
    try:
        here = os.getcwd()
    except OSError:
        return
    if sys.path and here != PACKAGE and os.path.abspath(sys.path[0]) == here:
        del sys.path[0]


def children_path() -> str:
    """Return a PYTHONPATH for children that import what this process does, from absolute folders.

    (The package may lie in a zip file that was given by a relative path.)
    """
    return os.pathsep.join(os.path.abspath(path) for path in sys.path if path)
