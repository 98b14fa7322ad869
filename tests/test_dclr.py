"""DCLR: its losses and the method against NumPy, gradients, the pools."""

import copy
import functools
import math

import numpy as np
import pytest
import test_fima
import torch
from helpers import (
    assert_gradients,
    assert_trains,
    make_views,
    random,
    same,
    units,
    views_without_colours,
    with_equal_features,
)
from hypothesis import given
from hypothesis import strategies as st

import dclr
import losses

seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 4)
build = functools.partial(test_fima.build, dclr, retrieved=3, delay=2, refresh=4)
SWITCHES = [dict(losses=names) for names in ("vv", "vs", "vd", "vs,vd", "vs,vd,sd", "vv,vs,vd,sd,ac")]
SWITCHES += [dict(search=kind) for kind in ("none", "static", "both")] + [dict(same_view="on", search="none")]
SWITCHES += [dict(decouple=kind) for kind in ("none", "static", "motion")] + [dict(ac_weight=2.0), dict(delay=99)]
SWITCHES += [dict(retrieved=1), dict(retrieved=5), dict(retrieved_weights="uniform")]


def contrast_of(query, positive, keys, temperature):
    """I of each video, (N, D), (N, D) and (V·N, D) → (N,): of its own keys only the positive counts."""
    own = np.arange(len(keys)) % len(query) == np.arange(len(query))[:, None]
    push = np.where(own, 0, np.exp(query @ keys.T / temperature)).sum(1)
    return np.log1p(push / np.exp((query * positive).sum(1) / temperature))


def dual_of(query, key, same_view, temperature):
    pairs = zip(query, key if same_view else key[::-1], strict=True)
    return sum(contrast_of(*pair, np.concatenate(key), temperature).mean() for pair in pairs)


def best_of(scores, count):
    """Where the greatest of each row lie, and their shares of their sum, in which each counts 1e-6 at least."""
    best = np.argsort(-scores, 1)[:, :count]
    weight = np.take_along_axis(scores, best, 1).clip(1e-6)
    return best, weight / weight.sum(1, keepdims=True)


def alignment_of(activation, reference):
    scaled = [[(x - x.min()) / (np.ptp(x) or 1) for x in maps.numpy()] for maps in (activation, reference)]
    return np.abs(np.subtract(*scaled)).mean()


def pool_of(features, activation):
    """Maps (..., C, T, H, W) and their weights (..., T, H, W) → (..., C)."""
    return torch.einsum("...cthw,...thw->...c", features, activation) / activation.sum((-3, -2, -1))[..., None]


@given(seeds, st.integers(1, 6), st.integers(6, 12))
def test_retrieve_takes_the_most_similar_and_weighs_them(seed, count, length):
    query, pool = units(seed, 3, 4), units(seed + 1, length, 4)
    index, weight = losses.retrieve(query, pool, count)
    expected = best_of((query @ pool.T).numpy(), count)
    np.testing.assert_array_equal(index, expected[0])
    np.testing.assert_allclose(weight, expected[1])
    same_index, uniform = losses.retrieve(query, pool, count, "uniform")
    assert torch.equal(same_index, index) and (uniform == 1 / count).all()


def test_what_is_degenerate_gives_finite_losses_weights_and_gradients():
    assert losses.dual_contrast(units(0, 2, 1, 5), units(1, 2, 1, 5), False, 0.1) == 0
    pool = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]])  # of which two are empty
    for weights in ("prior", "uniform"):
        index, weight = losses.retrieve(torch.tensor([[1.0, 0.0]]), pool, 3, weights)
        assert index[0, :2].tolist() == [2, 0] and weight.tolist() == [pytest.approx([0.5, 0.5, 0])]
    constant = torch.full((2, 1, 3, 3), 0.7, requires_grad=True)
    value = losses.activation_alignment(constant, random(0, 2, 1, 3, 3).float())
    assert torch.autograd.grad(value, constant)[0].abs().max() <= 1
    features = random(0, 2, 3, 1, 2, 2).requires_grad_()
    pooled = losses.activation_pool(features, torch.zeros(2, 1, 2, 2, dtype=torch.float64))
    assert (pooled == 0).all() and torch.autograd.grad(pooled.sum(), features)[0].isfinite().all()


@given(seeds, sizes, sizes, sizes, st.floats(0.01, 100), st.floats(-5, 5))
def test_activation_maps_their_alignment_and_pooling(seed, frames, height, width, scale, shift):
    features, other = (random(seed + k, 2, 3, frames, height, width) for k in range(2))
    activation, reference = losses.pixel_activation(features), losses.pixel_activation(other)
    np.testing.assert_allclose(activation, np.abs(features.numpy()).sum(1))
    value = losses.activation_alignment(activation, reference)
    assert value.item() == pytest.approx(alignment_of(activation, reference), abs=1e-12) and 0 <= value <= 1
    if activation[0].numel() > 1:
        torch.testing.assert_close(losses.activation_alignment(activation * scale + shift, reference), value)
    torch.testing.assert_close(losses.activation_pool(features, reference), pool_of(features, reference))
    reference = losses.pixel_activation(other.requires_grad_())
    pooled = losses.activation_pool(features.requires_grad_(), reference)
    (losses.activation_alignment(losses.pixel_activation(features), reference) + pooled.sum()).backward()
    assert features.grad.any() and other.grad is None


def views_at(epoch, **options):
    return views_without_colours(sub_clips=0, **options) | {"epoch": epoch}


