from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--vectors",
        type=Path,
        default=Path(__file__).parent / "vectors",
        help="directory of golden .npz files for tests/conformance (default: tests/vectors)",
    )
