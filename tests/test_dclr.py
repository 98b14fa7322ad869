"""DCLR: its losses against plain loops, the method against an oracle, gradients, the pools and the command line."""

import copy
import math

import pytest
import torch
from helpers import generator, log_ratio, make_views, mean, units, views_without_colours
from hypothesis import given
from hypothesis import strategies as st

import augment
import dclr
import losses
from train import UserError

seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 4)
TINY = dict(encoder="conv4", width=0.25, crop=32, queue=12, batch_size=3, retrieved=3, delay=2, refresh=4)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------- oracles: loops over videos and views


def dual_loop(query, key, same_view=False, temperature=0.1):
    """Sum over the views i of I(x_i; y_j), or of I(x_i; y_i), averaged over the videos; lists [view][video]."""
    values = []
    for n in range(len(query[0])):
        total = 0.0
        for i in range(2):
            positive = key[i if same_view else 1 - i][n]
            others = [key[view][m] for view in range(2) for m in range(len(query[0])) if m != n]
            total += log_ratio(query[i][n], [positive], [positive, *others], temperature)
        values.append(total)
    return mean(values)


def retrieved_loop(v, d, found_v, found_d, weight, keys, temperature=0.1):
    values, count = [], len(v)
    for n in range(count):
        others = [key for m, key in enumerate(keys) if m % count != n]
        total = 0.0
        for p, v_k, d_k in zip(weight[n], found_v[n], found_d[n], strict=True):
            total += p * log_ratio(v[n], [d_k], [d_k, *others], temperature)
            total += p * log_ratio(v_k, [d[n]], [d[n], *others], temperature)
        values.append(total)
    return mean(values)


def scaled_loop(values):
    low, high = min(values), max(values)
    return [(x - low) / (high - low) if high > low else 0.0 for x in values]


def alignment_loop(activation, reference):
    rows = zip(activation.flatten(1).tolist(), reference.flatten(1).tolist(), strict=True)
    return mean([mean([abs(x - y) for x, y in zip(scaled_loop(a), scaled_loop(r), strict=True)]) for a, r in rows])


def pool_loop(features, activation):
    """One map: (C, T, H, W) and (T, H, W) → C floats."""
    places = [(t, h, w) for t, h, w in torch.cartesian_prod(*map(torch.arange, activation.shape)).tolist()]
    total = sum(float(activation[p]) for p in places)
    return [sum(float(channel[p]) * float(activation[p]) for p in places) / total for channel in features]


# ------------------------------------------------------------------------------------------------------ static frame, I


@given(seeds, sizes, sizes)
def test_static_frame_is_each_clips_own(seed, batch, frames):
    clips = random(seed, batch, 3, frames, 2, 4)
    index = torch.randint(frames, (batch,), generator=generator(seed))
    still = losses.static_frame(clips, index)
    assert still.shape == (batch, 3, 1, 2, 4)
    for n in range(batch):
        assert torch.equal(still[n, :, 0], clips[n, :, index[n]])


@given(seeds, st.integers(1, 4), st.booleans(), st.floats(0.05, 2))
def test_dual_contrast_is_that_of_a_loop_whatever_the_order_of_videos_and_views(seed, videos, same_view, temperature):
    query, key = units(seed, 2, videos, 5), units(seed + 1, 2, videos, 5)
    value = losses.dual_contrast(query, key, same_view, temperature)
    assert value.item() == pytest.approx(dual_loop(query.tolist(), key.tolist(), same_view, temperature), abs=1e-12)
    order = torch.randperm(videos, generator=generator(seed))
    torch.testing.assert_close(losses.dual_contrast(query[:, order], key[:, order], same_view, temperature), value)
    torch.testing.assert_close(losses.dual_contrast(query.flip(0), key.flip(0), same_view, temperature), value)
    assert value >= 0 and (videos > 1 or value == 0)  # one video has no negatives


@given(seeds, st.booleans())
def test_the_feature_that_is_not_the_positive_of_ones_own_video_plays_no_part(seed, same_view):
    query, key = units(seed, 2, 2, 5), units(seed + 1, 2, 2, 5)
    rows = losses.batch_contrast(query[0], key[int(not same_view)], key.flatten(0, 1), torch.eye(2).bool().repeat(1, 2))
    other = key.clone()
    other[int(same_view), 0] = units(seed + 2, 5)  # of the first video
    again = losses.batch_contrast(
        query[0], key[int(not same_view)], other.flatten(0, 1), torch.eye(2).bool().repeat(1, 2)
    )
    assert torch.equal(rows[0], again[0]) and not torch.equal(rows[1], again[1])  # it is a negative of the second


