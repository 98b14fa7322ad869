"""MCL: motion maps and losses against plain loops, maps in files, sampling, the method, and the command line."""

import copy
import functools
import io
import sys

import helpers
import numpy as np
import pytest
import test_fima
import torch
import torch.nn.functional as F
from helpers import (
    assert_gradients,
    assert_trains,
    encode,
    generator,
    info_nce_loop,
    moving_texture,
    random,
    same,
    views_without_colours,
)
from hypothesis import assume, example, given
from hypothesis import strategies as st

import data
import losses
import mcl
import moco
from models import ENCODERS, last_norms, recorded_inputs
from train import UserError
from video import Video

seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 5)
build = functools.partial(test_fima.build, mcl)
PARTS, VERSIONS = ("st", "s", "t"), ("v1", "v2", "v3")
SWITCHES = [{"losses": name} for name in ("vv", "vv,t", "vv,s", "vv,st", "st,vv")]
SWITCHES += [{"alignment": version} for version in ("v1", "v2")]


def alignment_of(response, motion, part):
    axes, distances = {"st": (), "s": 0, "t": (1, 2)}[part], []
    for pair in zip(response, motion, strict=True):
        r, m = (x / (np.linalg.norm(x) or 1) for x in (np.asarray(maps).mean(axes).ravel() for maps in pair))
        distances.append(((r - m) ** 2).sum())
    return np.mean(distances)


@given(seeds, st.integers(2, 5), st.integers(2, 5), st.floats(-5, 5))
def test_motion_map_does_not_see_an_even_motion_of_the_camera(seed, height, width, camera):
    flow = random(seed, 2, 2, height, width)
    expected = np.sqrt(np.square(np.gradient(flow.numpy(), axis=(2, 3))).sum((0, 2)))
    np.testing.assert_allclose(losses.motion_map(flow), expected, atol=1e-12)
    np.testing.assert_allclose(losses.motion_map(flow + camera), expected, atol=1e-12)


@given(seeds, sizes, sizes, sizes, st.sampled_from(PARTS), st.booleans(), st.floats(0.01, 100))
def test_alignment_knows_no_scales(seed, frames, height, width, part, signed, scale):
    response, motion = (random(seed + k, 3, frames, height, width) for k in (0, 1))
    response, motion = response if signed else response.abs(), motion.abs()
    motion[0] = 0  # a clip that stands still
    value = losses.motion_alignment(response, motion, part)
    assert value.item() == pytest.approx(alignment_of(response, motion, part), abs=1e-12)
    assert 0 <= value <= (4 if signed else 2) + 1e-12
    torch.testing.assert_close(losses.motion_alignment(scale * response, motion / scale, part), value)
    assert losses.motion_alignment(scale * motion[1:], motion[1:], part) < 1e-12
    assert not losses.motion_alignment(response, motion.requires_grad_(), part).requires_grad


def test_responses_of_nothing_give_finite_gradients():
    h, g = torch.ones(1, 2, 2, 2, 2), torch.full((1, 2, 2, 2, 2), -0.1, requires_grad=True)
    still = losses.motion_alignment(losses.response_map(h, g, "v3"), torch.zeros(1, 2, 2, 2))
    dead = losses.motion_alignment(losses.response_map(-h, g * g, "v2"), torch.ones(1, 2, 2, 2))
    assert [still.item(), dead.item()] == pytest.approx([1, 1])
    assert torch.autograd.grad(still, g)[0].abs().max() < 1e-4 and not torch.autograd.grad(dead, g)[0].any()
    assert losses.response_map(h.bfloat16(), g.bfloat16(), "v3").dtype == torch.float32


