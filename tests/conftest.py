import signal
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        type=Path,
        default=Path(__file__).parent / "vectors",
        help="directory of golden .npz files for tests/conformance (default: tests/vectors)",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the figures of tests/test_faults.py, once its tests are over in whatever process they ran."""
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.getreports(kind)]
    rows = [text for report in reports for name, text in report.user_properties if name == "faults"]
    if rows:
        terminalreporter.section("kills")
        for row in dict.fromkeys(rows):
            terminalreporter.line(str(row))


@pytest.fixture
def interruptible():
    """Ctrl-C is heard, also where the tests were started in the background of a script, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
