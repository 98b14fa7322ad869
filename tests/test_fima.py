"""FIMA, MoCo and FAME as a whole: against a plain-loop oracle of the paper, gradients, queues, and every switch."""

import copy
import itertools
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from conftest import options_of
from helpers import (
    ALONE,
    assert_gradients,
    assert_trains,
    info_nce_loop,
    join_group,
    make_views,
    mean,
    processes,
    same,
    weights,
    with_equal_features,
)
from test_losses import frame_info_nce_loop, frame_triplet_loop, pixel_contrast_loop

import augment
import cli
import fame
import fima
import moco
import train
from augment import ForegroundBackgroundMerging as Merging

TINY = dict(encoder="conv4", width=0.25, crop=32, queue=12, batch_size=3)
R3D = dict(encoder="r3d_18", width=0.0625, crop=48)  # whose feature pixels look far beside the middle of their bins
SWITCHES = [dict(losses=losses) for losses in ("vv", "vv,vd", "vv,fra")] + [dict(losses="vv,pix", decoder="none")]
SWITCHES += [dict(decoder_depth=1), dict(decoder_width=16), dict(decoder_heads=8), dict(decoder="separate")]
SWITCHES += [dict(mask_position=position) for position in ("none", "prediction", "target")] + [dict(foreground=0.3)]
SWITCHES += [dict(mask_source="rgb"), dict(mask_source="difference"), dict(threshold=2.8), dict(pixel_queue=40)]
SWITCHES += [dict(color_first="on"), dict(frame_loss="triplet"), dict(frame_loss="mse"), dict(pixel_negatives="video")]
SWITCHES += [dict(difference="spans"), dict(centres="measured", **R3D), dict(encoder="i3d", width=0.0625, crop=64)]
ORACLES = [dict(threshold=1.4, foreground=0.3), dict(centres="measured", **R3D), dict(pixel_negatives="video")]
ORACLES += [dict(mask_source=x) for x in ("rgb", "difference")] + [dict(frame_loss=x) for x in ("triplet", "mse")]
ORACLES += [dict(mask_position=x) for x in ("none", "prediction", "target")]
ORACLES += [dict(decoder="separate"), dict(decoder="none", losses="vv,vd,pix")]
STEPS = {
    "instance": dict(losses="vv,vd"),
    "accumulated": dict(losses="vv,vd", batch_size=1, accumulate=2),
    "video": dict(pixel_negatives="video", threshold=1.4),  # each video has positives, so that all count alike
}


def build(module=fima, **flags):
    """A small method, with the weights of seed 0."""
    torch.manual_seed(0)
    method, config, *_ = options_of(module)
    own = dict(decoder_width=32) if module is fima else {}
    return method(config(**TINY | own | flags))


def shown(clip, color=None, difference=False):
    """What an encoder is given of one uint8 clip (3, T, H, W): float64 (1, 3, T, H, W)."""
    clip = clip.double()[None] / 255
    if difference:
        steps = [(clip[:, :, t + 1] - clip[:, :, t] + 1) / 2 for t in range(clip.shape[2] - 1)]
        clip = torch.stack([*steps, steps[-1]], 2)
    return augment.normalize(clip if color is None else augment.color_augment(clip, color.double()[None]))


def follow(model):
    """Moves the key encoder and its head towards those of the queries (MoCo, Eq. 2)."""
    for query, key in ((model.encoder, model.key_encoder), (model.head, model.key_head)):
        for asked, moved in zip(query.parameters(), key.parameters(), strict=True):
            moved.lerp_(asked, 1 - model.config.momentum)


