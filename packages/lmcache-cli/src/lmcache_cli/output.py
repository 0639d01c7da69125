"""Where a result goes: stdout, and the file of `--output`, which is replaced as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from lmcache_cli import render
from lmcache_cli.errors import CommandError, UsageFault


class OutputFile:
    """The file of `--output`, or of another ``flag``. Created before the work starts, so that an unwritable path costs
    no request.

    Nothing is left behind while the work runs: the place is tried out, and written only when the text is there (into a
    temporary file beside the target, which is then renamed over it). Devices and pipes are written directly.

    Raises:
        UsageFault: the path cannot be written.
    """

    def __init__(self, path: str, flag: str = "--output") -> None:
        self._path = os.path.realpath(path)
        self._name = f"{flag} {path}"
        try:
            if self._is_plain():
                if os.path.exists(self._path) and not os.access(self._path, os.W_OK):
                    raise PermissionError(None, "Permission denied")
                os.unlink(self._temporary(b""))
            elif os.path.isdir(self._path):
                raise IsADirectoryError(None, "Is a directory")
        except (OSError, ValueError) as error:
            raise UsageFault(f"cannot write {self._name}: {_reason(error)}") from error

    def write(self, text: str) -> None:
        """Replace the file's content with ``text``.

        Raises:
            CommandError: it could not be written after all; the old content is still there.
        """
        data = text.encode("utf-8", "backslashreplace")
        try:
            if self._is_plain():
                temporary = self._temporary(data)
                try:
                    os.replace(temporary, self._path)
                except OSError:
                    os.unlink(temporary)
                    raise
            else:
                with open(self._path, "wb") as file:
                    file.write(data)
        except OSError as error:
            raise CommandError(f"cannot write {self._name}: {_reason(error)}") from error

    def _is_plain(self) -> bool:
        return os.path.isfile(self._path) or not os.path.exists(self._path)

    def _temporary(self, data: bytes) -> str:
        import tempfile  # only where a file is asked for

        folder, name = os.path.split(self._path)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{name[:40]}.", suffix=".tmp", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, self._mode())
        except OSError:
            os.unlink(temporary)
            raise
        return temporary

    def _mode(self) -> int:
        """Permissions of the file that is replaced, else those of any new file (a temporary file has 0600)."""
        with contextlib.suppress(OSError):
            return stat.S_IMODE(os.stat(self._path).st_mode)
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


class Sink:
    """Where the reports of one command go: stdout unless ``quiet``, and ``file`` in the same form, never in colour.

    Args:
        form: one of render.FORMATS.
        is_repeated: whether more than one report follows another on stdout: JSON then takes one line each, and a
            terminal shows the latest alone.
    """

    def __init__(self, form: str, file: OutputFile | None, quiet: bool, is_repeated: bool = False) -> None:
        self.form = form
        self._file = file
        self._quiet = quiet
        self._is_repeated = is_repeated

    def emit(self, report: render.Report) -> None:
        """Deliver one report."""
        try:
            if not self._quiet and sys.stdout is not None:
                if self._is_repeated and self.form == "json":
                    sys.stdout.write(render.to_json(report, indent=None))
                else:
                    if self._is_repeated and sys.stdout.isatty():
                        sys.stdout.write("\x1b[H\x1b[2J")
                    render.write(report, self.form, sys.stdout)
                sys.stdout.flush()
        finally:  # a reader of stdout that went away does not cost the file
            if self._file is not None:
                self._file.write(render.render(report, self.form))


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).rstrip(".")
