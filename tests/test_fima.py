"""FIMA and MoCo as a whole: against a plain-loop oracle of the paper, gradients, queues, and every ablation switch."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_views

import augment
import fima
import moco
import processes
from models import momentum_update
from train import UserError

SMALL = dict(encoder="r3d_18", width=0.0625, crop=48, frames=16, queue=12, decoder_width=32, momentum=0.9, batch_size=3)


def build(method=fima.FIMA, **flags):
    torch.manual_seed(0)
    config_class = fima.FIMAConfig if method is fima.FIMA else moco.MoCoConfig
    known = {k: v for k, v in SMALL.items() if k in config_class.__dataclass_fields__}
    return method(config_class(**(known | flags)))


def unit(x):
    return x / x.norm()


def oracle(model, views):
    """The losses of Eq. 1, 8 and 10 by loops over views, videos, frames and pixels, one clip a forward, in float64."""
    model = copy.deepcopy(model).double().eval()
    config, (batch, size) = model.config, (len(views["clip"]), 3)

    def prepare(clip, color, difference):
        clip = clip.double()[None] / 255
        if difference:
            steps = [(clip[:, :, t + 1] - clip[:, :, t] + 1) / 2 for t in range(clip.shape[2] - 1)]
            clip = torch.stack([*steps, steps[-1]], 2)
        return augment.normalize(augment.color_augment(clip, color.double()[None]))

    def g(head, x):
        return unit(head.net(x))

    def h(x, y):
        return math.exp(float(x @ y) / config.temperature)

    maps = {}
    for b in range(batch):
        for v in range(2):
            rgb = prepare(views["clip"][b, v], views["color"][b, v, 0], False)
            motion = prepare(views["clip"][b, v], views["color"][b, v, 1], True)
            maps[b, v] = model.encoder(rgb)[0], model.key_encoder(rgb)[0], model.key_encoder(motion)[0]
    local = {
        (b, v, i): g(
            model.key_head,
            model.key_encoder(prepare(views["sub_clips"][b, v, i], views["color"][b, v, 2 + i], True))[0].mean(
                (1, 2, 3)
            ),
        )
        for b in range(batch)
        for v in range(2)
        for i in range(2)
    }
    pixels = [(r, c) for r in range(size) for c in range(size)]
    losses = {"vv": [], "pix": [], "fra": []}
    for v in range(2):
        by_video = []
        motion_keys = [
            g(model.key_head, maps[b, 1 - v][2][:, i, r, c]) for b in range(batch) for i in range(2) for r, c in pixels
        ]
        for b in range(batch):
            query, _, _ = maps[b, v]
            target_rgb, target_key, target_motion = maps[b, 1 - v]
            q, k = g(model.head, query.mean((1, 2, 3))), g(model.key_head, target_key.mean((1, 2, 3)))
            negatives = sum(h(q, n) for n in model.queues["vv"].keys)
            losses["vv"].append(-math.log(h(q, k) / (h(q, k) + negatives)))

            def foreground(view, b=b):
                z = (maps[b, view][1].mean((0, 1)) + maps[b, view][2].mean((0, 1))).detach().numpy()
                return z > np.quantile(z, 1 - config.foreground)

            corners = [views["box"][b, view].double() for view in (v, 1 - v)]
            beside = model.encoder.offsets[1] if config.centres == "measured" else 0
            looks_at = torch.tensor([[16 * (c + 0.5) + beside, 16 * (r + 0.5) + beside] for r, c in pixels])  # x, y
            centers = [box[:2] + looks_at.double() / config.crop * (box[2:] - box[:2]) for box in corners]
            diagonal = max(float((box[2:] - box[:2]).norm()) / size for box in corners)
            for i in range(2):
                y, y_cls = model.decoder(query[:, i].flatten(1).T[None], target_rgb[:, i].flatten(1).T[None])
                total, count = 0.0, 0
                for s, source in enumerate(pixels):
                    if not foreground(v)[source]:
                        continue
                    near = [
                        g(model.key_head, target_motion[:, i, r, c])
                        for t, (r, c) in enumerate(pixels)
                        if (centers[0][s] - centers[1][t]).norm() / diagonal < config.threshold
                        and foreground(1 - v)[r, c]
                    ]
                    if near:
                        prediction = g(model.head, y[0, s])
                        total -= math.log(
                            sum(h(prediction, m) for m in near) / sum(h(prediction, m) for m in motion_keys)
                        )
                        count += 1
                if count:
                    by_video.append(total / count)
                prediction = g(model.head, y_cls[0])
                own = h(prediction, local[b, 1 - v, i])
                everything = sum(h(prediction, other) for other in local.values())
                everything += sum(h(prediction, n) for n in model.queues["fra"].keys)
                losses["fra"].append(-math.log(own / everything))
        losses["pix"].append(np.mean(by_video))
    return {name: float(np.mean(values)) for name, values in losses.items()}


@pytest.mark.parametrize("centres", ["measured", "nominal"])
def test_losses_equal_the_plain_loop_oracle(centres):
    model, views = build(centres=centres).eval(), make_views()
    with torch.no_grad():
        expected, losses = oracle(model, views), model(views)
    assert list(losses) == ["vv", "pix", "fra"]
    for name, value in losses.items():
        assert float(value) == pytest.approx(expected[name], rel=2e-4), name


SWITCHES = [
    dict(losses="vv"),
    dict(losses="vv,vd"),
    dict(losses="vv,pix"),
    dict(losses="vv,fra"),
    dict(losses="vv,pix", decoder="none", mask_position="none"),
    dict(losses="vv,pix", decoder="none"),
    dict(losses="vv,pix", mask_position="none"),
    dict(threshold=0.35),
    dict(threshold=2.8),
    dict(decoder_depth=1),
    dict(decoder_depth=3),
    dict(decoder_width=16),
    dict(decoder_heads=8),
    dict(foreground=0.3),
    dict(foreground=0.7),
    dict(mask_source="rgb"),
    dict(mask_source="difference"),
    dict(mask_position="prediction"),
    dict(mask_position="target"),
    dict(decoder="separate"),
    dict(frame_loss="triplet"),
    dict(frame_loss="mse"),
    dict(pixel_negatives="video"),
    dict(pixel_queue=40),
    dict(centres="measured"),
    dict(encoder="i3d", crop=64),
]


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    views = make_views(crop=flags.get("crop", 48))
    own = {name: flags[name] for name in ("losses", "encoder", "crop") if name in flags}
    plain = build(**own)  # the same losses and encoder without the switch
    model = build(**flags)
    losses = model(views)
    assert set(losses) == set(model.config.terms)
    assert {f"chance/{name}" for name in losses} <= model.metrics.keys()
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("key_")), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    reference = plain(views)
    assert own == flags or any(not torch.equal(losses[name], reference[name]) for name in losses)


def test_chance_values_are_what_equal_features_give():
    model, views = build(), make_views()
    for head in (model.head, model.key_head):
        torch.nn.init.zeros_(head.net[2].weight)  # every feature is the bias, so all similarities are 1
        torch.nn.init.constant_(head.net[2].bias, 1.0)
    for queue in model.queues.values():
        queue.keys = torch.full_like(queue.keys, queue.keys.shape[1] ** -0.5)
    losses = model(views)
    for name, value in losses.items():
        assert value.item() == pytest.approx(float(model.metrics[f"chance/{name}"]), abs=1e-4), name


def test_keys_follow_the_query_encoder_by_momentum():
    model, views = build(), make_views()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.head.parameters()):
            parameter.add_(torch.randn_like(parameter))
    pairs = [(model.encoder, model.key_encoder), (model.head, model.key_head)]
    expected = [
        0.9 * k.clone() + 0.1 * q
        for query, key in pairs
        for q, k in zip(query.parameters(), key.parameters(), strict=True)
    ]
    model(views)
    for parameter, value in zip([p for _, key in pairs for p in key.parameters()], expected, strict=True):
        torch.testing.assert_close(parameter, value)
    before = [p.clone() for p in model.key_encoder.parameters()]
    model.eval()(views)  # an evaluation changes nothing
    assert all(torch.equal(a, b) for a, b in zip(before, model.key_encoder.parameters(), strict=True))


@pytest.mark.parametrize("flags", [{}, dict(losses="vv,vd,pix,fra", pixel_queue=50)], ids=str)
def test_queues_are_read_before_and_written_after_all_losses(flags, monkeypatch):
    model, views, events = build(**flags), make_views(), []
    for module, name in ((moco, "info_nce"), (fima, "pixel_contrast")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=original, **k: (events.append("loss"), f(*a, **k))[1])
    original_fra = fima.FRAME_LOSSES["infonce"]
    monkeypatch.setitem(fima.FRAME_LOSSES, "infonce", lambda *a, **k: (events.append("loss"), original_fra(*a, **k))[1])
    before = {name: queue.keys.clone() for name, queue in model.queues.items()}
    enqueue = moco.MomentumQueue.enqueue
    monkeypatch.setattr(moco.MomentumQueue, "enqueue", lambda q, k: (events.append("write"), enqueue(q, k))[1])
    losses = model(views)
    assert "loss" not in events[events.index("write") :]
    assert events.count("write") == len(model.queues)
    for name, queue in model.queues.items():
        written = {"vv": 6, "vd": 6, "fra": 12, "pix": 50}[name]  # of 2 views × 3 videos (× 2 sub-clips)
        assert int((queue.keys != before[name]).any(1).sum()) == min(written, len(queue.keys))
    torch.stack(list(losses.values())).sum().backward()  # the keys that losses have read are still there


def test_no_video_meets_its_own_fresh_key_as_a_negative(monkeypatch):
    """In the queue that a step reads, none equals a key of the step's own videos; the next step meets them."""
    model, seen, local = build(), [], []
    original, original_fra = moco.info_nce, fima.FRAME_LOSSES["infonce"]

    def watched(query, positive, negatives, temperature):
        seen.append((positive.clone(), negatives.clone()))
        return original(query, positive, negatives, temperature)

    def watched_fra(prediction, target, negatives, temperature):
        local.append((target.clone(), negatives.clone()))
        return original_fra(prediction, target, negatives, temperature)

    monkeypatch.setattr(moco, "info_nce", watched)
    monkeypatch.setitem(fima.FRAME_LOSSES, "infonce", watched_fra)
    for seed in range(2):
        model(make_views(seed=seed))
    for steps in (seen, local):
        for keys, queue in steps:
            assert not (keys[:, None] == queue).all(2).any()
        assert (steps[0][0][:, None] == steps[1][1]).all(2).any(1).all()  # the second step meets every key of the first