@torch.no_grad()
def apart(model, views):
    """Has features of clips differ, as those of initial weights hardly do, and queries from keys."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            module.momentum = 1.0  # statistics of the clips alone
    for encoder in (model.encoder, model.key_encoder):
        encoder(model.encoder_input(model.both(views["clip"]), None))
    for name, parameter in model.named_parameters():
        if not name.startswith("key_"):
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.03 * torch.randn_like(parameter))


@torch.no_grad()
def oracle(model, views):
    """The losses of Eq. 1, 2, 8 and 10 by loops over views, videos, frames and pixels, one clip a forward, in float64;
    the keys that come into the queues, view by view; and the share of pixels with a positive."""
    model = copy.deepcopy(model).double().eval()
    config, frames, videos, stride = model.config, range(2), range(len(views["clip"])), model.encoder.strides[1]
    size = config.crop // stride
    old, tau = {name: queue.keys.tolist() for name, queue in model.queues.items()}, config.temperature
    follow(model)

    def g(head, x):
        return F.normalize(head.net(x), dim=-1).tolist()

    def foreground(b, v):
        sources = {"rgb": [key], "difference": [motion], "both": [key, motion]}[config.mask_source]
        z = sum(maps[b, v].mean((0, 1)) for maps in sources).flatten()
        return z > torch.quantile(z, 1 - config.foreground)

    def centers(box):
        beside = model.encoder.offsets[1] if config.centres == "measured" else 0
        places = [[stride * (i + 0.5) + beside for i in (c, r)] for r in range(size) for c in range(size)]
        return box[:2] + torch.tensor(places, dtype=torch.float64) / config.crop * (box[2:] - box[:2])

    clips = {(b, v): (views["clip"][b, v], views["color"][b, v]) for b in videos for v in range(2)}
    query = {at: model.encoder(shown(clip, color[0]))[0] for at, (clip, color) in clips.items()}
    key = {at: model.key_encoder(shown(clip, color[0]))[0] for at, (clip, color) in clips.items()}
    motion = {at: model.key_encoder(shown(clip, color[1], difference=True))[0] for at, (clip, color) in clips.items()}
    q, y_cls, targets, pix, rows = [], [], {"vv": [], "vd": [], "fra": [], "pix": []}, [], []
    for v, other in ((0, 1), (1, 0)):
        y, m, positives = [], [], []
        for b in videos:
            q.append(g(model.head, query[b, v].mean((1, 2, 3))))
            targets["vv"].append(g(model.key_head, key[b, other].mean((1, 2, 3))))
            targets["vd"].append(g(model.key_head, motion[b, other].mean((1, 2, 3))))
            boxes = [views["box"][b, view].double() for view in (v, other)]
            diagonal = max((box[2:] - box[:2]).norm() / size for box in boxes)
            pairs = torch.cdist(*map(centers, boxes)) / diagonal < config.threshold
            if config.mask_position in ("prediction", "both"):
                pairs = pairs & foreground(b, v)[:, None]
            if config.mask_position in ("target", "both"):
                pairs = pairs & foreground(b, other)
            for i in frames:
                source, target = (query[b, view][:, i].flatten(1).T[None] for view in (v, other))
                found = (source, source[:, 0]) if config.decoder == "none" else model.decoder(source, target)
                y.append(g(model.head, found[0][0]))
                m.append(g(model.key_head, motion[b, other][:, i].flatten(1).T))
                positives.append(pairs.tolist())
                found = model.cls_decoder(source, target) if config.decoder == "separate" else found
                y_cls.append(g(model.head, found[1][0]))
                clip, color = views["sub_clips"][b, other, i], views["color"][b, other, 2 + i]
                sub_clip = model.key_encoder(shown(clip, color, difference=True))[0]
                targets["fra"].append(g(model.key_head, sub_clip.mean((1, 2, 3))))
        keys = [*itertools.chain(*m), *old["pix"]]
        if config.pixel_negatives == "video":
            keys = [[*m[n // 2 * 2], *m[n // 2 * 2 + 1], *old["pix"]] for n in range(len(m))]
        pix.append(pixel_contrast_loop(y, m, positives, keys, tau))
        targets["pix"] += itertools.chain(*m)
        rows += [any(row) for pairs in positives for row in pairs]
    losses = {name: info_nce_loop(q, targets[name], old[name], tau) for name in ("vv", "vd")} | {"pix": mean(pix)}
    if "fra" in config.terms:
        kinds = {"infonce": lambda *pairs: frame_info_nce_loop(*pairs, tau), "triplet": frame_triplet_loop}
        kinds["mse"] = lambda y, targets, _: mean([math.dist(*pair) ** 2 for pair in zip(y, targets, strict=True)])
        losses["fra"] = kinds[config.frame_loss](y_cls, targets["fra"], old["fra"])
    of_views = {name: [*rows[len(rows) // 2 :], *rows[: len(rows) // 2]] for name, rows in targets.items()}
    return losses, {name: of_views[name] for name in old}, mean(rows)


@pytest.mark.parametrize("flags", ORACLES, ids=str)
def test_losses_equal_the_plain_loop_oracle_and_queues_are_written_after_them(flags):
    """So no key of a step's own is a negative in it. Keys follow the queries by momentum. MoCo is FIMA without its
    losses. An evaluation changes nothing."""
    own = dict(momentum=0.5, temperature=0.2, **{name: flags[name] for name in flags if name in R3D})
    model = build(**dict(losses="vv,vd,pix,fra", pixel_queue=50) | own | flags)
    baseline = build(moco, losses="vv,vd", **own)
    views, pixels = make_views(crop=model.config.crop), (model.config.crop // model.encoder.strides[1]) ** 2
    apart(model, views)
    baseline.load_state_dict(model.state_dict(), strict=False)
    before = {name: queue.keys for name, queue in model.queues.items()}
    expected, keys, share = oracle(model, views)
    model.eval().training = baseline.eval().training = True  # batch norm and dropout rest
    losses = model(views)
    assert (*losses,) == model.config.terms == (*expected,)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=2e-4), name
    alone = baseline(views)
    assert list(alone) == ["vv", "vd"] and all(torch.equal(value, losses[name]) for name, value in alone.items())
    assert set(keys) == {*model.config.terms}
    for name, queue in model.queues.items():
        latest = torch.cat([before[name], torch.tensor(keys[name])])[-len(queue.keys) :]
        torch.testing.assert_close(queue.keys.roll(-int(queue.pointer), 0), latest, rtol=0, atol=2e-4)
    assert model.metrics["queue_age/vv"] == 12 / 6 and model.metrics.get("queue_age/fra", 1) == 12 / 12
    if model.config.mask_position != "none":
        held = pixels - 1 - int((1 - model.config.foreground) * (pixels - 1))  # those above the quantile
        assert float(model.metrics["foreground_share"]) == pytest.approx(held / pixels)
    assert float(model.metrics["pixels_with_positive"]) == pytest.approx(share) and 0 < share < 1
    torch.stack(list(losses.values())).sum().backward()  # the keys that losses have read are still there
    state = copy.deepcopy(model.eval().state_dict())
    model(views)
    assert same(model.state_dict(), state)


def test_gradients_are_those_of_finite_differences():
    model = build(losses="vv,vd,pix,fra").double().eval()  # keys and masks rest
    assert_gradients(model, make_views(crop=32), ("vv", "vd", "pix", "fra"))


def test_batch_norm_of_keys_goes_by_their_batch():
    model, modes = build(losses="vv,vd,pix,fra"), []
    model.key_encoder.register_forward_pre_hook(lambda encoder, _: modes.append(encoder.training))
    model(make_views(crop=32))
    assert modes == [True] * 3  # clips, differences, sub-clips


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    own = {name: value for name, value in flags.items() if name in ("losses", *R3D)}
    model, plain = build(**flags), build(**own)  # of the same losses and encoder without the switch
    views = make_views(crop=model.config.crop)
    torch.manual_seed(0)
    losses = model(views)
    torch.manual_seed(0)
    reference = plain(views)
    assert_trains(model, losses)
    assert own == flags or not same(losses, reference)


def test_chance_values_are_what_equal_features_give():
    for kind in ("infonce", "triplet"):
        model = with_equal_features(build(losses="vv,vd,pix,fra", frame_loss=kind))
        for name, value in model(make_views(crop=32)).items():
            assert value.item() == pytest.approx(float(model.metrics[f"chance/{name}"]), abs=1e-4), name
        assert model.metrics["feature_std"] < 1e-6


@pytest.mark.slow
def test_what_compile_compiles_is_one_graph_and_gives_the_same():
    model, views = build(crop=16), make_views(crop=16)
    clips, color = views["clip"].flatten(0, 1), views["color"].flatten(0, 1)[:, 0]

    def whole(clips, color):
        return model.encoder(model.encoder_input(clips, color, difference=True))

    compiled = torch.compile(whole, fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(compiled(clips, color), whole(clips, color), atol=1e-4, rtol=1e-4)


def test_keys_are_made_before_the_query_pass_of_clips_dealt_out_with_their_colours_and_put_back(monkeypatch):
    """Before, as its graph takes memory."""
    model, local, views, log = build().eval(), build(bn="local").eval(), make_views(crop=32), []
    monkeypatch.setattr(moco, "deal", lambda x, back=False: log.append((len(x), back)) or x.roll(-1 if back else 1, 0))
    expected = local(views)
    assert not log
    model.key_encoder.register_forward_hook(lambda *_: log.append("key"))
    model.encoder.register_forward_hook(lambda *_: log.append("query"))
    for name, value in model(views).items():  # batch norm rests: it makes no difference who is in a batch
        torch.testing.assert_close(value, expected[name])
    clips, sub_clips = ([(n, False), (n, False), "key", (n, True)] for n in (6, 12))  # with their colours
    assert log == [*clips, *clips, "query", *sub_clips]  # RGB, difference


def step(name, process=ALONE, part=slice(None), times=1, **options):
    """Losses, gradients, queues and weights of a step, the last of so many, in float64 and without the chances of batch
    norm and dropout, on part of a batch."""
    model = build(**STEPS[name] | options).double()
    model.encoder_input = lambda clips, color, difference=False: augment.normalize(clips.double() / 255)
    model.project = lambda head, features: F.normalize(head(features), dim=-1)
    run = train.Run(model, model.config, process, 4)
    model.eval().training = True  # the key encoder follows, and queues are written
    for _ in range(times):
        found = run.step({name: view[part] for name, view in make_views(4, crop=32).items()}).numbers
    losses = {name: value for name, value in found.items() if name.startswith("loss/")}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return losses, gradients, {k: queue.keys for k, queue in model.queues.items()}, model.state_dict()


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_give_the_gradients_the_weights_and_the_queues_of_one_batch(parts):
    """L_VV and L_VD don't see who else is in a batch, nor does L_Pix here; L_Fra does, its queue is the same."""
    batches = dict(batch_size=4), dict(batch_size=4 // parts, accumulate=parts)
    one, many = (step("instance", **batch, times=2, lr=3.0) for batch in batches)
    torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12)
    fresh, (*_, state) = build().double().state_dict(), one
    assert not any(torch.equal(fresh[name], state[name]) for name in ("key_head.net.0.weight", "head.net.0.weight"))
    one, many = (step("video", **batch, times=2, lr=0.0, losses="vv,vd,pix,fra", pixel_queue=50) for batch in batches)
    torch.testing.assert_close(many[2:], one[2:], rtol=1e-9, atol=1e-12)
    del one[0]["loss/fra"], many[0]["loss/fra"]
    torch.testing.assert_close(many[0], one[0], rtol=1e-9, atol=1e-12)


