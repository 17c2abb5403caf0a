"""The help text lists what there is to choose, read from conf/ and docstrings alone."""

import re

import pytest

from trainkit.launch.door import enter
from trainkit.launch.menu import catalogue, groups, menu
from trainkit.launch.preflight import check
from trainkit.launch.sources import CONF

TEXT = menu()


def test_it_fits_100_columns_and_is_plain():
    assert max(len(line) for line in TEXT.splitlines()) <= 100
    assert "\033" not in TEXT
    assert re.sub(r"\033\[\d*m", "", menu(bold=True)) == TEXT
    assert menu(bold=True) != TEXT


def test_groups_stand_in_the_order_of_the_default_run():
    listed = re.findall(r"^  - (\w+): ", (CONF / "config.yaml").read_text(), re.MULTILINE)
    assert groups()[: len(listed)] == listed
    assert re.findall(r"^(\w+)=$", TEXT, re.MULTILINE) == groups()


def test_every_option_has_a_line_and_the_default_a_mark():
    for file in CONF.glob("*/*.yaml"):
        section = TEXT.split(f"\n{file.parent.name}=\n")[1].split("\n\n")[0]
        assert re.search(rf"^  [ *] {re.escape(file.stem)}( |$)", section, re.MULTILINE), file
    assert re.search(r"^  \* adamw +\S", TEXT, re.MULTILINE)
    assert re.search(r"^    sgd +\S", TEXT, re.MULTILINE)


def test_every_top_level_key_has_its_comment():
    assert re.search(r"^    mode +train \| eval \| sample \| convert \| export", TEXT, re.MULTILINE)
    for key in ("name", "seed", "resume", "init_from", "plugins"):
        assert re.search(rf"^    {key}( |$)", TEXT, re.MULTILINE)


def test_the_catalogue_reads_docstrings_and_papers():
    by_name = {(entry.group, entry.option): entry for entry in catalogue()}
    peri = by_name["norm", "peri"]
    assert peri.line.startswith("Peri-LN (Kim et al., ICML 2025, arXiv:2502.02732): norms on the input")
    assert peri.arxiv == "2502.02732"
    assert "Peri-LN: norms on the input and on the output of every sublayer" in TEXT
    assert by_name["norm", "lns"].arxiv == "2502.05795"  # its node stands below `norm:` in a @package _global_ file
    assert all(entry.line for entry in catalogue() if (entry.group, entry.option) in by_name and entry.group == "norm")


@pytest.mark.slow
def test_the_examples_are_right():
    for line in re.findall(r"python run\.py (.*?)  ", TEXT.split("Groups")[0]):
        words = line.split()
        if not any(word.startswith("hydra.searchpath") for word in words):
            check(words)


def test_help_wins_over_a_mistake_beside_it(capsys):
    with pytest.raises(SystemExit) as left:
        enter(["norm=perl", "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.rstrip("\n") == TEXT
