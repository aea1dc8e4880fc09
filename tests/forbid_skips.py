"""A pytest plugin (`-p forbid_skips`): the run fails when anything was skipped that is not marked `gpu`.

A test whose optional package is missing would otherwise pass by never running.
"""

from __future__ import annotations

import pytest

SKIPPED = pytest.StashKey[dict[str, str]]()
"""Reason by node id."""


def pytest_configure(config):
    config.stash[SKIPPED] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    # an expected failure is reported as skipped, too, though it ran
    if report.skipped and not hasattr(report, "wasxfail") and item.get_closest_marker("gpu") is None:
        item.config.stash[SKIPPED][item.nodeid] = _reason(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    if report.skipped:  # importorskip at the head of a module
        collector.config.stash[SKIPPED][collector.nodeid] = _reason(report)
    return report


def pytest_sessionfinish(session):
    if session.config.stash[SKIPPED] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    for nodeid, reason in config.stash[SKIPPED].items():
        terminalreporter.write_line(f"a skip is an error here: {nodeid}: {reason}", red=True)


def _reason(report) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