def group_process(rank: int, folder: str) -> None:
    join_group(rank, folder)
    for name in STEPS:
        process, part = train.Process(rank, 2, torch.device("cpu")), slice(2 * rank, 2 * rank + 2)
        torch.save(step(name, process, part), f"{folder}/{name}{rank}.pt")
    method = build(moco)
    run = train.Run(method, method.config, process, 4)
    method.encoder.layers[1].running_mean.fill_(1.0 + rank)
    run.save(Path(folder), {})
    cli.end_process()


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_the_same_batch(tmp_path):
    """L_VV and L_VD of a query depend on its own keys and the queue, which all share, L_Pix here on its own video."""
    processes(group_process, str(tmp_path), count=2)
    found = {name: [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)] for name in STEPS}
    losses, gradients, queues, _ = step("instance")
    order = [0, 1, 4, 5, 2, 3, *range(6, 12)]  # the same keys, process by process, not view by view
    expected = losses, gradients, {name: keys[order] for name, keys in queues.items()}
    for one, other in (found["instance"], found["accumulated"]):
        assert same(one[1:], other[1:])
        means = {name: (value + other[0][name]) / 2 for name, value in one[0].items()}
        torch.testing.assert_close((means, *one[1:3]), expected)
    halves = [losses["loss/pix"] for losses, *_ in found["video"]]
    assert sum(halves) / 2 == pytest.approx(step("video")[0]["loss/pix"])
    assert (weights(tmp_path / "checkpoint.pt")["model"]["encoder.layers.1.running_mean"] == 1.5).all()


