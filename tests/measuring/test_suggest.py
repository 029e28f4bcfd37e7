"""Suggestions: a planted shortcut comes first, chance is marked as such."""

import math
import shlex
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from pairs import make_split
from torch import nn

import unbraid
from tiny_networks import SyntheticImages, build
from unbraid.base.errors import RunError, UsageError
from unbraid.cli import app, look
from unbraid.measuring import results
from unbraid.measuring.suggest import suggest


class Marked(SyntheticImages):
    """Images of which one in four, of any class, has a mark: a bright first channel."""

    def __init__(self, n_images):
        super().__init__(n_images, seed=5)
        self.images[::5, 0] += 6.0


class Shortcut(nn.Module):
    """Takes a bright first channel for class 0, by way of channel 1 of its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1, bias=False, dtype=torch.float64)
        self.patterns = nn.Parameter(torch.randn(4, 3, 7, 6, dtype=torch.float64))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(99)
            self.patterns.copy_(torch.randn(4, 3, 7, 6, generator=generator))
            self.layer.weight.zero_()
            for channel, taps in {0: (1, 0.1), 1: (0, 1.0), 2: (2, 0.1), 3: (1, 0.1)}.items():
                self.layer.weight[channel, taps[0]] = taps[1]
            self.layer.weight[1, 2] = 0.3

    def forward(self, x):
        own = torch.einsum("nchw,kchw->nk", x, self.patterns)
        z = torch.relu(self.layer(x).mean((2, 3)) - 0.5)
        return own + torch.cat([90 * z[:, 1:2], torch.zeros_like(own[:, 1:])], 1)


@pytest.fixture(scope="module")
def ablation():
    network = Shortcut()
    split = make_split(network, {0: [[1], [2]], 1: [[0], [3]]})
    masks = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    parts = tuple(replace(p, masks=masks) if p.channel == 1 else p for p in split.channels)
    model2 = unbraid.apply(network, replace(split, channels=parts))
    return unbraid.ablate(model2, Marked(200))


def test_the_command_line_advises_what_edit_takes(ablation, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run's"
    evaluation = Mock(ablation=ablation)
    monkeypatch.setattr("unbraid.running.finished.Run", lambda _: Mock(evaluation=evaluation))

    def told():
        look.suggest(folder)
        return capsys.readouterr().out.splitlines()[-1]

    advice = told()
    assert advice.startswith("Try: unbraid edit ")
    words = shlex.split(advice.removeprefix("Try: unbraid "))
    assert words == ["edit", str(folder), "--off", "1.0", "--out", "DIR"]
    command, bound, *_ = app.parse_args(words, exit_on_error=False)
    assert (command, bound.arguments["off"]) == (look.edit, ["1.0"])
    for nothing in (None, Mock(ablation=None)):
        evaluation = nothing
        with pytest.raises(RunError, match="switched nothing off, so there is nothing to suggest"):
            look.suggest(folder)
    unsure = Mock(rows=[Mock(kind="helps", sure=False, name="1.0")])
    evaluation = Mock(ablation=ablation)
    monkeypatch.setattr(look, "show_table", Mock())
    for rows, last in (
        (unsure.rows, ["None of these is sure to help; more validation images would tell."]),
        ([Mock(kind="elsewhere")], []),
    ):
        monkeypatch.setattr(unbraid, "suggest", Mock(return_value=Mock(rows=rows)))
        look.suggest(folder)
        assert capsys.readouterr().out.splitlines() == last


def test_the_planted_shortcut_comes_first_and_is_sure(ablation):
    first = suggest(ablation).rows[0]
    assert (first.name, first.kind, first.sure) == ("1.0", "helps", True)
    assert first.change > 0.05
    assert "1.0" in str(suggest(ablation)).splitlines()[1]


def test_standard_errors_are_those_of_paired_differences(ablation):
    network = Shortcut()
    data = Marked(200)
    with torch.no_grad():
        before = network(data.images).argmax(1) == torch.tensor(data.targets)
        network.layer.weight[1, 0] = 0
        after = network(data.images).argmax(1) == torch.tensor(data.targets)
    lost = before.double() - after.double()
    (channel,) = (one for one in ablation.channels if one.channel == 1)
    for place, output in enumerate(ablation.classes):
        own = lost[torch.tensor(data.targets) == output.label]
        drops = channel.concepts[0].by_class
        assert math.isclose(drops.accuracy[place], float(own.mean()), abs_tol=1e-12)
        expected = float(own.std() / len(own) ** 0.5)
        assert math.isclose(drops.accuracy_error[place], expected, abs_tol=1e-12)


def test_a_network_without_a_shortcut_has_nothing_sure_to_switch_off():
    network = build("3x3")
    ablation = unbraid.ablate(unbraid.apply(network, make_split(network)), SyntheticImages(24))
    assert [row for row in suggest(ablation).rows if row.sure and row.kind == "helps"] == []


def test_what_matters_elsewhere_names_the_class_and_no_class_of_its_own(ablation):
    rows = [row for row in suggest(ablation, n=99).rows if row.kind == "elsewhere"]
    for row in rows:
        assert row.of not in row.concept.split(", ")
        assert row.change < 0
    assert len(suggest(ablation, n=1).rows) <= 2


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_fewer_than_one_is_refused(ablation, n):
    with pytest.raises(UsageError, match=r"n is .*; give a whole number, 1 or more"):
        suggest(ablation, n=n)


def test_an_older_ablation_is_refused(ablation):
    bare = [
        replace(
            one,
            rest_channel=None,
            concepts=tuple(
                replace(c, by_class=replace(c.by_class, accuracy_error=(), logit_error=()))
                for c in one.concepts
            ),
        )
        for one in ablation.channels
    ]
    with pytest.raises(UsageError, match="older versions"):
        suggest(replace(ablation, channels=tuple(bare)))


def test_a_few_images_that_all_come_out_alike_are_not_sure():
    for n in (2, 5):
        classes = tuple(results.ClassOutput(t, f"class {t}", n, 0.0, 0.0) for t in range(2))
        zero, lost = (0.0, 0.0), (0.0, 1.0)
        drops = results.ClassDrops(zero, lost, zero, zero)
        drop = results.Drop(n, 0.0, 0.0, 0.0, 0.0)
        concept = results.ConceptAblation((0,), "class 0", drop, drop, drop, drops)
        channel = results.ChannelAblation(3, drops, (concept,))
        (row,) = suggest(results.Ablation("layer", classes, (channel,))).rows
        assert (row.kind, row.of, row.change, row.sure) == ("elsewhere", "class 1", -1.0, n == 5)