@given(seeds, st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
def test_moving_windows_are_those_of_a_loop_and_at_least_half_of_all(seed, length, frames, stride):
    movement = torch.randint(6, (length,), generator=generator(seed)).double()
    moving = losses.moving_windows(movement, frames * stride, stride)
    padded = np.pad(movement, (0, max(frames * stride - length, 0)))
    clips = np.lib.stride_tricks.sliding_window_view(padded, frames * stride)[:, ::stride].mean(1)
    clear = abs(clips - np.median(clips)) > 1e-9
    assert len(moving) == len(clips) and 2 * moving.sum() >= len(clips)
    assert (moving.numpy() == (clips > np.median(clips)))[clear].all()


@given(seeds, sizes, sizes, sizes, st.tuples(*[st.floats(0, 0.5)] * 4), st.booleans())
@example(0, 5, 3, 4, (0, 0, 0.5, 0.5), True)  # the whole frame
def test_motion_of_a_crop_is_that_of_a_loop(seed, height, width, size, corners, flip):
    motion, (x0, y0, x1, y1) = random(seed, 3, height, width), np.add(corners, (0, 0, 0.5, 0.5)).tolist()
    cropped = losses.crop_motion(motion, torch.tensor([x1, y0, x0, y1] if flip else [x0, y0, x1, y1]), size)
    for i, j in np.ndindex(size, size):
        along = (size - 1 - j if flip else j) + 0.5
        x, y = x0 + along / size * (x1 - x0), y0 + (i + 0.5) / size * (y1 - y0)
        assume(min(abs(x * width - round(x * width)), abs(y * height - round(y * height))) > 1e-5)
        assert torch.equal(cropped[:, i, j], motion[:, int(y * height), int(x * width)])


def keeping(maps, root, **options):
    """Motion maps of videos below a folder, of which each has these."""
    found = mcl.MotionMaps(mcl.MapsConfig(dataset="folder", data=str(root), **options))
    found.compute = lambda path: maps
    return found


@pytest.mark.parametrize("scale", [0, 1, 1000])
def test_maps_are_made_once_and_kept_to_a_510th_of_their_greatest_square_root(tmp_path, scale):
    (video := tmp_path / "a.mp4").touch()
    maps = scale * random(0, 7, 3, 4).abs().float().numpy() ** 3
    found = keeping(maps, tmp_path).read(str(video), 7)
    assert found.dtype == np.float32 and found.max() == bool(scale)
    np.testing.assert_allclose(found**0.5, (maps / max(maps.max(), 1e-9)) ** 0.5, atol=1 / 509)
    np.testing.assert_array_equal(keeping(None, tmp_path).read(str(video), 7), found)


def test_maps_of_another_video_or_flow_are_not_taken_and_damaged_ones_named_without_running_code(tmp_path):
    (video := tmp_path / "a.mp4").touch()
    for frames, flags in ((4, {}), (5, {"flow_side": 32}), (6, {"flow_warps": 1})):
        assert len(keeping(np.ones((frames, 3, 3)), tmp_path, **flags).read(str(video), frames)) == frames
    video.write_bytes(b"123456")  # a file of another size
    maps = keeping(np.ones((7, 3, 3)), tmp_path)
    assert len(maps.read(str(video), 7)) == 7
    with pytest.raises(UserError, match=r"a\.mp4\.6\.npz is damaged.*7 frames, the video has 9"):
        maps.read(str(video), 9)
    whole = maps.file(str(video)).read_bytes()
    np.savez(objects := io.BytesIO(), np.array([None] * 7))
    for damaged in (whole[:-40], b"", b"no numbers", whole[:70] + b"\xff" * 20 + whole[90:], objects.getvalue()):
        maps.file(str(video)).write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.mp4\.6\.npz is damaged"):
            maps.read(str(video), 7)


def difference_flow(images, side, warps):
    """In place of TV-L1: what changes flows to the right."""
    change = torch.from_numpy(np.stack(images)).float().mean(3)[:, ::2, ::2].diff(dim=0) / 32
    return torch.stack([change, 0 * change], 1)


@pytest.fixture
def without_flow(monkeypatch):
    monkeypatch.setattr(mcl, "tvl1_flow", difference_flow)
    monkeypatch.setattr(torch.multiprocessing, "Process", helpers.FORK.Process)  # which inherit what is patched


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 60, 20 and 70 frames, one of them in a folder below, and a file that is none."""
    root = tmp_path_factory.mktemp("mcl") / "clips"
    (root / "below").mkdir(parents=True)
    for name, frames in (("a", 60), ("below/b", 20), ("c", 70)):
        encode(root / f"{name}.mp4", moving_texture(frames, 48, 64), "mpeg4")
    (root / "not a video.mp4").write_bytes(b"nothing")
    return root


def test_a_motion_map_is_that_of_each_pair_of_frames_averaged_over_cells(folder, without_flow):
    found = mcl.MotionMaps(mcl.MapsConfig(data=str(folder))).compute(str(folder / "c.mp4"))
    with Video(folder / "c.mp4") as opened:
        images = opened.read(range(70))  # more than are read at once
    expected = F.adaptive_avg_pool2d(losses.motion_map(difference_flow(images, 0, 0)), (24, 32))
    np.testing.assert_array_equal(found, torch.cat([expected, expected[-1:]]))


@pytest.mark.slow
def test_the_command_makes_the_maps_that_are_missing_and_names_what_it_cannot_read(folder, without_flow, in_process):
    made, names = folder.parent / "clips_maps" / "flow_120_5", ("a.mp4", "below/b.mp4", "c.mp4")
    files = [made / f"{name}.{(folder / name).stat().st_size}.npz" for name in names]
    mcl.MotionMaps(mcl.MapsConfig(data=str(folder))).visit(str(folder / "a.mp4"))
    before = files[0].stat().st_mtime_ns
    code, out, err = in_process(mcl, "maps", "--dataset=folder", "--workers=2", "--data", folder)
    assert code == 0 and f"maps of 3 videos; 1 can't be read: {made}/bad_videos.txt" in out and "4/4" in err
    assert (made / "bad_videos.txt").read_text().startswith("'not a video.mp4'\t")
    assert {*made.rglob("*.*")} == {*files, made / "bad_videos.txt"} and files[0].stat().st_mtime_ns == before


@pytest.mark.parametrize("scale", [1, 2])
def test_flow_of_an_even_shift_is_the_shift_in_reduced_pixels(scale):
    pytest.importorskip("skimage")
    smooth = F.interpolate(torch.rand(1, 3, 24, 24, generator=generator(0)), (96, 96), mode="bicubic")
    picture = (smooth[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    flow = mcl.tvl1_flow([picture[20 - t : 68 - t, 20 - 2 * t : 68 - 2 * t] for t in range(3)], 48 // scale)
    assert flow.shape == (2, 2, 48 // scale, 48 // scale) and flow.dtype == torch.float32
    inside = flow[:, :, 8 // scale : -8 // scale, 8 // scale : -8 // scale]
    assert inside.mean((0, 2, 3)).tolist() == pytest.approx([2 / scale, 1 / scale], abs=0.1)


@pytest.fixture(scope="module")
def moving(folder):
    """The first two videos, and maps as if only the middle right moved, in their second half."""
    paths = [str(folder / name) for name in ("a.mp4", "below/b.mp4")]
    for path, frames in zip(paths, (60, 20), strict=True):
        motion = np.full((frames, 24, 32), 0.01, np.float32)
        motion[frames // 2 :, 8:14, 20:26] = 1
        (maps := keeping(motion, folder, flow_side=100)).visit(path)
    return data.VideoList(paths, [0, 1], ["a", "b"], ""), maps


def moving_views(moving, temporal=True, spatial=True, **options):
    videos, maps = moving
    options = dict(crop=16, frames=8, frame_stride=2, sub_clips=0, min_scale=0.1) | options
    return mcl.MotionViews(videos, **options, maps=maps, temporal=temporal, spatial=spatial)


def test_crops_hold_what_moves_or_are_those_of_every_method(moving):
    x, y = (torch.arange(20, 26) + 0.5) * 2, (torch.arange(8, 14) + 0.5)[:, None] * 2  # what moves, in pixels
    shares, plain = {}, data.PretrainingViews(moving[0], 16, 8, 2, 0, min_scale=0.1)
    for focus in (True, False):
        items = [moving_views(moving, focus, focus)[epoch, 0] for epoch in range(40)]
        boxes = torch.cat([item["box"] for item in items])
        x0, y0, x1, y1 = boxes[:, :, None, None].unbind(1)
        held = (y0 <= y) & (y <= y1) & (torch.minimum(x0, x1) <= x) & (x <= torch.maximum(x0, x1))
        shares[focus] = held.float().mean((1, 2)).quantile(0.05)
        assert len(boxes.unique(dim=0)) == 80
    assert shares[True] >= 0.8 and shares[False] == 0
    assert all(same(item, plain[epoch, 0] | {"motion": item["motion"]}) for epoch, item in enumerate(items[:3]))


@given(length=st.integers(2, 20), windows=st.integers(1, 3), temporal=st.booleans(), seed=seeds)
def test_windows_that_move_differ_as_far_as_the_video_has_others(moving, length, windows, temporal, seed):
    motion = np.random.default_rng(seed).random((length, 4, 4), dtype=np.float32)
    views = moving_views(moving, temporal, frames=4, windows=windows)
    views.maps = type("Given", (), {"read": lambda maps, path, frames: motion})()
    video = type("OfLength", (), {"path": "", "__len__": lambda video: length})()
    starts = views.draw_starts(np.random.default_rng(seed), video)
    among = losses.moving_windows(torch.from_numpy(motion).mean((1, 2)), 8, 2)
    assert len(set(starts)) == min(windows, len(among)) and starts.shape == (windows,)
    assert not temporal or among.sum() < windows or among[starts].all()


@pytest.mark.parametrize(("index", "length", "frames"), [(0, 60, 8), (1, 20, 16)], ids=["long", "short"])
def test_the_motion_of_a_sample_is_that_of_its_frames_and_box(moving, index, length, frames, requested):
    """Where a short video is continued, it stands still."""
    videos, maps = moving
    sample = moving_views(moving, frames=frames)[3, index]
    whole = F.pad(torch.from_numpy(maps.read(videos.paths[index], length)), (0, 0, 0, 0, 0, 32))
    for first, box, motion in zip(requested[0][::frames], sample["box"], sample["motion"], strict=True):
        expected = losses.crop_motion(whole[first : first + 2 * frames : 2], box / torch.tensor([64, 48, 64, 48]), 28)
        assert torch.equal(motion, expected) and expected.any()


def test_a_still_video_and_motion_that_no_crop_can_hold_give_views(moving):
    videos, maps = moving
    still, corners = np.zeros((2, 60, 24, 32), np.float32)
    corners[:, ::23, ::31] = 1  # each crop leaves some of them out
    for motion, side in ((still, 16), (corners, 17)):
        views = moving_views((videos, keeping(motion, maps.config.data, flow_side=side)))
        items = [views[epoch, 0] for epoch in range(5)]
        assert len({tuple(item["box"][0].tolist()) for item in items}) == 5
        assert motion.any() or not any(item["motion"].any() for item in items)


def make_views(batch=3, **options):
    views = views_without_colours(batch=batch, sub_clips=0, **options)
    return views | {"motion": torch.rand(batch, 2, 16, 28, 28, generator=generator(0))}


def oracle(model, views):
    """The losses of conv4, without its batch norm's statistics of a batch, one clip a forward, in float64."""
    model = copy.deepcopy(model).double().eval()
    layers, norm_and_relu = model.encoder.layers[:-2], model.encoder.layers[-2:]
    queries, keys, responses, motion = [], [], [], []
    for view, n in np.ndindex(2, len(views["clip"])):
        clip, other = (test_fima.shown(views["clip"][n, v]) for v in (view, 1 - view))
        h = layers(clip).detach().requires_grad_()
        query = F.normalize(model.head(norm_and_relu(h).mean((2, 3, 4))[0]), dim=-1)
        key = F.normalize(model.key_head(model.key_encoder(other).mean((2, 3, 4))[0]), dim=-1)
        queries.append(query.tolist())
        keys.append(key.tolist())
        (g,) = torch.autograd.grad(query @ key.detach(), h)
        h, g = h[0].detach().numpy(), g[0].numpy()
        weighed = np.maximum(np.tensordot(g.mean((1, 2, 3)), g if model.config.alignment == "v3" else h, 1), 0)
        responses.append(h.sum(0) if model.config.alignment == "v1" else weighed)
        t, i, j = h.shape[1:]
        motion.append(views["motion"][n, view].double().reshape(t, 16 // t, i, 28 // i, j, 28 // j).mean((1, 3, 5)))
    found = {"vv": info_nce_loop(queries, keys, model.queues["vv"].keys.tolist(), model.config.temperature)}
    unrelated = motion[-1:] + motion[:-1]  # another video's
    for part in PARTS:
        found[part] = alignment_of(responses, motion, part)
        found[f"chance/{part}"] = alignment_of(responses, unrelated, part)
    return found


@pytest.mark.parametrize("version", VERSIONS)
def test_losses_equal_the_plain_loop_oracle(version):
    model, views = build(alignment=version, temperature=0.2), make_views()
    with torch.no_grad():
        for _ in range(3):
            model.encoder(torch.randn(4, 3, 16, 32, 32))  # statistics other than 0 and 1
        model.key_encoder.load_state_dict(model.encoder.state_dict())
        for parameter in [*model.encoder.parameters(), *model.head.parameters()]:
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    model.eval()
    found = model(views)
    assert list(found) == ["vv", "t", "s", "st"]
    for name, value in oracle(model, views).items():
        assert torch.as_tensor((found | model.metrics)[name]).item() == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_temporal_and_spatial_sampling_are_switched_each_by_its_own_flag():
    videos = data.VideoList(["a.mp4"], [0], ["a"], "")
    for temporal, spatial in ((True, False), (False, True)):
        kinds = {"temporal_sampling": temporal, "spatial_sampling": spatial}
        views = build(**{name: "motion" if on else "random" for name, on in kinds.items()}).make_views(videos)
        assert (views.temporal, views.spatial) == (temporal, spatial)


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    model, plain, views = build(**flags), build(), make_views()
    torch.manual_seed(0)
    found = model(views)
    torch.manual_seed(0)
    reference = plain(views)
    assert_trains(model, found)
    assert not same(found, reference)
    torch.manual_seed(0)
    assert torch.equal(found["vv"], test_fima.build(moco)(views)["vv"])  # the rest is added


@pytest.mark.parametrize("training", [False, True], ids=["fixed batch norm", "training"])
@pytest.mark.parametrize("version", VERSIONS)
def test_the_gradient_of_alignment_is_that_of_finite_differences(version, training):
    model, views = build(alignment=version).double(), make_views()
    model.eval().encoder.train(training)
    views["motion"] = views["motion"].double()
    assert_gradients(model, views, ("vv", *PARTS))


def test_moments_are_not_compared_where_there_is_one():
    views = make_views()
    views |= {"clip": views["clip"][:, :, :, ::2], "motion": views["motion"][:, :, ::2]}
    with pytest.raises(UserError, match="--losses t needs feature maps of several frames: raise --frames 8"):
        build(frames=8)(views)
    assert build(frames=8, losses="vv,s,st")(views).keys() == {"vv", "s", "st"}


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "s3d")) for x in ENCODERS])
def test_every_encoder_is_aligned_at_its_last_convolution_in_either_memory_format(name):
    sizes = {"s3d": (1.0, 64), "i3d": (0.125, 64), "i3d_piergiaj": (0.125, 64), "conv4": (0.25, 32)}
    width, crop = sizes.get(name, (0.0625, 48))
    views, results = make_views(batch=2, crop=crop), []
    views |= {"clip": views["clip"][:, :, :, ::2], "motion": views["motion"][:, :, ::2]}
    for options in ({}, dict(memory_format="contiguous"), dict(activation_checkpointing="on")):
        model = build(encoder=name, width=width, crop=crop, batch_size=2, frames=8, losses="vv,s,st", **options)
        with recorded_inputs(last_norms(model.encoder)) as features:
            maps = model.encoder(torch.randn(2, 3, 8, crop, crop, generator=generator(0)))
        assert sum(h.shape[1] for h in features) == model.encoder.out_channels
        assert all(h.shape[2:] == maps.shape[2:] for h in features)
        assert not any(module._forward_pre_hooks for module in model.modules())
        torch.manual_seed(0)
        found = model(views)
        (found["s"] + found["st"]).backward()
        gradient = next(model.encoder.parameters()).grad.norm()
        results.append([found["s"].item(), found["st"].item(), gradient.item()])
    assert results[0] == pytest.approx(results[1], rel=2e-2) and results[0][-1] > 0
    assert results[0] == results[2]  # its gradient's gradient, too


@pytest.mark.parametrize("loader", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_without_motion_nothing_asks_for_maps_and_with_it_one_line_for_scikit_image(run, loader, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    monkeypatch.setattr(torch.multiprocessing, "Process", helpers.FORK.Process)
    flags = [*helpers.CONV4, "--max_steps=1", f"--workers={loader}", "--maps=maps"]
    run.refused(mcl, *flags, dataset="folder", says=["pip install scikit-image"])
    flags += ["--losses=vv", "--temporal_sampling=random", "--spatial_sampling=random"]
    run.ok(mcl, *flags, dataset="folder")
