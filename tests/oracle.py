"""Slow reference implementations, written straight from the definitions in METHOD.md.

One image at a time, float64, by autograd and plain loops; one image `x` has no batch dimension.
"""

import copy
import itertools
import math
import statistics

import torch
from torch import nn

RHOS = tuple(i / 20 for i in range(1, 21))  # 0.05, 0.10 ... 1.00
EPS = 1e-5


# Running a layer.


def _copy64(module):
    """A float64 copy in eval mode, so that nothing here can change what was handed in."""
    return copy.deepcopy(module).double().eval().requires_grad_(True)


def _n_groups(layer):
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _by_channel(layer, z):
    """z of one image as (C, P); channels are last in a fully connected layer, else first."""
    if isinstance(layer, nn.Linear):
        z = z.movedim(-1, 0)
    return z.reshape(z.shape[0], -1)


def _run(layer, x):
    """The layer's output for one image, (C_out, P)."""
    return _by_channel(layer, layer(x.unsqueeze(0)).squeeze(0))


def channel_map(layer, o, row, x):
    """z[o, :] of one image, (P,), were `row` (J,) in the place of W[o]; the bias stands."""
    changed = _copy64(layer)
    with torch.no_grad():
        own = own_weights(changed, changed.weight, o)
        own.copy_(row.double().reshape(own.shape))
        return _run(changed, x.double())[o]


