"""Where logits are in what a network puts out: by `--output` and `with_logits`, or told."""

import dataclasses
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import unbraid
from unbraid.base.errors import ModelError
from unbraid.networks.outputs import as_logits, run_network

LOGITS = torch.arange(20.0).reshape(5, 4)
MAP = torch.ones(5, 2, 3, 3)
Two = namedtuple("Two", "features scores")


class PutsOut(nn.Module):
    def __init__(self, output):
        super().__init__()
        self.forward = lambda _: output


PICKED = {
    "list": ([MAP, LOGITS], [1, -1, "1", "-1", "+1"]),
    "keys that look like numbers": ({"0": MAP, "1": LOGITS}, [1, "1"]),
    "keys that are numbers": ({0: MAP, -1: LOGITS}, [-1, "-1"]),
    "key with a dot": ({"a.b": LOGITS, "a": MAP}, ["a.b"]),
    "named tuple": (Two(MAP, LOGITS), ["scores", 1, -1]),
    "parts of parts": ({"out": SimpleNamespace(heads=[MAP, LOGITS])}, ["out.heads.-1"]),
    "logits in a part": ([MAP, {"logits": LOGITS}], ["1.logits", "-1.logits"]),
}
SAID = {
    "out of range": ([MAP, LOGITS], -3, r"has no -3 .* a list; .*: --output 1 \(5, 4\)"),
    "no such key": ({"a": LOGITS, "b": LOGITS}, "c", r"--output a \(5, 4\) or --output b \(5, 4\)"),
    "a map": ([MAP, LOGITS], 0, r"Part 0 .* is a tensor \(5, 2, 3, 3\), not logits .*--output 1"),
    "no part": ([MAP, MAP], -1, r"Part -1 .* no part of it is, so compute them in FILE.py:FUNCTIO"),
    "a row": (LOGITS, -1, "it is logits itself, so leave --output out"),
    "layers stacked": (torch.ones(2, 5, 4), 0, "by a function that unbraid.with_logits takes"),
    "nothing": (None, 0, "it is a NoneType; no part of it is"),
    "a method": ({"a": LOGITS}, "keys", r"has no 'keys' .*: --output a \(5, 4\)"),
}


@pytest.mark.parametrize("kind", PICKED)
def test_with_logits_takes_a_part_by_number_key_or_attribute_which_errors_name(kind):
    output, picks = PICKED[kind]
    for pick in picks:
        assert unbraid.with_logits(PutsOut(output), pick)(LOGITS) is LOGITS
    if kind == "logits in a part":  # which are found of themselves
        assert as_logits(unbraid.with_logits(PutsOut(output), -1)(LOGITS)) is LOGITS
        return
    with pytest.raises(ModelError, match=r"where they are: --output \S+ \(5, 4\), or") as caught:
        as_logits(output)
    place = str(caught.value).partition("--output ")[2].split()[0]
    assert unbraid.with_logits(PutsOut(output), place)(LOGITS) is LOGITS


def test_with_logits_by_a_function_hides_no_error_of_it():
    with pytest.raises(TypeError, match="NoneType"):
        unbraid.with_logits(PutsOut(LOGITS), lambda output: output + None)(LOGITS)


@pytest.mark.parametrize("kind", SAID)
def test_with_logits_of_no_logits_says_what_there_is(kind):
    output, pick, message = SAID[kind]
    with pytest.raises(ModelError, match=message) as caught:
        unbraid.with_logits(PutsOut(output), pick)(LOGITS)
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(slots=True)
class Slotted:
    maps: torch.Tensor
    logits: torch.Tensor


def test_logits_are_found_in_a_dataclass_with_slots_and_in_a_sparse_tensor():
    assert as_logits(Slotted(MAP, LOGITS)) is LOGITS
    assert torch.equal(as_logits(LOGITS.to_sparse()), LOGITS)


@pytest.mark.parametrize(
    ("output", "told"),
    [(LOGITS.long(), "of int64"), (torch.complex(LOGITS, LOGITS), "of complex64")],
)
def test_numbers_that_are_no_fractions_are_no_logits_but_compared(output, told):
    with pytest.raises(ModelError, match=rf"a tensor \(5, 4\) {told}, not logits"):
        as_logits(output)
    rows = run_network(PutsOut(output), torch.ones(5, 3))
    real = torch.view_as_real(output).flatten(1) if output.is_complex() else output
    assert torch.equal(rows, real.to(rows.dtype))
    other = output.clone()
    other[3, 2] += 1
    assert not torch.equal(run_network(PutsOut(other), torch.ones(5, 3)), rows)


def test_single_number_beside_maps_counts_for_every_image():
    rows = run_network(PutsOut((MAP, None, torch.tensor(7.0))), torch.ones(5, 3))
    assert rows.shape == (5, 19)
    assert rows[:, -1].tolist() == [7.0] * 5
    with pytest.raises(ModelError, match="say where they are"):  # of no image
        run_network(PutsOut((MAP, torch.ones(3))), torch.ones(5, 3))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_single_complex_number_beside_maps_is_the_same_for_every_image(n):
    output = {"maps": MAP[:n], "scale": torch.tensor(3 + 4j)}
    rows = run_network(PutsOut(output), torch.ones(n, 3))
    assert rows[:, -2:].tolist() == [[3.0, 4.0]] * n
    assert rows.shape == (n, 20)


@pytest.mark.parametrize("number", [torch.tensor(7.0), torch.tensor(3 + 4j), torch.tensor(7)])
def test_single_number_for_a_whole_batch_is_no_output_of_an_image(number):
    for output in (number, {"loss": number, "scale": number}):
        for n in (2, 3):
            with pytest.raises(ModelError, match="no part of it is"):
                run_network(PutsOut(output), torch.ones(n, 3))
        assert len(run_network(PutsOut(output), torch.ones(1, 3))) == 1  # which has no other image
    of_each = [{"score": number}] * 2  # as detection gives, an image each
    assert run_network(PutsOut(of_each), torch.ones(2, 3)).shape[0] == 2


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_output_is_told_to_be_padded(layout):
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for output in (nested, {"boxes": nested}):
        with pytest.raises(ModelError, match="let it put out a padded one"):
            run_network(PutsOut(output), torch.ones(2, 3))
    with pytest.raises(ModelError, match="output is a nested tensor, not logits"):
        as_logits(nested)


class TwoInputs(nn.Linear):
    def forward(self, x, age):
        return super().forward(x) + age


class Misnamed(nn.Linear):
    def forward(self, x):
        return super().forward(x, x)


def test_network_that_takes_more_than_images_is_told_to_be_wrapped():
    with pytest.raises(ModelError, match=r"'age'.*takes a batch of images and nothing else"):
        run_network(TwoInputs(3, 4), torch.ones(5, 3))
    with pytest.raises(ModelError, match="check size, channels"):  # the error is within
        run_network(Misnamed(3, 4), torch.ones(5, 3))