def test_pixel_loss_is_zero_with_a_graph_when_the_views_do_not_overlap():
    views = make_views()
    views["box"] = torch.tensor([[[0.0, 0.0, 0.3, 0.3], [0.6, 0.6, 0.9, 0.9]]]).expand(3, -1, -1)
    model = build(losses="vv,pix")
    loss = model(views)["pix"]
    assert loss.item() == 0
    loss.backward()
    assert all(float(p.grad.abs().sum()) == 0 for p in model.decoder.parameters())


def test_background_pixels_are_in_no_pair():
    model, views = build(), make_views()
    maps = model.encode(views, views["clip"])
    fused = maps.key.mean((2, 3)) + maps.motion.mean((2, 3))  # (2, B, H, W)
    foreground = (fused > fused.flatten(2).quantile(0.5, dim=2)[..., None, None]).flatten(2)
    pairs = model.positive_pixels(views["box"], maps)
    assert pairs.any() and not pairs[~foreground].any()
    assert not pairs.transpose(2, 3)[~foreground.flip(0)].any()
    assert torch.equal(pairs[0], pairs[1].transpose(1, 2))  # the second direction is the first, read backwards


@pytest.mark.parametrize("difference", [False, True])
@pytest.mark.parametrize("colors", [False, True])
def test_what_compile_compiles_is_one_graph_and_gives_the_same(colors, difference):
    model, views = build(encoder="conv4", width=0.25, crop=16), make_views(crop=16)
    clips, color = views["clip"].flatten(0, 1), views["color"].flatten(0, 1)[:, 0] if colors else None

    def whole(clips, color):
        return model.encoder(model.encoder_input(clips, color, difference))

    compiled = torch.compile(whole, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(clips, color), whole(clips, color), atol=1e-4, rtol=1e-4)