def own_weights(layer, weight, o):
    """Those of output channel o among weights as a layer holds them, a view."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight[o]
    n_out, n_in = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    group, within = divmod(o, n_out)
    return weight[group * n_in : (group + 1) * n_in, within]


def rows_of(layer, weight):
    """Weights as a layer holds them, as one row per output channel, (C_out, J)."""
    n_out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    return torch.stack([own_weights(layer, weight, o).flatten() for o in range(n_out)])


# Section 2: notation.


@torch.enable_grad()
def pooled_input(layer, x):
    """s, (G, J): gradient of sum_p z[o,p] with respect to W[o], o each group's first channel."""
    layer = _copy64(layer)
    n_groups = _n_groups(layer)
    z = _run(layer, x.double())
    rows = []
    for group in range(n_groups):
        o = group * (z.shape[0] // n_groups)
        (gradient,) = torch.autograd.grad(z[o].sum(), layer.weight, retain_graph=True)
        rows.append(own_weights(layer, gradient, o).flatten())
    return torch.stack(rows)


@torch.no_grad()
def tap_inputs(layer, x):
    """What each tap meets at each position of one image, (P, G, J): z of rows with one weight."""
    layer, n_groups = _copy64(layer), _n_groups(layer)
    n_out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    n_rows = n_out // n_groups
    n_taps = own_weights(layer, layer.weight, 0).numel()
    one_each = torch.eye(n_taps).double()
    if layer.bias is not None:
        layer.bias.zero_()
    met = []
    for ones in one_each.split(n_rows):
        layer.weight.zero_()
        for group, place in itertools.product(range(n_groups), range(len(ones))):
            own = own_weights(layer, layer.weight, group * n_rows + place)
            own += ones[place].reshape(own.shape)
        met.append(_run(layer, x.double()).unflatten(0, (n_groups, -1))[:, : len(ones)])
    return torch.cat(met, 1).movedim(2, 0)


def spread(layer, inputs):
    """Section 5, Lambda: tap inputs less their mean at up to 64 positions of one image, (M, G, J).

    inputs are those of the layer's runs on the image and its parts, in order.
    """
    met = torch.cat([tap_inputs(layer, x) for x in inputs])
    n = min(64, len(met)) if len(met) > 1 else 0
    return (met - met.mean(0))[[k * len(met) // n for k in range(n)]]


@torch.enable_grad()
def _run_cut(model, layer_name, image):
    """The layer, its input x and its output z as a leaf, with batch, and logits (T,) from z."""
    model = _copy64(model)
    layer, calls = model.get_submodule(layer_name), []

    def cut(_module, args, kwargs, output):
        (x,) = (*args, *kwargs.values())
        # Cloned, because the next module may write into the output.
        calls.append((x.detach().clone(), output.detach().clone().requires_grad_()))
        return calls[-1][1].clone()

    layer.register_forward_hook(cut, with_kwargs=True)
    logits = model(image.double().unsqueeze(0))[0]
    ((x, z),) = calls  # it runs once
    assert len(x) == 1 or isinstance(layer, nn.Linear)
    return layer, x, z, logits


def layer_io(model, layer_name, image):
    """The layer's input x, its output z, and the logits (T,), for one image."""
    _, x, z, logits = _run_cut(model, layer_name, image)
    x, z = (value.detach()[0] if len(value) == 1 else value.detach() for value in (x, z))
    return x, z, logits.detach()


def relevance(model, layer_name, image, label):
    """r[o] = sum_p z[o,p] * d logit_label / d z[o,p], (C_out,)."""
    layer, _, z, logits = _run_cut(model, layer_name, image)
    (gradient,) = torch.autograd.grad(logits[int(label)], z)
    product = z.detach() * gradient
    return _by_channel(layer, product[0] if len(product) == 1 else product).sum(dim=1)


def shares(r):
    """share[o] = r[o] / sum_o max(r[o], 0), (C_out,); all zero if no relevance is positive."""
    positive = sum(max(value, 0.0) for value in r.double().tolist())
    return r.double() / positive if positive else torch.zeros_like(r.double())


@torch.enable_grad()
def channel_input_relevance(layer, x):
    """a[o,i], (C_out, C_in_per_group): input x gradient of sum_p z[o,p] without the bias."""
    layer = _copy64(layer)
    layer.bias = None
    x = x.double().clone().requires_grad_(True)
    z = _run(layer, x)
    n_out, n_groups = z.shape[0], _n_groups(layer)
    rows = []
    for o in range(n_out):
        (gradient,) = torch.autograd.grad(z[o].sum(), x, retain_graph=True)
        per_channel = _by_channel(layer, x.detach() * gradient).sum(dim=1)  # (C_in,)
        group = o // (n_out // n_groups)
        rows.append(per_channel.reshape(n_groups, -1)[group])
    return torch.stack(rows)


def arv(a_per_image, labels, t):
    """ARV[:,t], (C_out, C_in): mean of a, (N, C_out, C_in), over the images of class t."""
    chosen = [a.double() for a, label in zip(a_per_image, labels, strict=True) if int(label) == t]
    return sum(chosen) / len(chosen)


# Section 3: the published procedure.


def uses(shares, labels, tau, p):
    """Step 1, bool (T, C): does channel c matter in at least a fraction p of the images of t?"""
    labels = [int(label) for label in labels]
    n_classes, n_channels = max(labels) + 1, shares.shape[1]
    used = torch.zeros(n_classes, n_channels, dtype=torch.bool)
    for t, c in itertools.product(range(n_classes), range(n_channels)):
        matters = [float(shares[n, c]) >= tau for n, label in enumerate(labels) if label == t]
        used[t, c] = bool(matters) and sum(matters) / len(matters) >= p
    return used


def cosine(v1, v2):
    """The cosine of two vectors; nan if one of them is zero."""
    v1, v2 = v1.double().flatten(), v2.double().flatten()
    norms = math.sqrt(float((v1 * v1).sum())) * math.sqrt(float((v2 * v2).sum()))
    return float((v1 * v2).sum()) / norms if norms > 0 else math.nan


def polysemantic_pairs(arvs, uses, gamma):
    """Step 2: all (channel, t1, t2, cosine), t1 < t2, both using the channel, cosine < gamma."""
    pairs = [
        (c, t1, t2, cosine(arvs[t1, c], arvs[t2, c]))
        for c in range(uses.shape[1])
        for t1, t2 in itertools.combinations(range(len(uses)), 2)
        if uses[t1, c] and uses[t2, c]
    ]
    return [pair for pair in pairs if pair[3] < gamma]


def automatic_tau(shares, labels, n_matter):
    """Largest share that n_matter channels reach in half of the images of half of the classes."""
    labels = [int(label) for label in labels]
    candidates = {float(share) for share in shares.flatten() if share > 0}
    for tau in sorted(candidates, reverse=True):
        n_classes = 0
        for t in set(labels):
            images = [n for n, label in enumerate(labels) if label == t]
            n_matters = [sum(1 for share in shares[n] if float(share) >= tau) for n in images]
            n_images = sum(1 for number in n_matters if number >= n_matter)
            n_classes += 2 * n_images >= len(images)
        if 2 * n_classes >= len(set(labels)):
            return tau
    return 0.0


def published_rows(w_o, v1, v2, rho, taps_per_channel=1):
    """Step 3: the rows (W1, W2, R), each (J,); v1 and v2 hold one value per input channel."""
    w_o = w_o.double().flatten()
    row1, row2, residual = w_o.clone(), w_o.clone(), w_o.clone()
    for j in range(len(w_o)):
        a, b = float(v1[j // taps_per_channel]), float(v2[j // taps_per_channel])
        if rho * a > b:  # the tap is concept 1's
            row2[j] = residual[j] = 0.0
        elif rho * b > a:
            row1[j] = residual[j] = 0.0
    return row1, row2, residual


def published_rho(layer, o, inputs1, inputs2, v1, v2):
    """Step 4: the best rho, the lowest on a tie, and the criterion at every rho."""
    w_o = own_weights(layer, layer.weight, o).detach().flatten()

    def rectified_sum(row, x):
        return sum(max(value, 0.0) for value in channel_map(layer, o, row, x).tolist())

    criterion = {}
    for rho in RHOS:
        rows = published_rows(w_o, v1, v2, rho, len(w_o) // len(v1))[:2]
        criterion[rho] = 0.0
        for inputs, (own, other) in ((inputs1, rows), (inputs2, rows[::-1])):
            ratios = [rectified_sum(own, x) / (rectified_sum(other, x) + EPS) for x in inputs]
            criterion[rho] += sum(ratios) / len(ratios)
    return max(RHOS, key=lambda rho: criterion[rho]), criterion


def published_table(layer, o, rows, inputs, share_o, tau):
    """Step 5: mean and median of sum_p z_new / sum_p z over the images with share >= tau.

    All rows carry the layer's bias: of the residual it is (K - 1) * b, and K is 2.
    """
    original = own_weights(layer, layer.weight, o).detach().flatten()
    chosen = [x for x, share in zip(inputs, share_o, strict=True) if float(share) >= tau]
    table = {}
    for name, row in zip(("concept_1", "concept_2", "residual"), rows, strict=True):
        ratios = [
            float(channel_map(layer, o, row, x).sum() / channel_map(layer, o, original, x).sum())
            for x in chosen
        ]
        table[name] = {
            "mean": sum(ratios) / len(ratios) if ratios else math.nan,
            "median": statistics.median(ratios) if ratios else math.nan,
            "n_images": len(ratios),
        }
    return table


# Section 6: measures. z and z_k are (N,), one value per image of the original channel and of the
# concept channel; images_k and images_l are the indices of the images of concepts k and l.


def _at(values, images):
    return torch.stack([values[int(n)] for n in images]).double()


def _rms(values):
    return (values**2).mean().sqrt()


def retention(z, z_k, images_k):
    """mean_{D_k} z_k / mean_{D_k} z."""
    return (_at(z_k, images_k).mean() / _at(z, images_k).mean()).item()


leakage = retention  # of k on the images of another concept


def mimic_error(z, z_k, images_k):
    """rms_{D_k}(z_k - z) / rms_{D_k}(z)."""
    return (_rms(_at(z_k, images_k) - _at(z, images_k)) / _rms(_at(z, images_k))).item()


def silence_error(z, z_k, images_l):
    """rms_{D_l}(z_k) / rms_{D_l}(z), of k on another concept l."""
    return (_rms(_at(z_k, images_l)) / _rms(_at(z, images_l))).item()


def separation_error(z, z_new, images):
    """Mean of all K mimic errors and all K (K - 1) silence errors of z_k of each concept."""
    errors = [
        (mimic_error if k == other else silence_error)(z, z_k, own)
        for k, z_k in enumerate(z_new)
        for other, own in enumerate(images)
    ]
    return sum(errors) / len(errors)


def auroc(z_k, images_k, images_other):
    """Fraction of pairs (own, other) in which the image of the own concept has the larger z_k."""
    wins = 0.0
    for own, other in itertools.product(_at(z_k, images_k), _at(z_k, images_other)):
        wins += 1.0 if own > other else 0.5 * (own == other).item()
    return wins / (len(images_k) * len(images_other))


def top_part(z_k, images_k, n):
    """Part of the n images with the largest z_k that is in D_k; R-precision where n is N_k.

    Of images with the same z_k that do not all have a place, each has an equal chance of one.
    """
    values, own = [float(value) for value in z_k], {int(image) for image in images_k}
    found = 0.0
    for image in own:
        larger = sum(1 for value in values if value > values[image])
        equal = sum(1 for value in values if value == values[image])
        found += min(1.0, max(0.0, (n - larger) / equal))
    return found / n


def positive_part(z, images):
    """Sum of max(z, 0) over some images, to that over all: coverage, and `off` of the others."""
    positive = [max(float(value), 0.0) for value in z]
    whole = sum(positive)
    return sum(positive[int(image)] for image in images) / whole if whole else math.nan


def explained_share(z, z_new):
    """sum_n min(max(sum_k z_k, 0), max(z, 0)) / sum_n max(z, 0)."""
    above = below = 0.0
    for n in range(len(z)):
        together, whole = sum(float(z_k[n]) for z_k in z_new), max(float(z[n]), 0.0)
        above += min(max(together, 0.0), whole)
        below += whole
    return above / below if below else math.nan


def ablated_logits(model, layer_name, image, o, row, n_biases=0):
    """Logits (T,) for one image, by weights alone: W[o] without `row` (J,), or o without all of it.

    As z = sum_k z_k - z_R, channel o without z_k, whose weights are `row`, has the weights
    W[o] - row, and no bias: K times b, less (K - 1) times b, less b. Without the rest, -z_R, it
    has K biases.
    """
    changed = _copy64(model)
    layer = changed.get_submodule(layer_name)
    with torch.no_grad():
        own = own_weights(layer, layer.weight, o)
        own -= own.clone() if row is None else row.double().reshape(own.shape)
        if layer.bias is not None:
            layer.bias[o] *= n_biases
        return changed(image.double().unsqueeze(0))[0]


# Semantic measures, section 6.


def monosemanticity(activation, embeddings):
    """Mean cosine over pairs of images, weighted by both activations, scaled to 0 ... 1."""
    directed = [n for n in range(len(embeddings)) if embeddings[n].any()]
    a = [float(activation[n]) for n in directed]
    if not a or max(a) == min(a):
        return math.nan
    a = [(value - min(a)) / (max(a) - min(a)) for value in a]
    above = below = 0.0
    for i, j in itertools.combinations(range(len(a)), 2):
        above += a[i] * a[j] * cosine(embeddings[directed[i]], embeddings[directed[j]])
        below += a[i] * a[j]
    return above / below if below else math.nan


def clarity(embeddings):
    """Mean cosine over pairs of images, of those that have a direction."""
    every = [cosine(e1, e2) for e1, e2 in itertools.combinations(embeddings, 2)]
    cosines = [value for value in every if not math.isnan(value)]
    return sum(cosines) / len(cosines) if cosines else math.nan


def pure_distances(embeddings, concept):
    """Mean Euclidean distance over pairs of images of one concept, and of two."""
    distances = {True: [], False: []}
    for i, j in itertools.combinations(range(len(embeddings)), 2):
        pairs = zip(embeddings[i], embeddings[j], strict=True)
        squares = [(float(p) - float(q)) ** 2 for p, q in pairs]
        distances[int(concept[i]) == int(concept[j])].append(math.sqrt(sum(squares)))
    return tuple(sum(found) / len(found) if found else math.nan for found in distances.values())
