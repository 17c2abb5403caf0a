"""A norm layer that nothing uses is said to be so; one that is used, or that nobody asked for, is not."""

import pytest

from tests.menu import build
from trainkit.launch.unused import unused_norm_layer


@pytest.mark.parametrize(
    ("placement", "words", "layer", "said"),
    [
        ("rezero", ["norm=rezero", "norm_layer=dyt"], "dyt", True),
        ("rezero", ["norm=rezero"], "rms", False),
        ("pre", ["norm=pre", "norm_layer=dyt"], "dyt", False),
        ("pre", ["norm_layer=none"], "none", False),
    ],
)
def test_a_layer_that_is_asked_for_and_not_used_is_one_line(placement, words, layer, said):
    choices = [
        "model=gpt",
        "model.depth=2",
        "model.width=16",
        "model.heads=2",
        f"norm={placement}",
        f"norm_layer={layer}",
    ]
    model = build("model", *choices)
    line = unused_norm_layer(words, build("norm_layer", *choices), 16, model)
    assert (line is not None) == said
    if line:
        assert line.startswith("norm_layer=dyt is used by no module")
        assert "\n" not in line