def test_keys_of_the_clips_are_made_before_the_query_pass_whose_graph_takes_memory():
    model, passes = build(), []
    model.key_encoder.register_forward_hook(lambda *_: passes.append("key"))
    model.encoder.register_forward_hook(lambda *_: passes.append("query"))
    model(make_views())
    assert passes == ["key", "key", "query", "key"]  # of RGB, of the frame difference; of the sub-clips


def features_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # as in the parent, whose numbers are compared
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for bn in ("shuffle", "local"):
        model, views = build(bn=bn), make_views(seed=rank)
        maps = model.encode(views, views["clip"])
        torch.save([maps.query, maps.key, maps.motion, model.sub_clip_features(views)], f"{folder}/{bn}{rank}.pt")
    processes.end_process()


@pytest.mark.slow
def test_shuffled_batch_norm_makes_keys_of_clips_of_all_processes(tmp_path):
    torch.multiprocessing.spawn(features_process, (str(tmp_path),), nprocs=2)
    model, both = build(), [make_views(seed=rank) for rank in range(2)]
    momentum_update(model.encoder, model.key_encoder, model.config.momentum)
    momentum_update(model.head, model.key_head, model.config.momentum)
    clips = [views["clip"].transpose(0, 1).flatten(0, 1) for views in both]
    parts = [views["sub_clips"].transpose(0, 1).flatten(0, 2) for views in both]
    colors = [views["color"].transpose(0, 1) for views in both]

    def pass_keys(rows, color, bn, difference, finish):
        """Features by the key encoder of the batches that the deal makes, back in their places: one list a process."""
        batches = [
            [(r, i) for r in range(2) for i in range(len(rows[r])) if (r if bn == "local" else (r + i) % 2) == receiver]
            for receiver in range(2)
        ]
        made = [[None] * len(rows[0]) for _ in range(2)]
        for batch in batches:
            x = model.encoder_input(*(torch.stack([x[r][i] for r, i in batch]) for x in (rows, color)), difference)
            with torch.no_grad():
                for (r, i), features in zip(batch, finish(model.key_encoder(x)), strict=True):
                    made[r][i] = features
        return [torch.stack(features) for features in made]

    for bn in ("shuffle", "local"):
        found = [torch.load(tmp_path / f"{bn}{rank}.pt") for rank in range(2)]
        rgb, difference = ([color.flatten(0, 1)[:, k] for color in colors] for k in range(2))
        sub_clips = [color[:, :, 2:].flatten(0, 2) for color in colors]
        for index, expected in (
            (1, pass_keys(clips, rgb, bn, False, lambda x: x)),
            (2, pass_keys(clips, difference, bn, True, lambda x: x)),
            (3, pass_keys(parts, sub_clips, bn, True, lambda x: model.project(model.key_head, moco.pool(x)))),
        ):
            for rank in range(2):
                torch.testing.assert_close(found[rank][index].flatten(0, 1 + (index == 3)), expected[rank])
    queries = [[torch.load(tmp_path / f"{bn}{rank}.pt")[0] for rank in range(2)] for bn in ("shuffle", "local")]
    assert all(torch.equal(*pair) for pair in zip(*queries, strict=True))  # queries stay where they are