def oracle(model, views):
    """The losses of Eq. 16, one clip a forward, in float64, of a model in eval mode, and its pool."""
    model = copy.deepcopy(model).double().eval()
    config, videos, started = model.config, len(views["clip"]), views["epoch"] >= model.config.delay
    pool, result = model.queues["d"].keys.numpy(), {}
    if views["epoch"] % config.refresh == 0:  # no key of the old extractor is left
        test_fima.follow(model)
        pool[:] = 0
    torch.manual_seed(1)
    frames = torch.randint(16, (2, videos))

    def project(head, rows):
        return torch.nn.functional.normalize(head(torch.as_tensor(rows)), dim=-1).numpy()

    def maps_of(encoder, kind):
        """(2, N, C, T, H, W)."""
        found = []
        for view, n in np.ndindex(2, videos):
            clip, color = views["clip"][n, view], views["color"][n, view]
            still = clip[:, frames[view, n], None].expand_as(clip)
            given = {"v": (clip, color[0]), "s": (still, color[1]), "d": (clip, None, True)}
            found.append(encoder(test_fima.shown(*given[kind]))[0])
        return torch.stack(found).unflatten(0, (2, -1))

    maps = {x: maps_of(model.encoder, x) for x in "vsd"}
    f = {x: project(model.head, rows.mean((3, 4, 5))) for x, rows in maps.items()}
    a = {x: rows.abs().sum(2) for x, rows in maps.items()}
    slow = project(model.key_head, maps_of(model.key_encoder, "d").mean((3, 4, 5)))
    for x in "sd":
        rgb, keys = f["v"], np.concatenate(f[x])
        if started:
            rgb = project(model.head, pool_of(maps["v"], a[x]))
        if x == "d":
            pool[:videos] = np.concatenate([slow[1], rgb[1], f["d"][1]], 1)  # view j, before view i searches
        result[f"v{x}"] = dual_of(rgb, f[x], False, config.temperature)
        if x == "d" and started:
            compared, found_v, found_d = np.split(pool, 3, 1)
            best, weight = best_of(slow[0] @ compared.T, config.retrieved)
            rows = 0
            for k, p in zip(best.T, weight.T, strict=True):
                rows += p * contrast_of(rgb[0], found_d[k], keys, config.temperature)
                rows += p * contrast_of(found_v[k], f["d"][0], keys, config.temperature)
            result["vd"] = rows.mean()
    result["vv"] = dual_of(f["v"], f["v"], False, config.temperature)
    result["sd"] = -dual_of(f["s"], f["d"], True, config.temperature)
    v, s, d = (a[x].flatten(0, 1) for x in "vsd")
    return result | {"ac": config.ac_weight * alignment_of(v, s + d)}, torch.from_numpy(pool)


@pytest.mark.parametrize("epoch", [1.0, 2.0, 4.0, 4.25])  # before and after the delay, at a refresh and soon after it
def test_losses_and_the_pool_equal_the_plain_loop_oracle(epoch):
    low = 0.02  # so that it matters which ones are retrieved
    model = build(losses="vv,vs,vd,sd,ac", temperature=low, momentum=0.25, retrieved=2)
    views = make_views(crop=32, sub_clips=0) | {"epoch": epoch}
    model.queues["d"].keys = torch.cat([units(k, 12, 128).float() for k in range(3)], 1)
    model.eval().training = True  # the pool is written; batch norm rests
    with torch.no_grad():
        for parameter in model.parameters():  # features that differ, and a slow extractor that is not the encoder
            parameter.add_(0.1 * torch.randn_like(parameter))
        (expected, pool), cut = oracle(model, views), copy.deepcopy(model)
        torch.manual_seed(1)
        found = model(views)
        for i in range(3):  # micro-batches refresh once a step, and fill the pool as one batch
            cut.part = i, 3
            cut({name: view if name == "epoch" else view[i : i + 1] for name, view in views.items()})
    assert list(found) == ["vv", "vs", "vd", "sd", "ac"]
    for name, value in found.items():
        assert float(value) == pytest.approx(expected[name], rel=5e-5), name
    torch.testing.assert_close(model.queues["d"].keys.double(), pool, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.state_dict(), model.state_dict(), rtol=1e-4, atol=1e-5)
    state = copy.deepcopy(model.eval().state_dict())
    model(views)
    assert same(model.state_dict(), state)  # an evaluation changes nothing


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    model, plain = build(**flags), build()
    for views in (views_at(2.25, seed=1), views_at(2.5)):
        torch.manual_seed(0)
        found = model(views)
        torch.manual_seed(0)
        reference = plain(views)
    assert_trains(model, found)
    assert not same(found, reference)


def test_gradients_are_those_of_finite_differences():
    model = build(losses="vv,vs,vd,sd", search="none", decouple="none").double().eval()
    assert_gradients(model, views_at(0.0), ("vv", "vs", "vd", "sd"))


def test_chance_values_are_what_equal_features_give():
    for epoch in (1.0, 2.0):
        model = with_equal_features(build(losses="vv,vs,vd,sd,ac"))
        found = model(views_at(epoch))
        for name in ("vv", "vs", "vd", "sd"):
            assert found[name].item() == pytest.approx(model.metrics[f"chance/{name}"], abs=1e-4), name
        assert model.metrics["feature_std"] < 1e-6
    assert model.metrics["chance/vv"] == pytest.approx(2 * math.log(5)) and model.metrics["chance/sd"] < 0


def test_what_is_not_used_costs_nothing():
    assert not build(search="none").queues and set(build(search="both").queues) == {"s", "d"}
    found = {losses: set(build(losses=losses).inputs(views_at(0.0))) for losses in ("vv", "vs", "vs,vd,sd")}
    assert not build(losses="vs").queues and found == {"vv": {"v"}, "vs": {"v", "s"}, "vs,vd,sd": {"v", "s", "d"}}
