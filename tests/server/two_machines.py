"""Two machines with one cable, made of network namespaces: what is "not on this machine" is so by the kernel's word."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from server_running import WAIT_S, eventually

HERE, THERE = "10.77.0.1", "10.77.0.2"

_ASK = """
import http.client, json, sys
for host, port, method, path, headers in json.load(sys.stdin):
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    print(json.dumps([response.status, response.read().decode()]))
    connection.close()
"""


@dataclass(frozen=True)
class Machine:
    """A network namespace, held by a process that sleeps."""

    pid: int

    def enter(self, *command: str) -> list[str]:
        """``command`` as it runs there; the process that is started becomes it."""
        return ["nsenter", "-t", str(self.pid), "-U", "-n", "--preserve-credentials", "--", *command]

    def run(self, *command: str, text: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(
            self.enter(*command), input=text, capture_output=True, text=True, timeout=WAIT_S, check=False, **options
        )

    def ask(self, *requests: tuple[str, int, str, str, dict[str, str]]) -> list[tuple[int, str]]:
        """Status and body of each (host, port, method, path, headers), asked from there."""
        done = self.run(sys.executable, "-c", _ASK, text=json.dumps(requests))
        assert done.returncode == 0, done.stderr
        return [(status, body) for status, body in map(json.loads, done.stdout.splitlines())]


def may_make_machines() -> bool:
    """Whether this user may make network namespaces."""
    return subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """The one at HERE and the one at THERE."""
    with _holder("unshare", "-rn") as one, _holder(*one.enter("unshare", "-n")) as other:
        for machine, command in (
            (one, "link set lo up"),
            (other, "link set lo up"),
            (one, f"link add cable type veth peer name cable netns {other.pid}"),
            (one, f"addr add {HERE}/24 dev cable"),
            (other, f"addr add {THERE}/24 dev cable"),
            (one, "link set cable up"),
            (other, "link set cable up"),
        ):
            done = machine.run("ip", *command.split())
            assert done.returncode == 0, done.stderr
        yield one, other


@contextlib.contextmanager
def _holder(*command: str) -> Iterator[Machine]:
    with subprocess.Popen([*command, "sleep", "600"]) as process:
        try:
            eventually(lambda: _name(process.pid) == "sleep", "the namespace is made")
            yield Machine(process.pid)
        finally:
            process.kill()


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
