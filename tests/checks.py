"""What must hold, each as one function that raises AssertionError where it does not.

Figures are compared with the oracle's, computed image by image from the network itself and never
from records. test_checks.py feeds every function corrupted data and demands that it fails.
"""

import copy
import csv
import itertools
import math
from dataclasses import dataclass

import safetensors.torch
import torch
from torch import Tensor, nn

import oracle
from unbraid import find
from unbraid.finding.pairs import Pair

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MEASURES = ("retention", "leakage", "mimic_error", "silence_error", "auroc")
OVER_ALL = ("auroc_all", "r_precision", "off", "whole_auroc_all", "whole_r_precision")
OF_CHANNEL = ("coverage", "top_coverage", "explained_share")


@dataclass
class Truth:
    """All that the oracle says of a network on some images. N images, C channels of the layer."""

    layer: nn.Module
    labels: list[int]
    x: list[Tensor]  # the layer's input map per image
    z: list[Tensor]  # the layer's output per image, (C, P)
    prediction: list[int]
    relevance: Tensor  # (N, C)
    shares: Tensor  # (N, C)
    input_relevance: Tensor  # (N, C, C_in / G)

    def pooled(self, image):
        return oracle.pooled_input(self.layer, self.x[image])

    def images(self, concept):
        return [n for n, label in enumerate(self.labels) if label in concept]

    def arv(self, concept, channel):
        own = [0 if label in concept else 1 for label in self.labels]
        return oracle.arv(self.input_relevance, own, 0)[channel]

    def cosine(self, channel, class1, class2):
        return oracle.cosine(self.arv((class1,), channel), self.arv((class2,), channel))

    def pairs(self, tau, p, gamma):
        """The published pairs: channel, classes and cosine."""
        used = oracle.uses(self.shares, self.labels, tau, p)
        arvs = [oracle.arv(self.input_relevance, self.labels, t) for t in range(len(used))]
        return oracle.polysemantic_pairs(torch.stack(arvs), used, gamma)

    def pooled_response(self, channel, row, *, rectified=False):
        """Sum over positions of the channel were `row` its weights, (N,); the bias stands."""
        maps = [oracle.channel_map(self.layer, channel, row, x) for x in self.x]
        return torch.stack([(z.clamp(min=0) if rectified else z).sum() for z in maps])


def truth_of(network, dataset, layer="layer"):
    module = network.get_submodule(layer)
    images, labels = zip(*(dataset[n] for n in range(len(dataset))), strict=True)
    xs, zs, logits = zip(*(oracle.layer_io(network, layer, x) for x in images), strict=True)
    every = zip(images, labels, strict=True)
    relevances = [oracle.relevance(network, layer, image, label) for image, label in every]
    return Truth(
        layer=module,
        labels=[int(label) for label in labels],
        x=list(xs),
        z=[oracle._by_channel(module, z) for z in zs],
        prediction=[int(scores.argmax()) for scores in logits],
        relevance=torch.stack(relevances),
        shares=torch.stack([oracle.shares(r) for r in relevances]),
        input_relevance=torch.stack([oracle.channel_input_relevance(module, x) for x in xs]),
    )


def assert_close(actual, expected, tolerance=1e-9):
    """Agree to a tolerance, relative and absolute; nan agrees with nan, shapes must be the same."""
    values = [torch.as_tensor(v, dtype=torch.float64).detach() for v in (actual, expected)]
    torch.testing.assert_close(*values, rtol=tolerance, atol=tolerance, equal_nan=True)


