"""Help, usage, exit statuses, and commands that other distributions bring."""

from __future__ import annotations

import importlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmcache_cli import __version__, app, plugins

Run = Callable[..., Any]

LEAVES = [
    *("ping kvcache", "ping engine", "describe kvcache", "describe engine", "kvcache clear", "completion"),
    *("query engine", "query kvcache", "quota list", "quota get", "quota set", "quota delete"),
    *("bench engine", "bench compare", "bench sweep"),
]
GROUPS = ["", "ping", "describe", "kvcache", "query", "quota", "bench"]
NEEDS_FULL = (
    "lmcache: `{}` needs the full package: uninstall lmcache-cli, then install the lmcache wheel of the same "
    f"version ({__version__}), or use another environment\n"
)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("words", [*GROUPS, *LEAVES])
def test_every_command_has_help(lmcache: Run, words: str, flag: str) -> None:
    ended = lmcache(*words.split(), flag)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: lmcache {words}".rstrip())


@pytest.mark.parametrize("words", GROUPS)
def test_a_bare_group_prints_its_help_and_fails(lmcache: Run, words: str) -> None:
    ended = lmcache(*words.split())
    assert (ended.status, ended.out) == (2, "")
    assert ended.err == lmcache(*words.split(), "-h").out


def test_the_help_of_the_root_says_of_each_command_what_its_own_help_says(lmcache: Run) -> None:
    listed = lmcache("-h").out
    for name, builtin in app.BUILTIN.items():
        command = getattr(importlib.import_module(f"lmcache_cli.commands.{builtin.module}"), builtin.attribute)
        assert (command.name, command.get_short_help_str(200)) == (name, builtin.summary)
        assert builtin.summary in listed
    assert "server" in listed


def test_the_version(process: Run) -> None:
    ended = process("--version")
    assert (ended.status, ended.out, ended.err) == (0, f"lmcache {__version__}\n", "")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pong", "lmcache: no such command 'pong' (did you mean 'ping'?); see 'lmcache -h'"),
        ("xyzzy", "lmcache: no such command 'xyzzy'; see 'lmcache -h'"),
        ("ping kvcach", "lmcache ping: no such command 'kvcach' (did you mean 'kvcache'?); see 'lmcache ping -h'"),
        ("ping kvcache extra", "lmcache ping kvcache: "),
        ("ping kvcache --format xml", "lmcache ping kvcache: "),
        ("ping kvcache --nope", "lmcache ping kvcache: "),
        ("--nope", "lmcache: "),
        ("ping kvcache --url", "lmcache"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(lmcache: Run, words: str, said: str) -> None:
    ended = lmcache(*words.split())
    assert (ended.status, ended.out) == (2, "")
    assert ended.err.startswith(said)
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("server", ""),
        ("server", "--port 5555 --l1-size-gb 100"),
        ("server", "-h"),
        ("server", "--unheard-of"),
        ("bench server", "--duration 5"),
        ("bench tier", "--l2-path /tmp"),
        ("engine", ""),
        ("demo", ""),
    ],
)
def test_commands_of_the_full_package_say_so_whatever_their_flags(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, name: str, flags: str
) -> None:
    monkeypatch.setattr(plugins, "_entry_points", dict)
    ended = lmcache(*name.split(), *flags.split())
    assert (ended.status, ended.out, ended.err) == (2, "", NEEDS_FULL.format(name))


@pytest.mark.parametrize(
    ("words", "title", "code"),
    [
        ("ping kvcache --nope --format json", "Ping KV Cache", "usage"),
        ("ping kvcache --url ftp://x --format=json", "Ping KV Cache", "usage"),
        ("nonsense --format json", "LMCache", "usage"),
        ("query engine --prompt {x} --url 127.0.0.1:1 --format json", "Query Engine", "usage"),
        ("describe kvcache --url 127.0.0.1:1 --format json", "LMCache KV Cache Service", "unreachable"),
        ("describe kvcache --output /nowhere/x --url 127.0.0.1:1 --format json", "LMCache KV Cache Service", "usage"),
    ],
)
def test_under_json_every_failure_is_exactly_one_document(lmcache: Run, words: str, title: str, code: str) -> None:
    ended = lmcache(*words.split())
    document = json.loads(ended.out)
    assert (document["title"], document["metrics"]["status"], document["error"]["code"]) == (title, "FAIL", code)
    assert ended.err.count("\n") == 1
    assert lmcache(*words.split(), "-q").out == ""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Installs a distribution that brings a command: its entry point's value, and the source of module `brought`."""

    def install(entry_points: str, source: str) -> None:
        info = tmp_path / "brought-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[lmcache.commands]\n{entry_points}\n")
        (tmp_path / "brought.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "brought", raising=False)

    return install


COMMAND = """
import click

@click.command()
@click.option("--port", type=int)
@click.pass_context
def server(ctx, port):
    click.echo(f"serving on {port}")
    ctx.exit(7)
"""


def test_the_full_package_brings_the_server_by_entry_point(lmcache: Run, plugin: Callable[[str, str], None]) -> None:
    plugin("server = brought:server", COMMAND)
    ended = lmcache("server", "--port", "5555")
    assert (ended.status, ended.out) == (7, "serving on 5555\n")


def test_another_distribution_brings_a_command_that_is_imported_only_when_used(
    lmcache: Run, plugin: Callable[[str, str], None]
) -> None:
    plugin("extra = brought:server", COMMAND)
    assert "extra" in lmcache("-h").out
    assert "brought" not in sys.modules
    assert lmcache("extra").status == 7


def test_a_group_takes_members_from_another_distribution(lmcache: Run, plugin: Callable[[str, str], None]) -> None:
    plugin("bench.extra = brought:server", COMMAND)
    assert "extra" in lmcache("bench", "-h").out
    assert "extra" not in lmcache("-h").out
    assert lmcache("bench", "extra", "--port", "1").out == "serving on 1\n"
    assert lmcache("bench.extra").status == 2


def test_a_built_in_command_cannot_be_replaced(lmcache: Run, plugin: Callable[[str, str], None]) -> None:
    plugin("ping = brought:server", COMMAND)
    assert "--port" not in lmcache("ping", "-h").out


@pytest.mark.parametrize(
    ("value", "source"),
    [
        ("brought:server", "import a_module_that_is_gone"),
        ("brought:absent", ""),
        ("gone.away:server", ""),
        ("brought:server", "server = 3"),
    ],
)
def test_a_command_that_cannot_be_loaded_is_one_line(
    lmcache: Run, plugin: Callable[[str, str], None], value: str, source: str
) -> None:
    plugin(f"server = {value}", source)
    ended = lmcache("server")
    assert (ended.status, ended.out) == (1, "")
    assert ended.err.startswith("lmcache: `server` cannot be loaded")
    assert ended.err.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("words", ["ping kvcache", "describe kvcache", "describe engine", "query engine --prompt hi"])
def test_ctrl_c_ends_silently_with_130(words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = [sys.executable, "-m", "lmcache_cli", *words.split(), "--url", url]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, text=True, **pipes) as child:  # type: ignore[call-overload]
            connection, _ = listener.accept()
            with connection:
                connection.recv(100)  # it asks, and waits for the answer that never comes
                child.send_signal(signal.SIGINT)
                out, err = child.communicate(timeout=30)
    assert (child.returncode, out, err.strip()) == (130, "", "")  # a line end follows the terminal's ^C
