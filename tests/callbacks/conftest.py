import logging

import pytest

from trainkit.launch import console


@pytest.fixture
def said(monkeypatch):
    """The lines that our own log is given."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    monkeypatch.setattr(console.log, "handlers", [handler])
    monkeypatch.setattr(console.log, "level", logging.INFO)
    monkeypatch.setattr(console.log, "propagate", False)
    return lines