def assert_bit_equal(actual, expected):
    """Same kind, same shape, same bits; even the sign of a zero counts."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    bits = [v.detach().contiguous().flatten().view(torch.uint8) for v in (actual, expected)]
    assert int((bits[0] != bits[1]).sum()) == 0


def assert_rows_explain_output(pooled, rows, bias, n_positions, truth):
    """W[o] . s[n] + P * b[o] = sum_p z[n, o, p], with the s of the group of o."""
    per_group = len(rows) // pooled.shape[1]
    for n, z in enumerate(truth.z):
        for o, row in enumerate(rows):
            s = pooled[n, o // per_group]
            assert_close(row @ s + float(n_positions[n]) * bias[o], z[o].sum())


def assert_responses(responses, channels, rows, truth):
    """(N, R, P): each row answers as its channel would with that row for weights."""
    for n, x in enumerate(truth.x):
        for z, o, row in zip(responses[n], channels, rows, strict=True):
            assert_close(z, oracle.channel_map(truth.layer, o, row, x))


def assert_records(shards, truth, min_share, images):
    """The shards hold exactly these images, in order, each with what the oracle says of it."""
    assert [int(n) for records in shards for n in records.index] == list(images)
    for records in shards:
        assert len(records.share_start) == len(records) + 1
        assert records.share_start[0] == 0
        assert records.share_start[-1] == len(records.share_channel) == len(records.share_value)
        for row, n in enumerate(records.index.tolist()):
            assert records.label[row] == truth.labels[n]
            assert records.prediction[row] == truth.prediction[n]
            assert records.n_positions[row] == truth.z[n].shape[1]
            assert_close(records.pooled[row], truth.pooled(n))
            first, last = records.share_start[row], records.share_start[row + 1]
            shares = torch.where(truth.shares[n] >= min_share, truth.shares[n], 0.0)
            wanted = (truth.shares[n] >= min_share).nonzero().flatten().tolist()
            assert records.share_channel[first:last].tolist() == wanted
            assert_close(records.share_value[first:last], shares[wanted])
            assert_close([records.share_of(o)[row] for o in range(len(shares))], shares)
            if records.input_map is not None:  # as it was, channels first
                x = truth.x[n]
                x = x.reshape(-1, x.shape[-1]).T if isinstance(truth.layer, nn.Linear) else x
                assert_close(records.input_map[row], x)


def assert_same_files(folder1, folder2):
    """Two folders hold the same files, byte for byte."""
    one, other = ({p.name: p.read_bytes() for p in f.iterdir()} for f in (folder1, folder2))
    assert [name for name in {**one, **other} if one.get(name) != other.get(name)] == []


def assert_same_tensors(folder1, folder2):
    """Two scans, of which their shards say that they are different, hold the same, to the bit."""
    names1, names2 = (sorted(path.name for path in f.glob("shard-*")) for f in (folder1, folder2))
    assert names1 == names2 != []
    for name in names1:
        one, other = (safetensors.torch.load_file(f / name) for f in (folder1, folder2))
        assert one.keys() == other.keys()
        for key, tensor in one.items():
            assert_bit_equal(tensor, other[key])


def snapshot(network):
    """All that a scan could leave behind in a network."""
    parameters, modules = dict(network.named_parameters()), dict(network.named_modules())
    return {
        "state": {name: value.clone() for name, value in network.state_dict().items()},
        "modes": {name: module.training for name, module in modules.items()},
        "wants": {name: p.requires_grad for name, p in parameters.items()},
        "gradients": {name: copy.deepcopy(p.grad) for name, p in parameters.items()},
        "hooks": {(name, k): list(getattr(m, k)) for name, m in modules.items() for k in HOOKS},
    }


def assert_untouched(before, after):
    """State, modes, wanted gradients, gradients and hooks are the same, tensors to the bit."""
    for part in ("modes", "wants", "hooks"):
        assert after[part] == before[part], part
    for part in ("state", "gradients"):
        assert after[part].keys() == before[part].keys()
        for name, value in before[part].items():
            if value is None:
                assert after[part][name] is None, name
            else:
                assert_bit_equal(after[part][name], value)


def assert_pairs(pairs, truth, tau, p, gamma):
    """Exactly the published pairs, lowest cosine first, each with its cosine and fractions."""
    expected = {(o, t1, t2): cosine for o, t1, t2, cosine in truth.pairs(tau, p, gamma)}
    found = [(pair.channel, pair.class1, pair.class2) for pair in pairs]
    assert sorted(found) == sorted(expected)
    assert [pair.cosine for pair in pairs] == sorted(pair.cosine for pair in pairs)
    for key, pair in zip(found, pairs, strict=True):
        assert_close(pair.cosine, expected[key])
        for label, use in ((pair.class1, pair.use1), (pair.class2, pair.use2)):
            shares = truth.shares[truth.images((label,)), pair.channel]
            assert_close(use, (shares >= tau).double().mean())


def assert_tau_chosen(tau, shares, labels, n_matter, min_share):
    """The tau by the documented rule, cut behind three digits; what the scan kept is no bound."""
    exact = oracle.automatic_tau(shares, labels, n_matter)
    if exact < min_share:
        assert tau == min_share
        return
    assert tau <= exact
    assert tau == min_share or float(f"{tau:.3g}") == tau
    assert tau + 10.0 ** (math.floor(math.log10(tau)) - 2) > exact


def assert_sensitivity(counted, truth):
    """Every choice of thresholds in the grid, each with the number of published pairs."""
    grid = list(itertools.product(counted.taus, counted.ps, counted.gammas))
    assert [(cell.tau, cell.p, cell.gamma) for cell in counted.cells] == grid
    for cell in counted.cells:
        pairs = truth.pairs(cell.tau, cell.p, cell.gamma)
        n_channels = len({channel for channel, *_ in pairs})
        assert (cell.n_channels, cell.n_pairs) == (n_channels, len(pairs)), cell


def assert_agrees_with_find(counted, scan):
    """Every choice of thresholds finds exactly what `find` finds with them."""
    assert counted.cells
    for cell in counted.cells:
        found = find(scan, tau=cell.tau, p=cell.p, gamma=cell.gamma)
        assert (cell.n_channels, cell.n_pairs) == (len(found.concepts), len(found.pairs)), cell


def assert_grouped(concepts, classes, cosines, gamma):
    """Complete linkage; cosines of ARVs by (class1, class2), where class1 < class2."""
    assert sorted(itertools.chain(*concepts)) == sorted(classes)
    for concept in concepts:
        assert all(cosines[pair] >= gamma for pair in itertools.combinations(sorted(concept), 2))
    for one, other in itertools.combinations(concepts, 2):
        across = [cosines[min(s, t), max(s, t)] for s in one for t in other]
        assert min(across) < gamma, (one, other)


def assert_csv(path, found):
    """The file holds the pairs, in order, with names, figures to the last digit, and no nan."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row, pair in zip(rows, found.pairs, strict=True):
        read = Pair(
            *(int(row[key]) for key in ("channel", "class1", "class2")),
            *(float(row[key]) for key in ("cosine", "use1", "use2")),
            *(float(row[key] or "nan") for key in ("low", "high", "half1", "half2")),
        )
        assert repr(read) == repr(pair)  # nan is like nan
        told = [row[key] for key in ("uncertain", "name1", "name2")]
        names = [found.name(label) for label in (pair.class1, pair.class2)]
        assert told == [str(found.uncertain(pair)), *names]