def test_metrics_show_how_well_the_contrast_does():
    model = build(moco)
    model.head = model.key_head = torch.nn.Identity()
    query, key = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[-1, 1], [1, 0.1]])  # of either view
    model.queues["vv"].keys = torch.tensor([[0, 1], [0, -1], [0.8, 0.6]])
    model.instance_losses(moco.FeatureMaps(*(x[:, None, :, None, None, None] for x in (query, key)), None))
    assert model.metrics["contrast_accuracy/vv"] == 0.5  # the second query's positive is at right angles
    assert float(model.metrics["positive_similarity/vv"]) == pytest.approx((1 / 1.01**0.5 + 0) / 2)
    assert float(model.metrics["negative_similarity/vv"]) == pytest.approx((0.8 + 1.4 / 2**0.5) / 6)


def test_collapse_and_misuse_are_warned_of():
    model, at_once = build(), {"queue_age/vv": (16, "--queue"), "overlap": (0.9, "--frames")}
    later = dict(feature_std=(0.005, "feature_std"), pixels_with_positive=(0.001, "--threshold"))
    later |= dict(foreground_share=(0.1, "foreground_share"))
    sound = dict(step=45, epoch=1.5, feature_std=0.05, pixels_with_positive=0.4, foreground_share=0.5, overlap=0.7)
    assert model.warnings(sound | {"queue_age/vv": 15}) == model.warnings(dict(step=45, epoch=1.5)) == []
    for name, (value, says) in (at_once | later).items():
        (warning,) = model.warnings(sound | {name: value})
        assert says in warning
        assert len(model.warnings(sound | {name: value} | dict(epoch=1.0, step=30))) == (name in at_once)