def frozen(**flags):
    """A model whose batch norm and dropout rest, but whose key encoder follows and whose queues are written."""
    model = build(**flags).eval()
    model.training = True
    return model


def slices(views, parts):
    return [{name: view.chunk(parts)[i] for name, view in views.items()} for i in range(parts)]


INSTANCE, ALL_LOSSES = dict(losses="vv,vd"), dict(losses="vv,vd,pix,fra")
VIDEO = dict(pixel_negatives="video", threshold=1.4)  # with which each video has positives, so that all count alike


def step_process(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    views = slices(make_views(batch=4), 2)[rank]
    for name, flags in (
        ("instance", dict(losses="vv,vd")),
        ("batch", ALL_LOSSES),
        ("video", VIDEO),
    ):
        model = frozen(**flags)
        parallel = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        losses = parallel(views)
        torch.stack(list(losses.values())).sum().backward()
        gradients = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
        queues = {k: queue.keys for k, queue in model.queues.items()}
        torch.save([{k: v.detach() for k, v in losses.items()}, gradients, queues], f"{folder}/{name}{rank}.pt")
    processes.end_process()


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_same_batch_but_for_negatives_of_the_mini_batch(tmp_path):
    """L_VV and L_VD of a query depend on its own keys and the queue, which all share: losses, gradients and queues are
    those of one process. L_Pix and L_Fra also take negatives from the mini-batch, and each process has its own.
    """
    torch.multiprocessing.spawn(step_process, (str(tmp_path),), nprocs=2)
    found = {n: [torch.load(tmp_path / f"{n}{rank}.pt") for rank in range(2)] for n in ("instance", "batch", "video")}
    views = make_views(batch=4)

    def of_one_process(batches, **flags):
        parts = [frozen(**flags)(batch) for batch in batches]
        return {name: (sum(part[name] for part in parts) / len(parts)).detach() for name in parts[0]}

    def mean_loss(pair, name):
        return sum(losses[name] for losses, _, _ in pair) / 2

    model, both = frozen(**INSTANCE), found["instance"]
    losses = model(views)
    torch.stack(list(losses.values())).sum().backward()
    for name, value in losses.items():
        torch.testing.assert_close(mean_loss(both, name), value.detach())
    for name, gradient in both[0][1].items():
        expected = model.get_parameter(name).grad
        assert (gradient - expected).norm() <= 1e-3 * expected.norm(), name
        assert torch.equal(gradient, both[1][1][name])
    for name, keys in both[0][2].items():  # the same keys, process by process, not view by view
        assert torch.equal(keys, both[1][2][name])
        order = [0, 1, 4, 5, 2, 3, 6, 7]
        torch.testing.assert_close(keys[:8], model.queues[name].keys[order])
        assert torch.equal(keys[8:], model.queues[name].keys[8:])

    whole, halves = (of_one_process(b, **ALL_LOSSES) for b in ([views], slices(views, 2)))
    for name in ("pix", "fra"):
        torch.testing.assert_close(mean_loss(found["batch"], name), halves[name])
        assert whole[name] > halves[name] + 0.1  # twice the negatives
    whole = of_one_process([views], **VIDEO)
    torch.testing.assert_close(mean_loss(found["video"], "pix"), whole["pix"])  # none of other videos


def test_metrics_show_how_well_the_contrast_does():
    query = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    positive = F.normalize(torch.tensor([[1.0, 0.1], [-1.0, 1.0]]), dim=1)
    shown = moco.contrast_metrics(query, positive, torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.8, 0.6]]))
    assert shown["contrast_accuracy"] == 0.5  # the second query's positive is at right angles
    assert float(shown["positive_similarity"]) == pytest.approx((1 / 1.01**0.5 + 0) / 2)
    assert float(shown["negative_similarity"]) == pytest.approx((0.8 + 1.4 / 2**0.5) / 6)