def assert_published_rows(part, rho, truth):
    """The rows of two concepts, and the residual, are those of the published rule."""
    v1, v2 = (truth.arv(concept, part.channel) for concept in part.concepts)
    original = oracle.own_weights(truth.layer, truth.layer.weight, part.channel).detach().flatten()
    row1, row2, residual = oracle.published_rows(original, v1, v2, rho, len(original) // len(v1))
    assert_close(part.weight, original, 0)
    assert_close(part.rows, torch.stack([row1, row2]), 0)
    assert_close(part.residual_row, residual, 1e-15)  # two equal weights minus one of them
    bias = 0.0 if truth.layer.bias is None else truth.layer.bias[part.channel].item()
    assert part.bias == part.residual_bias == bias


def assert_extended_masks(masks, arvs, rho, taps):
    """(K, J): an input channel belongs to the first concept k with rho * v_k > all other v_l."""
    expected = torch.ones(len(arvs), len(arvs[0]), taps)
    for j in range(len(arvs[0])):
        values = [float(v[j]) for v in arvs]
        for k, value in enumerate(values):
            if all(rho * value > other for other in values[:k] + values[k + 1 :]):
                expected[:, j] = 0.0
                expected[k, j] = 1.0
                break
    assert torch.equal(masks, expected.flatten(1).to(masks))


def assert_published_rho(part, truth):
    """The rho of two concepts is the one that the published criterion chooses."""
    xs = [[truth.x[n] for n in truth.images(concept)] for concept in part.concepts]
    arvs = [truth.arv(concept, part.channel) for concept in part.concepts]
    assert part.info["rho"] == oracle.published_rho(truth.layer, part.channel, *xs, *arvs)[0]


def assert_adds_up(part, tolerance=1e-14):
    """Concept channels minus residual are the original, in weights and in bias."""
    assert_close(part.rows.sum(0) - part.residual_row, part.weight, tolerance)
    assert_close(len(part.concepts) * part.bias - part.residual_bias, part.bias, tolerance)


def assert_same_split(split1, split2):
    """Two splits are the same, tensors to the bit."""

    def assert_same(one, other, names):
        for name in names.split():
            value, expected = getattr(one, name), getattr(other, name)
            if isinstance(value, Tensor):
                assert_bit_equal(value, expected)
            else:
                assert value == expected, name

    assert_same(split1, split2, "layer weights method settings class_names")
    for part1, part2 in zip(split1.channels, split2.channels, strict=True):
        assert_same(part1, part2, "channel concepts info bias masks weight rows residual_row")
    assert split1.clusters.keys() == split2.clusters.keys()
    for number, cluster in split1.clusters.items():
        assert_same(
            cluster, split2.clusters[number], "channel place least centres origin alike named"
        )


def assert_same_outputs(network, other, images):
    """Two networks compute the same, bit for bit, with and without a graph."""
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            assert_bit_equal(other(images), network(images))


def assert_same_input_gradients(network, other, images):
    """The gradient of every logit by the image is the same, up to rounding."""
    gradients = []
    for one in (network, other):
        x = images.clone().requires_grad_()
        sums = one(x).sum(0)
        gradients.append([torch.autograd.grad(y, x, retain_graph=True)[0] for y in sums])
    for expected, actual in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        assert_close(actual, expected, 1e-10)


def _assert_measure(measured, expected):
    """Agree, where a measure that cannot be computed (a channel that is silent) is no number."""
    known = measured is not None and math.isfinite(measured)
    assert known == math.isfinite(expected), (measured, expected)
    if known:
        assert_close(measured, expected)


def assert_evaluation(result, split, truth):
    """Every measure of every concept and channel, rectified ones included, is the oracle's."""
    kinds = {"separation_error_rectified": True, "separation_error": False}
    errors = {name: [] for name in kinds}
    for measured, part in zip(result.channels, split.channels, strict=True):
        assert measured.channel == part.channel
        assert [one.classes for one in measured.concepts] == list(part.concepts)
        images = [truth.images(concept) for concept in part.concepts]
        for name, rectified in kinds.items():
            z, *z_new = (
                truth.pooled_response(part.channel, row, rectified=rectified)
                for row in (part.weight, *part.rows)
            )
            errors[name].append(oracle.separation_error(z, z_new, images))
            _assert_measure(getattr(measured, name), errors[name][-1])
        for k, concept in enumerate(measured.concepts):  # by the responses that are not rectified
            own, others = images[k], images[:k] + images[k + 1 :]
            assert concept.n_images == len(own)
            leakages = [oracle.leakage(z, z_new[k], other) for other in others]
            silences = [oracle.silence_error(z, z_new[k], other) for other in others]
            expected = (
                oracle.retention(z, z_new[k], own),
                sum(leakages) / len(others),
                oracle.mimic_error(z, z_new[k], own),
                sum(silences) / len(others),
                oracle.auroc(z_new[k], own, list(itertools.chain(*others))),
            )
            for measure, value in zip(MEASURES, expected, strict=True):
                _assert_measure(getattr(concept, measure), value)
    for name, values in errors.items():
        if all(map(math.isfinite, values)):
            _assert_measure(result.summary[split.method][name], sum(values) / len(values))


def assert_over_all(result, split, truth):
    """Every measure over all images is the oracle's, and so are their means in the summary."""
    found, of_concepts, n_images = [], [], len(truth.labels)
    for measured, part in zip(result.channels, split.channels, strict=True):
        z, *z_new = (truth.pooled_response(part.channel, row) for row in (part.weight, *part.rows))
        images = [truth.images(concept) for concept in part.concepts]
        for concept, z_k, own in zip(measured.concepts, z_new, images, strict=True):
            others = [n for n in range(n_images) if n not in own]
            expected = (
                oracle.auroc(z_k, own, others),
                oracle.top_part(z_k, own, len(own)),
                oracle.positive_part(z_k, others),
                oracle.auroc(z, own, others),
                oracle.top_part(z, own, len(own)),
            )
            of_concepts.append(expected)
            for measure, value in zip(OVER_ALL, expected, strict=True):
                _assert_measure(getattr(concept, measure), value)
        named = [image for own in images for image in own]
        expected = (
            oracle.positive_part(z, named),
            oracle.top_part(z, named, max(1, n_images // 100)),
            oracle.explained_share(z, z_new),
        )
        found.append(expected)
        for measure, value in zip(OF_CHANNEL, expected, strict=True):
            _assert_measure(getattr(measured, measure), value)
    summary = result.summary[split.method]
    columns = [
        *zip(OVER_ALL, zip(*of_concepts, strict=True), strict=True),
        *zip(OF_CHANNEL, zip(*found, strict=True), strict=True),
    ]
    for name, values in columns:
        known = [value for value in values if math.isfinite(value)]
        if not name.startswith("whole") and known:
            _assert_measure(summary[name], sum(known) / len(known))


def assert_published_table(ratios, part, k, truth, tau):
    """Mean and median part of each new channel in the original, over images of concept k."""
    images = truth.images(part.concepts[k])
    rows, shares = (*part.rows, part.residual_row), truth.shares[images, part.channel]
    xs = [truth.x[n] for n in images]
    table = oracle.published_table(truth.layer, part.channel, rows, xs, shares, tau)
    expected = list(table.values()) if (shares >= tau).any() else []
    for ratio, entry in zip(ratios, expected, strict=True):
        assert not math.isnan(entry["mean"])
        assert_close([ratio.mean, ratio.median], [entry["mean"], entry["median"]])
