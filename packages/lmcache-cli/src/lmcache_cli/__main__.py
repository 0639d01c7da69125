"""Entry of the `lmcache` command: the guard first, then the command; every ending becomes an exit status here."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status (see errors.ExitStatus).

    Args:
        argv: the words after `lmcache`; those of the process when None.
    """
    try:
        return _run(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    from lmcache_cli import _distribution, errors

    try:
        _distribution.check()
    except errors.InstallConflict as conflict:
        print(f"lmcache: {conflict}", file=sys.stderr)
        return errors.ExitStatus.CONFLICT
    from lmcache_cli import app

    return app.run(words)


if __name__ == "__main__":
    sys.exit(main())