def test_fame_is_moco_on_merged_clips():
    assert build(fame, background="intra", batch_size=1)  # which needs no other video
    views, plain = make_views(sub_clips=0, crop=32), build(moco)
    variants = [dict(branches="both", foreground=0.3), dict(background="intra"), dict(background="none")]
    for flags in (*variants, *(dict(mask=mask) for mask in Merging.MASKS)):
        model = build(fame, **flags)
        torch.manual_seed(0)
        expected = copy.deepcopy(plain)(views | {"clip": Merging(**flags)(views["clip"])})
        torch.manual_seed(0)
        assert torch.equal(model(views)["vv"], expected["vv"])


@pytest.mark.parametrize("branches", Merging.BRANCHES)
def test_rgb_is_merged_and_motion_is_that_of_the_video_itself(branches):
    model, views = build(fame=branches), make_views(crop=32)
    model.encoder_input = Mock(wraps=model.encoder_input)
    torch.manual_seed(0)
    assert_trains(model, model(views))
    torch.manual_seed(0)
    entries = Merging(branches=branches)(views["clip"]), views["clip"], views["sub_clips"]
    merged, clips, sub_clips = map(model.both, entries)
    given = [(call.args[0], call.kwargs.get("difference", False)) for call in model.encoder_input.call_args_list]
    assert same(given, [(merged, False), (clips, True), (sub_clips.flatten(0, 1), True)])
