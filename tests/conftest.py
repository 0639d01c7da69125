"""Where CI=true nothing may be skipped but what needs an accelerator: a skipped test there is a failed gate.

A shell that starts the gates in the background has them ignore ctrl-C, and so would everything that a test starts to
interrupt it: that is undone here.
"""

from __future__ import annotations

import os
import signal

import pytest

_skipped: list[str] = []

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _note(report: pytest.TestReport | pytest.CollectReport, keywords: object) -> None:
    if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in (keywords or ()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped.append(f"{report.nodeid or 'collection'}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report, report.keywords)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report, None)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("CI") == "true" and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get("CI") == "true":
        terminalreporter.section("skipped although CI=true", red=True)
        for line in _skipped:
            terminalreporter.line(line)
