"""The README's catalogue is the menu as it is."""

from trainkit.report.catalogue import README, updated


def test_the_readme_lists_what_there_is():
    text = README.read_text()
    assert updated(text) == text, "run `python -m trainkit.report catalogue`"
