"""What benchmarks/planted_parts.py measures, where the answer is known."""

import math

import torch

from planted_parts import OwnPart, average, own_part, strongest


def parts_and_inputs(n=2000):
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(2, n, 20, generator=draw, dtype=torch.float64)
    truth = torch.randn(2, 20, generator=draw, dtype=torch.float64)
    truth[0, 10:] = truth[1, :10] = 0
    return truth, *inputs


def test_concept_channels_that_are_the_parts_are_perfect_in_any_order():
    truth, *inputs = parts_and_inputs()
    for rows in (truth, truth.flip(0)):
        own = own_part(rows, truth, *inputs)
        assert (own.auroc, own.both) == (1, 1)
        assert own.copy < 1e-9


def test_what_does_not_tell_the_parts_is_told_as_such():
    truth, *inputs = parts_and_inputs()
    whole = own_part(truth.sum(0)[None], truth, *inputs)
    assert whole.auroc < 0.7
    assert whole.both == 0
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    mixed = own_part((truth != 0)[:, order] * truth.sum(0), truth, *inputs)
    assert mixed.auroc < 0.9
    assert mixed.copy > 0.3


def test_what_excites_both_parts_most_is_of_neither():
    parts = torch.tensor([[9.0, 9], [8, 0], [0, 8], [1, 1]])
    assert strongest(parts, 2).int().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]


def test_average_leaves_out_what_is_no_number():
    one, other = OwnPart(0.5, 0.5, 0.5, 1), OwnPart(math.nan, 1, 0, 0)
    assert average([one, other]) == OwnPart(0.5, 0.75, 0.25, 0.5)