@given(seeds, st.integers(1, 3), st.integers(1, 4), st.floats(0.05, 2))
def test_retrieved_contrast_is_that_of_a_loop(seed, videos, found, temperature):
    v, d = units(seed, videos, 5), units(seed + 1, videos, 5)
    found_v, found_d = units(seed + 2, videos, found, 5), units(seed + 3, videos, found, 5)
    weight = torch.rand(videos, found, generator=generator(seed), dtype=torch.float64)
    keys = units(seed + 4, 2 * videos, 5)
    batch = [v, d, found_v, found_d, weight, keys]
    expected = retrieved_loop(*(x.tolist() for x in batch), temperature)
    assert losses.retrieved_contrast(*batch, temperature).item() == pytest.approx(expected, abs=1e-12)


@given(seeds, st.integers(1, 3))
def test_retrieving_the_other_view_alone_is_half_of_the_dual_contrast_from_each_side(seed, videos):
    v, d = units(seed, 2, videos, 5), units(seed + 1, 2, videos, 5)
    one = torch.ones(videos, 1, dtype=torch.float64)
    keys = d.flatten(0, 1)
    found = losses.retrieved_contrast(v[0], d[0], v[1][:, None], d[1][:, None], one, keys)
    torch.testing.assert_close(found, losses.dual_contrast(v, d))  # I(v_i; d_j) + I(v_j; d_i): Eq. 9 is Eq. 7


@given(seeds, st.integers(1, 6), st.integers(6, 12))
def test_retrieve_takes_the_most_similar_and_weighs_them(seed, count, length):
    query, pool = units(seed, 3, 4), units(seed + 1, length, 4)
    index, weight = losses.retrieve(query, pool, count)
    scores = query @ pool.T
    for n in range(3):
        expected = sorted(range(length), key=lambda k: -scores[n, k])[:count]
        assert index[n].tolist() == expected
        positive = [max(scores[n, k].item(), 1e-6) for k in expected]
        assert weight[n].tolist() == pytest.approx([x / sum(positive) for x in positive])
    assert weight.sum(1).tolist() == pytest.approx([1] * 3)
    same_index, uniform = losses.retrieve(query, pool, count, "uniform")
    assert torch.equal(same_index, index) and (uniform == 1 / count).all()


def test_weights_stay_weights_where_nothing_is_similar():
    _, weight = losses.retrieve(torch.tensor([[1.0, 0.0]]), torch.tensor([[-1.0, 0.0], [0.0, 1.0], [-0.5, 0.5]]), 3)
    assert weight.tolist() == [pytest.approx([1 / 3] * 3)]
    index, weight = losses.retrieve(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.6, 0.8]]), 2)
    assert index.tolist() == [[1, 0]] and weight[0, 1] < 1e-5  # an empty place of a pool


def test_closed_forms_of_equal_similarities():
    zeros = torch.zeros(2, 4, 3)
    assert losses.dual_contrast(zeros, zeros).item() == pytest.approx(2 * math.log(7))
    weight = torch.full((4, 2), 0.5)
    found = torch.zeros(4, 2, 3)
    value = losses.retrieved_contrast(zeros[0], zeros[0], found, found, weight, zeros.flatten(0, 1))
    assert value.item() == pytest.approx(2 * math.log(7))


@given(seeds, st.booleans())
def test_contrasts_stay_finite_in_low_precision_at_a_low_temperature(seed, same_view):
    query, key = (units(seed + k, 2, 3, 5).bfloat16().requires_grad_() for k in range(2))
    value = losses.dual_contrast(query, key, same_view, 0.01)
    assert value.dtype == torch.float32 and value.isfinite()
    expected = losses.dual_contrast(query.double(), key.double(), same_view, 0.01)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-4)
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(value, (query, key)))


# ---------------------------------------------------------------------------------------- activation maps, Eq. 11 to 13


@given(seeds, sizes, sizes, sizes)
def test_activation_maps_their_alignment_and_pooling_are_those_of_loops(seed, frames, height, width):
    features = random(seed, 2, 3, frames, height, width)
    activation = losses.pixel_activation(features)
    torch.testing.assert_close(activation, sum(features[:, c].abs() for c in range(3)))
    reference = losses.pixel_activation(random(seed + 1, 2, 3, frames, height, width))
    value = losses.activation_alignment(activation, reference)
    assert value.item() == pytest.approx(alignment_loop(activation, reference), abs=1e-12) and 0 <= value <= 1
    pooled = losses.activation_pool(features, reference)
    for n in range(2):
        assert pooled[n].tolist() == pytest.approx(pool_loop(features[n], reference[n]), abs=1e-12)


