"""Puts NIXL into an environment without what its packages require: gigabytes of CUDA and torch that POSIX never loads.

Usage: ``tier_env.py PYTHON``.
"""

from __future__ import annotations

import sys

from environments import pip

NIXL = "nixl-cu12>=0.9"

if __name__ == "__main__":
    pip(sys.argv[1], "install", "--no-deps", NIXL)