def test_metrics_are_in_range_and_tell_the_queues_age():
    model = build(losses="vv,vd,pix,fra", foreground=0.3)
    model(make_views())
    metrics = {name: float(value) for name, value in model.metrics.items()}
    for name in ("vv", "vd"):
        assert metrics[f"queue_age/{name}"] == 12 / 6  # keys of 2 views of 3 videos
        assert 0 <= metrics[f"contrast_accuracy/{name}"] <= 1
        assert -1 <= metrics[f"negative_similarity/{name}"] <= 1
    assert metrics["queue_age/fra"] == 12 / 12
    assert metrics["foreground_share"] == pytest.approx(3 / 9)  # ⌈0.3 · 8⌉ of 9 pixels


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(feature_std=0.001), "feature_std"),
        (dict(pixels_with_positive=0.001), "--threshold"),
        (dict(foreground_share=0.1), "foreground_share"),
    ],
    ids=str,
)
def test_collapse_and_misuse_are_warned_of_after_the_first_epoch(wrong, says):
    model, sound = build(), dict(epoch=1.5, feature_std=0.05, pixels_with_positive=0.4, foreground_share=0.5)
    assert model.warnings(sound) == model.warnings(sound | wrong | {"epoch": 1.0}) == []
    (warning,) = model.warnings(sound | wrong)
    assert says in warning


def test_moco_is_fima_without_its_losses():
    views = make_views(sub_clips=0)
    baseline, same = build(moco.MoCo, losses="vv,vd"), build(losses="vv,vd")
    same.load_state_dict(baseline.state_dict())
    expected, losses = baseline(views), same(views)
    assert losses.keys() == expected.keys() == {"vv", "vd"}
    assert all(torch.equal(losses[name], expected[name]) for name in expected)


UNSUITABLE = [dict(crop=16), dict(encoder="i3d", crop=48), dict(frames=12), dict(decoder_heads=5)]


@pytest.mark.parametrize("flags", UNSUITABLE, ids=str)
def test_settings_that_do_not_suit_the_encoder_are_refused_by_name(flags):
    with pytest.raises(UserError, match=f"--{list(flags)[-1]} {list(flags.values())[-1]}"):
        build(**flags)