@given(seeds, st.floats(0.01, 100), st.floats(-5, 5))
def test_alignment_does_not_know_scales_and_is_zero_for_equal_maps(seed, scale, shift):
    one, other = (losses.pixel_activation(random(seed + k, 3, 4, 2, 3, 3)) for k in range(2))
    value = losses.activation_alignment(one, other)
    torch.testing.assert_close(losses.activation_alignment(one * scale + shift, other), value)
    torch.testing.assert_close(losses.activation_alignment(one, other * scale + shift), value)
    assert losses.activation_alignment(one, one) == 0
    upside_down = 1 - (one - one.amin((1, 2, 3), True)) / (one.amax((1, 2, 3), True) - one.amin((1, 2, 3), True))
    assert losses.activation_alignment(one, upside_down) > 0.1
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(losses.activation_alignment(one[order], other[order]), value)


@given(seeds, st.floats(0.01, 100))
def test_pooling_with_equal_weights_is_the_mean_and_with_one_weight_the_pixel(seed, scale):
    features = random(seed, 2, 3, 2, 3, 3)
    ones = torch.ones(2, 2, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(losses.activation_pool(features, scale * ones), features.mean((2, 3, 4)))
    ones[:, 0] = ones[:, 1, :, 1:] = ones[:, 1, 1:] = 0
    torch.testing.assert_close(losses.activation_pool(features, ones), features[:, :, 1, 0, 0])


def test_constant_and_empty_maps_give_finite_losses_and_gradients():
    constant = torch.full((2, 1, 3, 3), 0.7, requires_grad=True)
    value = losses.activation_alignment(constant, torch.rand(2, 1, 3, 3, generator=generator(0)))
    assert torch.autograd.grad(value, constant)[0].abs().max() <= 1
    features = random(0, 2, 3, 1, 2, 2).requires_grad_()
    pooled = losses.activation_pool(features, torch.zeros(2, 1, 2, 2, dtype=torch.float64))
    assert (pooled == 0).all() and torch.autograd.grad(pooled.sum(), features)[0].isfinite().all()


def test_gradients_flow_to_the_clip_and_not_to_what_it_is_aligned_with():
    v, s, d = (random(k, 2, 3, 2, 3, 3).requires_grad_() for k in range(3))
    maps = [losses.pixel_activation(x) for x in (v, s, d)]
    loss = losses.activation_alignment(maps[0], maps[1] + maps[2]) + losses.activation_pool(v, maps[2]).sum()
    loss.backward()
    assert v.grad.abs().sum() > 0 and s.grad is None and d.grad is None
    batch = [units(k, 2, 3, 4).requires_grad_() for k in range(2)]
    assert torch.autograd.gradcheck(losses.dual_contrast, batch)
    assert torch.autograd.gradcheck(lambda q, k: losses.dual_contrast(q, k, same_view=True), batch)
    one = [units(k, 3, 4).requires_grad_() for k in range(2)]
    found = [units(k, 3, 2, 4).requires_grad_() for k in range(2, 4)]
    weight = torch.rand(3, 2, generator=generator(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(losses.retrieved_contrast, [*one, *found, weight, units(5, 6, 4).requires_grad_()])
    activation = torch.rand(2, 2, 3, 3, generator=generator(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: losses.activation_alignment(a, maps[1]), activation.requires_grad_())
    assert torch.autograd.gradcheck(lambda x: losses.activation_pool(x, activation), v)


# ----------------------------------------------------------------------------------------------------------- the method


def build(**flags):
    torch.manual_seed(0)
    return dclr.DCLR(dclr.DCLRConfig(**TINY | flags))


def views_at(epoch, **options):
    return views_without_colours(sub_clips=0, **options) | {"epoch": epoch}


def oracle(model, views):
    """The losses of Eq. 16 by loops over videos, one clip a forward, in float64, of a model in eval mode."""
    model = copy.deepcopy(model).double().eval()
    config, videos, started = model.config, len(views["clip"]), views["epoch"] >= model.config.delay
    torch.manual_seed(1)
    frames = torch.randint(16, (2 * videos,))

    def g(head, x):
        return torch.nn.functional.normalize(head(x), dim=-1)

    def maps_of(encoder, kind):
        result = [[], []]
        for view in range(2):
            for n in range(videos):
                clip, color = views["clip"][n, view].double()[None] / 255, views["color"][n, view].double()
                if kind == "v":
                    clip = augment.color_augment(clip, color[0][None])
                elif kind == "s":
                    frame = frames[view * videos + n]
                    clip = augment.color_augment(torch.cat([clip[:, :, frame, None]] * 16, 2), color[1][None])
                else:
                    steps = [(clip[:, :, t + 1] - clip[:, :, t] + 1) / 2 for t in range(15)]
                    clip = torch.stack([*steps, steps[-1]], 2)
                result[view].append(encoder(augment.normalize(clip))[0])
        return result

    maps = {kind: maps_of(model.encoder, kind) for kind in "vsd"}
    f = {kind: [[g(model.head, x.mean((1, 2, 3))).tolist() for x in row] for row in maps[kind]] for kind in "vsd"}
    a = {kind: [[x.abs().sum(0) for x in row] for row in maps[kind]] for kind in "vsd"}
    result, t = {}, config.temperature
    for kind in "sd":
        rgb = f["v"]
        if started:
            pooled = [
                [torch.tensor(pool_loop(x, w)).double() for x, w in zip(*rows, strict=True)]
                for rows in zip(maps["v"], a[kind], strict=True)
            ]
            rgb = [[g(model.head, x).tolist() for x in row] for row in pooled]
        if kind == "d" and started:
            slow = [g(model.key_head, x.mean((1, 2, 3))) for x in maps_of(model.key_encoder, "d")[0]]
            pool = model.queues["d"].keys
            found, weight = [], []
            for query in slow:
                scores = [float(query @ row[:128]) for row in pool]
                best = sorted(range(len(pool)), key=lambda k: -scores[k])[: config.retrieved]
                kept = [max(scores[k], 1e-6) for k in best]
                found.append([pool[k].tolist() for k in best])
                weight.append([x / sum(kept) for x in kept])
            found_v, found_d = (
                [[row[part] for row in rows] for rows in found] for part in (slice(128, 256), slice(256, 384))
            )
            result["vd"] = retrieved_loop(rgb[0], f["d"][0], found_v, found_d, weight, [*f["d"][0], *f["d"][1]], t)
        else:
            result[f"v{kind}"] = dual_loop(rgb, f[kind], temperature=t)
    result["sd"] = -dual_loop(f["s"], f["d"], same_view=True, temperature=t)
    v, s, d = (torch.stack([x for row in a[kind] for x in row]) for kind in "vsd")
    return result | {"ac": config.ac_weight * alignment_loop(v, s + d)}


@pytest.mark.parametrize("epoch", [0.0, 2.0], ids=["before the delay", "after it"])
def test_losses_equal_the_plain_loop_oracle(epoch):
    model, views = build().eval(), make_views(crop=32, sub_clips=0) | {"epoch": epoch}
    model.queues["d"].keys = torch.cat([units(k, 12, 128).float() for k in range(3)], 1)
    with torch.no_grad():
        for parameter in (*model.key_encoder.parameters(), *model.key_head.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))  # the slow extractor is another than the encoder
        expected = oracle(model, views)
        torch.manual_seed(1)
        found = model(views)
    assert list(found) == ["vs", "vd", "sd", "ac"]
    for name, value in found.items():
        assert float(value) == pytest.approx(expected[name], rel=5e-4), name


SWITCHES = [
    dict(losses="vv"),
    dict(losses="vs"),
    dict(losses="vd"),
    dict(losses="vs,vd"),
    dict(losses="vs,vd,sd"),
    dict(losses="vv,vs,vd,sd,ac"),
    dict(same_view="on", search="none"),
    dict(search="none"),
    dict(search="static"),
    dict(search="both"),
    dict(retrieved=1),
    dict(retrieved=5),
    dict(retrieved_weights="uniform"),
    dict(decouple="none"),
    dict(decouple="static"),
    dict(decouple="motion"),
    dict(ac_weight=2.0),
    dict(delay=99),
]


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    model, plain = build(**flags), build()
    for views in (views_at(2.25, seed=1), views_at(2.5)):
        torch.manual_seed(0)
        found = model(views)
        torch.manual_seed(0)
        reference = plain(views)
    assert set(found) == set(model.config.terms)
    assert {f"chance/{name}" for name in found} <= model.metrics.keys()
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("key_")), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    shared = found.keys() & reference.keys()
    assert found.keys() != reference.keys() or any(not torch.equal(found[name], reference[name]) for name in shared)


def test_chance_values_are_what_equal_features_give():
    model = build(losses="vv,vs,vd,sd,ac")
    for head in (model.head, model.key_head):
        torch.nn.init.zeros_(head.net[2].weight)  # every feature is the bias
        torch.nn.init.constant_(head.net[2].bias, 1.0)
    for epoch in (1.0, 2.0):
        model.queues["d"].keys = torch.full_like(model.queues["d"].keys, 128**-0.5)
        found = model(views_at(epoch))
        for name in ("vv", "vs", "vd", "sd"):
            assert found[name].item() == pytest.approx(model.metrics[f"chance/{name}"], abs=1e-4), name
    assert model.metrics["chance/vv"] == pytest.approx(2 * math.log(5)) and model.metrics["chance/sd"] < 0


def test_stills_are_taken_from_their_clip_and_differences_have_no_colours():
    model, views = build(), make_views(crop=32, sub_clips=0)
    torch.manual_seed(0)
    inputs = model.inputs(views)
    torch.manual_seed(0)
    frame = torch.randint(16, (6,))
    clips, color = (views[name].transpose(0, 1).flatten(0, 1) for name in ("clip", "color"))
    still = augment.color_augment(losses.static_frame(clips, frame) / 255, color[:, 1])
    torch.testing.assert_close(inputs["s"], augment.normalize(still).expand(-1, -1, 16, -1, -1))
    torch.testing.assert_close(inputs["d"], augment.normalize(augment.frame_difference(clips / 255)))
    torch.testing.assert_close(inputs["v"], augment.normalize(augment.color_augment(clips / 255, color[:, 0])))
    assert len({int(k) for k in frame}) > 1
    assert set(build(losses="vv").inputs(views)) == {"v"} and set(build(losses="vs").inputs(views)) == {"v", "s"}


def test_view_j_is_in_the_pool_before_view_i_searches(monkeypatch):
    model, views, pools = build(), views_at(2.0), []
    original = dclr.retrieve

    def watched(query, pool, *rest):
        pools.append((query.clone(), pool.clone()))
        return original(query, pool, *rest)

    monkeypatch.setattr(dclr, "retrieve", watched)
    model.queues["d"].keys = torch.zeros_like(model.queues["d"].keys)
    model(views)
    (query, pool), ring = pools[0], model.queues["d"].keys
    assert query.shape == (3, 128) and torch.equal(pool, ring[:, :128])
    assert int(pool.any(1).sum()) == 3  # one of each video, of three
    for part in ring[:3].chunk(3, 1):
        torch.testing.assert_close(part.norm(dim=1), torch.ones(3))
    assert not (query[:, None] == pool).all(2).any()  # view i searches, and is not there itself
    model.eval()(views | {"epoch": 4.0})
    assert torch.equal(model.queues["d"].keys, ring)  # an evaluation changes nothing, not even where a refresh is due


def test_the_slow_extractor_follows_at_every_refresh_and_stands_still_between():
    model = build(refresh=4, momentum=0.25)
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    pairs = [(model.encoder, model.key_encoder), (model.head, model.key_head)]

    def state():
        return [p.clone() for _, key in pairs for p in key.parameters()]

    before = state()
    for epoch in (1.0, 3.75, 4.25, 6.0):
        model(views_at(epoch))
        assert all(map(torch.equal, before, state()))
    assert int(model.queues["d"].keys.any(1).sum()) == 12
    expected = [
        0.25 * k + 0.75 * q for query, key in pairs for q, k in zip(query.parameters(), key.parameters(), strict=True)
    ]
    model(views_at(8.0))
    for parameter, value in zip(state(), expected, strict=True):
        torch.testing.assert_close(parameter, value)
    assert int(model.queues["d"].keys.any(1).sum()) == 3  # of this step; what the old extractor made is gone


def test_a_copy_at_refresh_is_exact():
    model = build()
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    model(views_at(0.0))
    assert all(map(torch.equal, model.encoder.parameters(), model.key_encoder.parameters()))


def test_a_delay_as_long_as_the_run_is_said():
    for options, warns in (({"delay": 2}, True), ({"delay": 1.5}, False), ({"delay": 2, "search": "none"}, True)):
        found = build(epochs=2, **options).warnings({"epoch": 0.5})
        assert any("--delay 2 of 2 epochs" in text for text in found) == warns
    assert build(epochs=2, delay=2, search="none", decouple="none", queue=3).warnings({"epoch": 0.5}) == []


def test_a_loss_or_pool_that_is_not_used_costs_nothing():
    assert not build(search="none").queues and not build(losses="vs").queues
    assert set(build(search="both").queues) == {"s", "d"}
    with pytest.raises(UserError, match="--losses"):
        build(losses="")
