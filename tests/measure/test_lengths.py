"""Lengths, counts and root mean squares by part of a network, against sums in float64."""

import math

import pytest
import torch

from trainkit.measure.lengths import counts, labels, lengths, rms

GENERATOR = torch.Generator().manual_seed(0)
GROUPS = {
    "embed": [torch.randn(7, 4, generator=GENERATOR)],
    "blocks.0.attn": [torch.randn(4, 12, generator=GENERATOR), torch.randn(4, generator=GENERATOR)],
    "blocks.0.mlp": [torch.randn(3, 3, generator=GENERATOR)],
    "head": [],
}
MADE_OF = {
    "embed": ["embed"],
    "blocks.0.attn": ["blocks.0.attn"],
    "blocks.0.mlp": ["blocks.0.mlp"],
    "blocks.0": ["blocks.0.attn", "blocks.0.mlp"],
    "head": [],
    "global": list(GROUPS),
}


def numbers(name):
    return [x for label in MADE_OF[name] for t in GROUPS[label] for x in t.double().flatten().tolist()]


def test_lengths_are_roots_of_sums_of_squares():
    found = lengths(GROUPS)
    assert set(found) == set(MADE_OF) == set(labels(GROUPS))
    for name, value in found.items():
        assert float(value) == pytest.approx(math.sqrt(sum(x**2 for x in numbers(name))), rel=1e-6)


def test_counts_and_root_mean_squares():
    assert counts(GROUPS) == {name: len(numbers(name)) for name in MADE_OF}
    found = rms(GROUPS)
    assert set(found) == set(MADE_OF) - {"head"}  # which has no numbers
    for name, value in found.items():
        assert float(value) == pytest.approx(math.sqrt(sum(x**2 for x in numbers(name)) / len(numbers(name))), rel=1e-6)


def test_nothing_has_no_length():
    assert {name: float(value) for name, value in lengths({"a.b": []}).items()} == {"a.b": 0, "a": 0, "global": 0}
    assert rms({"a.b": []}) == {}
