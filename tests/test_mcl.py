"""MCL: motion maps and losses against plain loops, maps in files, sampling, the method, and the command line."""

import copy
import errno
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONV4
from encoding import encode, moving_texture
from helpers import generator, info_nce_loop, mean, one_line, views_without_colours
from hypothesis import assume, given
from hypothesis import strategies as st

import augment
import cli
import data
import find
import losses
import mcl
import moco
import pretrain
from models import ENCODERS, last_norms, recorded_inputs
from train import UserError
from video import BadVideo, Video

seeds, sizes = st.integers(0, 2**32 - 1), st.integers(1, 5)
TINY = dict(encoder="conv4", width=0.25, crop=32, queue=12, batch_size=3)
PARTS = ("st", "s", "t")


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def positive(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=generator(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- oracles: loops over positions


def derivative_loop(field, axis, i, j):
    """Central difference of field[i][j] along an axis, one-sided at the border."""
    place, length = (i, j)[axis], field.shape[axis]
    low, high = max(place - 1, 0), min(place + 1, length - 1)
    at = (lambda k: float(field[k, j])) if axis == 0 else (lambda k: float(field[i, k]))
    return (at(high) - at(low)) / (high - low)


def pooled_loop(maps, part):
    """One map (T, H, W) → list of floats."""
    frames, height, width = maps.shape
    if part == "s":
        return [mean([float(maps[t, i, j]) for t in range(frames)]) for i in range(height) for j in range(width)]
    if part == "t":
        return [mean([float(maps[t, i, j]) for i in range(height) for j in range(width)]) for t in range(frames)]
    return maps.flatten().tolist()


def response_loop(h, g, version):
    """Of one clip, (C, T, H, W) each."""
    result = torch.zeros(h.shape[1:], dtype=torch.float64)
    weight = [mean(g[c].flatten().tolist()) for c in range(len(h))]
    for p in torch.cartesian_prod(*map(torch.arange, h.shape[1:])).tolist():
        t, i, j = p
        if version == "v1":
            result[t, i, j] = sum(float(h[c, t, i, j]) for c in range(len(h)))
        else:
            maps = h if version == "v2" else g
            result[t, i, j] = max(sum(weight[c] * float(maps[c, t, i, j]) for c in range(len(h))), 0)
    return result


def unit_loop(values):
    norm = sum(x * x for x in values) ** 0.5
    return [x / norm if norm else 0.0 for x in values]


def alignment_loop(response, motion, part):
    distances = []
    for r, m in zip(response, motion, strict=True):
        pairs = zip(unit_loop(pooled_loop(r, part)), unit_loop(pooled_loop(m, part)), strict=True)
        distances.append(sum((x - y) ** 2 for x, y in pairs))
    return mean(distances)


# ------------------------------------------------------------------------------------------------ motion maps, Eq. 1, 2


@given(seeds, st.integers(2, 5), st.integers(2, 5))
def test_motion_map_is_that_of_a_loop(seed, height, width):
    flow = random(seed, 2, 2, height, width)
    maps = losses.motion_map(flow)
    for n, i, j in np.ndindex(2, height, width):
        squares = [derivative_loop(flow[n, part], axis, i, j) ** 2 for part in (0, 1) for axis in (0, 1)]
        assert maps[n, i, j].item() == pytest.approx(sum(squares) ** 0.5, abs=1e-12)


@given(seeds, st.floats(-5, 5), st.floats(-5, 5), st.floats(0, 4))
def test_motion_map_does_not_see_an_even_motion_of_the_camera_and_grows_with_the_flow(seed, right, down, scale):
    flow = random(seed, 2, 2, 4, 5)
    camera = torch.tensor([right, down], dtype=torch.float64)[:, None, None]
    maps = losses.motion_map(flow)
    torch.testing.assert_close(losses.motion_map(flow + camera), maps)
    torch.testing.assert_close(losses.motion_map(scale * flow), scale * maps)
    torch.testing.assert_close(losses.motion_map(flow.mT.flip(1)), maps.mT)  # no direction is another
    assert not losses.motion_map(camera.expand(3, 2, 4, 5)).any()


def test_motion_map_of_a_growing_object_is_its_rate():
    y, x = torch.meshgrid(torch.arange(4.0), torch.arange(5.0), indexing="ij")
    flow = torch.stack([0.3 * x, 0.4 * y])[None]
    torch.testing.assert_close(losses.motion_map(flow), torch.full((1, 4, 5), 0.5))


@given(seeds, sizes, sizes, sizes)
def test_pooled_motion_is_that_of_a_loop(seed, frames, height, width):
    maps = random(seed, 2, frames, height, width)
    for part in PARTS:
        pooled = losses.pool_motion(maps, part)
        for n in range(2):
            assert pooled[n].flatten().tolist() == pytest.approx(pooled_loop(maps[n], part), abs=1e-12)
            assert torch.equal(losses.pool_motion(maps[n], part), pooled[n])


# ----------------------------------------------------------------------------------------- sampling by motion, Sec. 3.2


@given(seeds, st.integers(1, 40), st.integers(1, 6), st.integers(1, 3))
def test_moving_windows_are_those_of_a_loop_and_at_least_half_of_all(seed, length, frames, stride):
    movement = torch.randint(6, (length,), generator=generator(seed)).double()
    moving = losses.moving_windows(movement, frames * stride, stride)
    clips = []
    for start in range(max(length - frames * stride, 0) + 1):
        times = [start + stride * k for k in range(frames)]
        clips.append(mean([float(movement[t]) if t < length else 0.0 for t in times]))
    near = 1e-9
    assert all(bool(moving[k]) for k, clip in enumerate(clips) if clip > np.median(clips) + near)
    assert not any(bool(moving[k]) for k, clip in enumerate(clips) if clip < np.median(clips) - near)
    assert len(moving) == len(clips) and 2 * moving.sum() >= len(clips)
    assert torch.equal(losses.moving_windows(2 * movement, frames * stride, stride), moving)  # within a video only


@given(seeds, st.integers(1, 7), st.integers(1, 7), st.integers(1, 6), st.booleans(), st.booleans())
def test_motion_of_a_crop_is_that_of_a_loop(seed, height, width, size, flip, whole):
    motion, g = random(seed, 3, height, width), generator(seed)
    low, span = torch.rand(2, generator=g) * 0.5, 0.1 + torch.rand(2, generator=g) * 0.4
    x0, y0, x1, y1 = (0.0, 0.0, 1.0, 1.0) if whole else torch.cat([low, low + span]).tolist()
    box = torch.tensor([x1, y0, x0, y1] if flip else [x0, y0, x1, y1])
    cropped = losses.crop_motion(motion, box, size)
    for i, j in np.ndindex(size, size):
        along = (size - 1 - j if flip else j) + 0.5
        x, y = x0 + along / size * (x1 - x0), y0 + (i + 0.5) / size * (y1 - y0)
        assume(min(abs(x * width - round(x * width)), abs(y * height - round(y * height))) > 1e-5)
        assert torch.equal(cropped[:, i, j], motion[:, int(y * height), int(x * width)])


# ------------------------------------------------------------------------------------ motion alignment loss, Eq. 4 to 7


@given(seeds, sizes, sizes, sizes, st.sampled_from(["v1", "v2", "v3"]))
def test_response_is_that_of_a_loop(seed, frames, height, width, version):
    h, g = random(seed, 2, 3, frames, height, width), random(seed + 1, 2, 3, frames, height, width)
    response = losses.response_map(h, None if version == "v1" else g, version)
    assert response.shape == (2, frames, height, width) and (version == "v1" or response.min() >= 0)
    for n in range(2):
        torch.testing.assert_close(response[n], response_loop(h[n], g[n], version))
    half = losses.response_map(h.bfloat16(), None if version == "v1" else g.bfloat16(), version)
    assert half.dtype == torch.float32


@given(seeds, sizes, sizes, sizes, st.sampled_from(PARTS), st.booleans())
def test_alignment_is_that_of_a_loop(seed, frames, height, width, part, signed):
    response = (random if signed else positive)(seed, 3, frames, height, width)
    motion = positive(seed + 1, 3, frames, height, width)
    motion[0] = 0  # a clip that stands still
    value = losses.motion_alignment(response, motion, part)
    assert value.item() == pytest.approx(alignment_loop(response, motion, part), abs=1e-12)
    assert 0 <= value <= (4 if signed else 2) + 1e-12
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(losses.motion_alignment(response[order], motion[order], part), value)


@given(seeds, st.sampled_from(PARTS), st.floats(0.01, 100), st.floats(1e-6, 100))
def test_alignment_knows_no_scales_and_is_zero_for_equal_maps(seed, part, one, other):
    response, motion = positive(seed, 2, 3, 2, 4), positive(seed + 1, 2, 3, 2, 4)
    value = losses.motion_alignment(response, motion, part)
    torch.testing.assert_close(losses.motion_alignment(one * response, other * motion, part), value)
    assert losses.motion_alignment(one * motion, motion, part) < 1e-12 < value


def test_each_term_sees_its_part_alone():
    motion = torch.zeros(1, 2, 2, 2)
    motion[0, 0, 0, 0] = motion[0, 1, 1, 1] = 1
    elsewhere = torch.zeros(1, 2, 2, 2)
    elsewhere[0, 1, 0, 0] = elsewhere[0, 0, 1, 1] = 1  # each place and each frame moves as much
    found = {part: losses.motion_alignment(elsewhere, motion, part).item() for part in PARTS}
    assert found == pytest.approx({"st": 2, "s": 0, "t": 0}, abs=1e-6)


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
@pytest.mark.parametrize("part", PARTS)
def test_gradients_reach_the_response_and_not_the_motion(version, part):
    h, g = random(0, 2, 3, 2, 2, 2).requires_grad_(), random(1, 2, 3, 2, 2, 2).requires_grad_()
    motion = positive(2, 2, 2, 2, 2).requires_grad_()

    def loss(h, g):
        return losses.motion_alignment(losses.response_map(h, g, version), motion, part)

    assert torch.autograd.gradcheck(loss, (h, g) if version != "v1" else (h, g.detach()))
    gradients = torch.autograd.grad(loss(h, g), (h, g, motion), allow_unused=True)
    assert [x is not None and bool(x.any()) for x in gradients] == [version != "v3", version != "v1", False]


def test_responses_of_nothing_give_finite_gradients():
    h, g = torch.ones(1, 2, 2, 2, 2), torch.full((1, 2, 2, 2, 2), -0.1, requires_grad=True)
    value = losses.motion_alignment(losses.response_map(-h, -g * g, "v2"), torch.ones(1, 2, 2, 2)).item()
    still = losses.motion_alignment(losses.response_map(h, g, "v3"), torch.zeros(1, 2, 2, 2))
    dead = losses.motion_alignment(losses.response_map(-h, g * g, "v2"), torch.ones(1, 2, 2, 2))
    assert value < 1e-6 and [still.item(), dead.item()] == pytest.approx([1, 1])
    assert torch.autograd.grad(still, g)[0].abs().max() < 1e-4 and not torch.autograd.grad(dead, g)[0].any()


# ------------------------------------------------------------------------------------------------------- maps in files


def difference_flow(images, side, warps):
    """In place of TV-L1: what changes flows to the right."""
    gray = torch.from_numpy(np.stack(images)).float().mean(3)[:, ::2, ::2]
    change = gray.diff(dim=0) / 32
    return torch.stack([change, 0 * change], 1)


@pytest.fixture
def without_flow(monkeypatch):
    monkeypatch.setattr(mcl, "tvl1_flow", difference_flow)
    forked = torch.multiprocessing.get_context("fork").Process  # which inherit what is patched
    monkeypatch.setattr(torch.multiprocessing, "Process", forked)


def test_frames_too_small_for_flow_are_a_bad_video(tmp_path):
    encode(tmp_path / "line.avi", moving_texture(8, 1, 64), "rawvideo")
    with pytest.raises(BadVideo, match="no flow in frames of 64 x 1 pixels"):
        motion_maps(tmp_path, tmp_path / "maps").compute(str(tmp_path / "line.avi"))


def motion_maps(root, folder, **options):
    return mcl.MotionMaps(mcl.MapsConfig(dataset="folder", data=str(root), maps=str(folder), **options))


@pytest.fixture
def folder(tmp_path):
    """Three videos, one of them in a folder below, and a file that is none."""
    root = tmp_path / "clips"
    (root / "below").mkdir(parents=True)
    for name, frames in (("a", 40), ("below/b", 20), ("c", 70)):
        encode(root / f"{name}.mp4", moving_texture(frames, 48, 64), "mpeg4")
    (root / "not a video.mp4").write_bytes(b"nothing")
    return root


def test_the_command_that_is_advised_makes_the_maps_that_are_missing(folder, tmp_path):
    given = dict(list_file="my list.txt", split=2, exclude="bad.txt", flow_side=32, flow_warps=3)
    maps = motion_maps(folder, tmp_path / "maps", **given)
    words = shlex.split(maps.command)
    assert words[:3] == ["python", "mcl.py", "maps"]
    asked = cli.parse(mcl.MapsConfig, "", {}, words[3:])
    assert asked == mcl.MapsConfig(dataset="folder", data=str(folder), maps=str(tmp_path / "maps"), **given)
    default = mcl.MotionMaps(mcl.MapsConfig())  # of the generated videos, whose preset has another number of warps
    assert cli.parse(mcl.MapsConfig, "", mcl.FLOW, shlex.split(default.command)[3:]).flow_warps == 5


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs `mcl.py maps` in this process; gives exit code, output and errors."""

    def call(root, *flags):
        words = ["mcl.py", "maps", "--dataset", "folder", "--data", str(root), "--workers", "2", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.command_line(mcl.main)
        return stop.value.code, *capsys.readouterr()

    return call


class Kept(mcl.MotionMaps):
    """Keeps what it is given."""

    maps: np.ndarray

    def __init__(self, root, folder, recipe="as given"):
        super().__init__(mcl.MapsConfig(dataset="folder", data=str(root), maps=str(folder)))
        self.recipe, self.command = recipe, "python make.py"

    def compute(self, path):
        return self.maps


@given(seeds, st.integers(1, 9), st.floats(0, 1000))
def test_maps_are_kept_to_a_510th_of_their_greatest_square_root(seed, frames, scale):
    with tempfile.TemporaryDirectory() as folder:
        video = os.path.join(folder, "a.mp4")
        Path(video).write_bytes(b"12345")
        kept = Kept(folder, os.path.join(folder, "maps"))
        kept.maps = scale * positive(seed, frames, 3, 4).float().numpy() ** 3
        kept.visit(video)
        found = kept.read(video, frames)
        assert found.dtype == np.float32 and kept.is_made(video)
    top = max(kept.maps.max(), 1e-12) ** 0.5
    np.testing.assert_allclose(found**0.5, kept.maps**0.5, atol=top * (1 / 510 + 1e-5))


def test_maps_of_another_video_or_recipe_or_none_are_refused(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"12345")
    kept = Kept(tmp_path, tmp_path / "maps")
    kept.maps = np.ones((4, 3, 3), np.float32)
    with pytest.raises(UserError, match=r"a\.mp4\.npz: missing.*`python make.py`"):
        kept.read(str(video), 4)
    kept.visit(str(video))
    with pytest.raises(UserError, match="of another video"):
        kept.read(str(video), 5)
    other = Kept(tmp_path, tmp_path / "maps", "otherwise")
    assert kept.is_made(str(video)) and not other.is_made(str(video))
    with pytest.raises(UserError, match=r"another recipe \(as given, not otherwise\)"):
        other.read(str(video), 4)
    video.write_bytes(b"123456")
    assert not kept.is_made(str(video))
    with pytest.raises(UserError, match="of another video"):
        kept.read(str(video), 4)
    video.write_bytes(b"12345")
    file = kept.file(str(video))
    whole = file.read_bytes()
    for damaged in (whole[:-40], whole[: len(whole) // 2], b"", b"no numbers", whole[:70] + b"\xff" * 20 + whole[90:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged"):
            kept.read(str(video), 4)


def test_whatever_bit_flips_a_map_is_read_equal_or_made_again(tmp_path):
    video = str(tmp_path / "a.mp4")
    Path(video).write_bytes(b"12345")
    kept = Kept(tmp_path, tmp_path / "maps")
    kept.maps = positive(0, 8, 3, 4).float().numpy()
    kept.visit(video)
    file, whole = kept.file(video), kept.read(video, 8)
    content, damaged = file.read_bytes(), 0
    for place in np.random.default_rng(0).integers(8 * len(content), size=200).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        if made := kept.is_made(video):
            np.testing.assert_array_equal(kept.read(video, 8), whole)
        damaged += not made
        if damaged == 1 and not made:
            with pytest.raises(UserError, match=r"damaged.*make it again with `python make.py`"):
                kept.read(video, 8)
            assert "0 of 1 were there, 1 made" in kept.make([video], 1)
            np.testing.assert_array_equal(kept.read(video, 8), whole)
            damaged += 1
    assert damaged > 100


def test_a_map_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    video = str(tmp_path / "a.mp4")
    Path(video).write_bytes(b"12345")
    kept = Kept(tmp_path, tmp_path / "maps")
    kept.maps = np.ones((4, 3, 3), np.float32)
    kept.visit(video)
    for number, says in (
        (errno.EMFILE, "raise `ulimit -n`"),
        (errno.EACCES, "Permission denied"),
        (errno.EIO, "error"),
    ):

        def fail(*_, number=number):
            raise OSError(number, os.strerror(number), str(kept.file(video)))

        monkeypatch.setattr(np, "load", fail)
        for call in (lambda: kept.read(video, 4), lambda: kept.is_made(video)):
            with pytest.raises(OSError, match=says) as raised:
                call()
            assert raised.value.errno == number and "damaged" not in str(raised.value)


def test_maps_never_run_code(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"12345")
    kept = Kept(tmp_path, tmp_path)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(kept.file(str(video)), levels=np.array([Code()]), scale=1.0, size=5, recipe="as given")
    with pytest.raises(UserError, match="damaged"):
        kept.read(str(video), 1)
    assert not (tmp_path / "ran").exists()


def test_a_motion_map_is_that_of_each_pair_of_frames_averaged_over_cells(folder, tmp_path, without_flow):
    maps, video = motion_maps(folder, tmp_path / "maps"), str(folder / "c.mp4")
    found = maps.compute(video)
    with Video(video) as opened:
        images = opened.read(range(70))  # more than are read at once
    expected = F.adaptive_avg_pool2d(losses.motion_map(difference_flow(images, 0, 0)), (24, 32))
    assert found.shape == (70, 24, 32)
    np.testing.assert_array_equal(found[:-1], expected.numpy())
    np.testing.assert_array_equal(found[-1], found[-2])


def test_the_command_makes_what_is_missing_and_names_what_it_cannot_read(folder, tmp_path, without_flow, command):
    code, out, err = command(folder)
    made = tmp_path / "clips_maps"
    assert code == 0 and "0 of 4 were there, 3 made, 1 videos can't be read" in out, out
    assert f"--exclude {made / 'bad_videos.txt'}" in out and "4/4" in err
    assert (made / "bad_videos.txt").read_text().startswith("'not a video.mp4'\t")
    files = sorted(made.rglob("*.npz"))
    assert [str(file.relative_to(made)) for file in files] == ["a.mp4.npz", "below/b.mp4.npz", "c.mp4.npz"]
    times = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:100])
    code, out, _ = command(folder, "--exclude", made / "bad_videos.txt")
    assert code == 0 and "1 of 3 were there, 2 made\n" in out, out
    assert files[0].stat().st_mtime_ns == times[0] and files[2].stat().st_mtime_ns > times[2]
    assert not list(made.rglob("*.partial"))
    code, out, err = command(folder, "--exclude", made / "bad_videos.txt")
    assert code == 0 and "3 of 3 were there\n" in out and err == ""
    (tmp_path / "a.txt").write_text("a.mp4\n")
    out = command(folder, "--exclude", tmp_path / "a.txt")[1]
    assert f"2 of 3 were there, 0 made, 1 videos can't be read: leave them out with --exclude {tmp_path}/a.txt," in out
    assert "2 of 2 were there\n" in command(folder, *shlex.split(out.partition("them out with ")[2]))[1]
    other = command(folder, "--flow_side", 32, "--exclude", made / "bad_videos.txt")[1]
    assert "0 of 3 were there, 3 made" in other


def test_an_interrupt_loses_no_map(folder, tmp_path, without_flow, command, monkeypatch):
    progress = data.tqdm

    def interrupted(items, *rest, **options):
        for n, item in enumerate(items, 1):
            yield item
            if n == 2:
                raise KeyboardInterrupt  # as Ctrl-C does; where a shell starts tests in the background, it does nothing

    monkeypatch.setattr(data, "tqdm", interrupted)
    assert command(folder)[0] == 130
    assert not torch.multiprocessing.active_children()
    monkeypatch.setattr(data, "tqdm", progress)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "clips_maps").rglob("*.npz")}
    assert times
    code, out, _ = command(folder)
    assert code == 0 and f"{len(times)} of 4 were there, {3 - len(times)} made" in out, out
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())


class Fatal(mcl.MotionMaps):
    """Its process dies of one video."""

    def compute(self, path):
        if "b.mp4" in path:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.ones((20, 2, 2), np.float32)


def test_a_video_that_kills_its_process_is_named(folder, tmp_path):
    maps = Fatal(mcl.MapsConfig(dataset="folder", data=str(folder), maps=str(tmp_path / "maps")))
    report = maps.make([str(folder / name) for name in ("a.mp4", "below/b.mp4", "c.mp4")], workers=1)
    assert "2 made, 1 videos can't be read" in report
    assert "exit code -9" in (tmp_path / "maps" / "bad_videos.txt").read_text()


def test_without_scikit_image_one_line_says_what_to_install(folder, command, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage.registration", None)
    code, _, err = command(folder)
    assert code == 2 and "pip install scikit-image" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data", "nowhere"], ["nowhere"]),
        (["--flow_side", "4"], ["--flow_side 4", "16"]),
        (["--workers", "0"], ["--workers 0"]),
        (["--exclude", "nowhere.txt"], ["nowhere.txt"]),
        (["--maps", "/dev/null/maps"], ["/dev/null"]),
        (["--lr", "1"], ["--lr"]),
    ],
    ids=str,
)
def test_bad_input_of_the_command_is_one_line(flags, says, folder, without_flow, command):
    code, _, err = command(folder, *flags)
    assert code == 2
    one_line(err, *says)


# --------------------------------------------------------------------------------------------------------------- flow


def shifted(frames, right, down, size=48):
    """A texture that moves evenly over the whole picture."""
    smooth = F.interpolate(torch.rand(1, 3, 24, 24, generator=generator(0)), (2 * size, 2 * size), mode="bicubic")
    picture = (smooth[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    return [
        picture[20 - down * t : 20 - down * t + size, 20 - right * t : 20 - right * t + size] for t in range(frames)
    ]


def test_flow_of_an_even_shift_is_the_shift():
    pytest.importorskip("skimage")
    flow = mcl.tvl1_flow(shifted(3, 2, 1), 48)
    assert flow.shape == (2, 2, 48, 48) and flow.dtype == torch.float32
    assert flow[:, :, 8:-8, 8:-8].mean((0, 2, 3)).tolist() == pytest.approx([2, 1], abs=0.1)
    half = mcl.tvl1_flow(shifted(3, 2, 1), 24)
    assert half.shape == (2, 2, 24, 24)
    assert half[:, :, 4:-4, 4:-4].mean((0, 2, 3)).tolist() == pytest.approx([1, 0.5], abs=0.1)  # in its own pixels


def test_a_motion_map_shows_what_moves_before_a_moving_camera():
    pytest.importorskip("skimage")
    images = [image.copy() for image in shifted(6, 1, 0)]
    for t, image in enumerate(images):
        image[16:32, 10 + 3 * t : 26 + 3 * t] = shifted(1, 0, 0)[0][:16, :16][::-1]
    motion = losses.motion_map(mcl.tvl1_flow(images, 48)).mean(0)
    assert motion[12:36, 6:44].mean() > 3 * motion[:10].mean()


# ------------------------------------------------------------------------------------------------------------ the views


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Two videos, of 60 and 20 frames, of which only the middle right moves, from frame 30 on; and their maps."""
    root = tmp_path_factory.mktemp("moving")
    paths = []
    for name, frames in (("long", 60), ("short", 20)):
        paths.append(str(encode(root / f"{name}.mp4", moving_texture(frames, 48, 64), "mpeg4")))
    maps = Kept(root, root / "maps")
    for path, frames in zip(paths, (60, 20), strict=True):
        maps.maps = np.full((frames, 24, 32), 0.01, np.float32)
        maps.maps[frames // 2 :, 8:14, 20:26] = 1
        maps.visit(path)
    return data.VideoList(paths, [0, 1], ["a", "b"], ""), maps


def moving_views(moving, temporal=True, spatial=True, **options):
    videos, maps = moving
    options = dict(crop=16, frames=8, frame_stride=2, sub_clips=0, min_scale=0.1) | options
    return mcl.MotionViews(videos, **options, maps=maps, temporal=temporal, spatial=spatial)


def inside(box, low=20 / 32, high=26 / 32, top=8 / 24, bottom=14 / 24):
    """Share of the moving pixels in a box."""
    x0, y0, x1, y1 = (box / torch.tensor([64, 48, 64, 48])).tolist()
    x0, x1 = min(x0, x1), max(x0, x1)
    centers = [(i + 0.5, j + 0.5) for i in range(8, 14) for j in range(20, 26)]
    return mean([float(y0 <= i / 24 <= y1 and x0 <= j / 32 <= x1) for i, j in centers])


def test_crops_hold_what_moves_and_windows_are_those_that_move(moving):
    shares = {}
    for spatial in (True, False):
        views = moving_views(moving, spatial=spatial)
        boxes = torch.cat([views[epoch, 0]["box"] for epoch in range(40)])
        shares[spatial] = [inside(box) for box in boxes]
        assert len({tuple(box.tolist()) for box in boxes}) == len(boxes)
    assert np.quantile(shares[True], 0.05) >= 0.8 and np.quantile(shares[False], 0.05) == 0
    moved = {}
    for temporal in (True, False):
        views = moving_views(moving, temporal=temporal)
        moved[temporal] = [float(m.amax()) for epoch in range(40) for m in views[epoch, 0]["motion"]]
    assert min(moved[True]) == pytest.approx(1) and min(moved[False]) < 0.1


@given(length=st.integers(1, 40), windows=st.integers(1, 3), temporal=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_windows_that_move_differ_as_far_as_the_video_has_others(length, windows, temporal, seed):
    motion = np.random.default_rng(seed).random((length, 4, 4), dtype=np.float32)
    maps, video = types.SimpleNamespace(read=lambda path, frames: motion), mock.MagicMock(path="")
    video.__len__.return_value = length
    videos = data.VideoList([""], [0], [], "")
    views = mcl.MotionViews(videos, 16, 4, 2, windows=windows, maps=maps, temporal=temporal, spatial=False)
    starts = views.draw_starts(np.random.default_rng(seed), video)
    moving = losses.moving_windows(torch.from_numpy(motion).mean((1, 2)), 8, 2)
    assert len(set(starts)) == min(windows, len(moving)) and starts.shape == (windows,)
    assert not temporal or moving.sum() < windows or moving[starts].all()


def test_without_motion_focus_the_views_are_those_of_every_method(moving):
    views, plain = moving_views(moving, False, False), data.PretrainingViews(moving[0], 16, 8, 2, 0, min_scale=0.1)
    for key in ((0, 0), (1, 0), (2, 1)):
        one, other = views[key], plain[key]
        assert all(torch.equal(one[name], other[name]) for name in other if name != "bad")
        assert one.keys() - other.keys() == {"motion"}


@pytest.mark.parametrize("index", [0, 1], ids=["long", "short"])
def test_the_motion_of_a_sample_is_that_of_its_frames_and_box(moving, index, monkeypatch):
    views, (videos, maps) = moving_views(moving), moving
    asked, stream = [], Video.stream
    monkeypatch.setattr(Video, "stream", lambda video, frames: stream(video, asked.append([*frames]) or asked[-1]))
    sample = views[3, index]
    length = (60, 20)[index]
    whole = torch.from_numpy(maps.read(videos.paths[index], length))
    for view in range(2):
        first = int(asked[0][8 * view])
        times = [first + 2 * k for k in range(8)]
        clip = torch.stack([whole[t] if t < length else torch.zeros(24, 32) for t in times])
        expected = losses.crop_motion(clip, sample["box"][view] / torch.tensor([64, 48, 64, 48]), 28)
        assert torch.equal(sample["motion"][view], expected) and expected.any()


def test_a_short_video_stands_still_where_it_is_continued(moving):
    views = moving_views(moving, frames=16)
    motion = views[0, 1]["motion"]  # 20 frames, of which a clip of 16 shows 10
    assert motion[:, :10].amin() > 0 and not motion[:, 10:].any()


def test_a_still_video_and_motion_that_no_crop_can_hold_give_views(moving, tmp_path):
    videos, maps = moving
    still = Kept(maps.root, tmp_path / "still")
    still.maps = np.zeros((60, 24, 32), np.float32)
    still.visit(videos.paths[0])
    assert not moving_views((videos, still))[0, 0]["motion"].any()
    corners = Kept(maps.root, tmp_path / "corners")
    corners.maps = np.zeros((60, 24, 32), np.float32)
    corners.maps[:, ::23, ::31] = 1  # each crop leaves some of them out
    corners.visit(videos.paths[0])
    views = moving_views((videos, corners))
    assert len({tuple(views[epoch, 0]["box"][0].tolist()) for epoch in range(5)}) == 5


def test_a_sample_depends_on_seed_epoch_and_index_only_and_passes_through_workers(moving):
    views = moving_views(moving)
    sampler = data.StepSampler(2, batch_size=2, epochs=2)
    batches = [{k: v.clone() for k, v in b.items() if k != "bad"} for b in data.load_batches(views, sampler, 2)]
    for keys, batch in zip(sampler, batches, strict=True):
        for place, key in enumerate(keys):
            sample = moving_views(moving)[key]
            assert all(torch.equal(batch[name][place], sample[name]) for name in batch)
    assert not torch.equal(moving_views(moving, seed=1)[0, 0]["motion"], views[0, 0]["motion"])


def test_stale_and_missing_maps_stop_with_a_reason(moving, tmp_path):
    videos, maps = moving
    nothing = Kept(maps.root, tmp_path / "nothing")
    with pytest.raises(UserError, match="missing"):
        moving_views((videos, nothing))[0, 0]
    with pytest.raises(UserError, match=r"nothing for 2 of 2 videos, such as .*long\.mp4.*`python make.py`"):
        nothing.check(videos.paths)
    maps.check(videos.paths)


# ----------------------------------------------------------------------------------------------------------- the method


def build(**flags):
    torch.manual_seed(0)
    return mcl.MCL(mcl.MCLConfig(**TINY | flags))


def make_views(crop=32, batch=3, seed=0):
    views = views_without_colours(batch=batch, sub_clips=0, crop=crop, seed=seed)
    return views | {"motion": torch.rand(batch, 2, 16, 28, 28, generator=generator(seed))}


def oracle(model, views):
    """The losses of conv4, without its batch norm's statistics of a batch, one clip a forward, in float64."""
    model = copy.deepcopy(model).double().eval()
    *layers, last, norm, _ = model.encoder.layers
    videos, rows = len(views["clip"]), []

    def g(head, x):
        return F.normalize(head(x), dim=-1)

    def encoded(n, view):
        clip = augment.normalize(views["clip"][n, view].double()[None] / 255)
        for layer in layers:
            clip = layer(clip)
        h = last(clip)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        before_relu = (h[0] - norm.running_mean[:, None, None, None]) * scale[:, None, None, None]
        return h[0], scale, before_relu + norm.bias[:, None, None, None]

    result = {"vv": [], "responses": [], "motion": []}
    for view in range(2):
        for n in range(videos):
            h, scale, z = encoded(n, view)
            pooled = z.clamp(min=0).mean((1, 2, 3)).detach().requires_grad_()
            key = g(model.key_head, encoded(n, 1 - view)[2].clamp(min=0).mean((1, 2, 3))).detach()
            query = g(model.head, pooled)
            result["vv"].append((query.tolist(), key.tolist()))
            (slope,) = torch.autograd.grad(query @ key, pooled)  # of q·k⁺ by the pooled features
            count = z[0].numel()
            gradient = (z > 0) * (slope * scale / count)[:, None, None, None]
            rows.append(response_loop(h.detach(), gradient.detach(), model.config.alignment))
            bins = torch.zeros(z.shape[1:], dtype=torch.float64)
            motion = views["motion"][n, view].double()
            frames, size = (len(motion) // bins.shape[0], motion.shape[1] // bins.shape[1])
            for t, i, j in np.ndindex(*bins.shape):
                part = [slice(k * step, (k + 1) * step) for k, step in ((t, frames), (i, size), (j, size))]
                bins[t, i, j] = motion[tuple(part)].mean()
            result["motion"].append(bins)
    queries, keys = zip(*result["vv"], strict=True)
    negatives = model.queues["vv"].keys.tolist()
    losses_ = {"vv": info_nce_loop(queries, keys, negatives, model.config.temperature)}
    return losses_ | {part: alignment_loop(torch.stack(rows), result["motion"], part) for part in ("t", "s", "st")}


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_losses_equal_the_plain_loop_oracle(version):
    model, views = build(alignment=version).eval(), make_views()
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model.encoder(torch.randn(4, 3, 16, 32, 32))  # statistics other than 0 and 1
    model.key_encoder.load_state_dict(model.encoder.state_dict())
    model.eval()
    expected, found = oracle(model, views), model(views)
    assert list(found) == ["vv", "t", "s", "st"]
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name


SWITCHES = [
    dict(losses="vv"),
    dict(losses="vv,t"),
    dict(losses="vv,s"),
    dict(losses="vv,st"),
    dict(losses="st,vv"),
    dict(alignment="v1"),
    dict(alignment="v2"),
]


@pytest.mark.parametrize("flags", SWITCHES, ids=str)
def test_each_switch_changes_the_losses_and_trains_every_parameter(flags):
    model, plain, views = build(**flags), build(), make_views()
    found, reference = model(views), plain(views)
    assert set(found) == set(model.config.terms) and {f"chance/{name}" for name in found} <= model.metrics.keys()
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("key_")), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    shared = found.keys() & reference.keys()
    assert found.keys() != reference.keys() or any(not torch.equal(found[name], reference[name]) for name in shared)
    assert torch.equal(found["vv"], reference["vv"])  # the rest is added


def test_without_alignment_the_losses_are_those_of_moco():
    views = make_views()
    torch.manual_seed(0)
    plain = moco.MoCo(moco.MoCoConfig(**TINY))
    assert torch.equal(build(losses="vv")(views)["vv"], plain(views)["vv"])


@pytest.mark.parametrize("training", [False, True], ids=["fixed batch norm", "training"])
@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_the_gradient_of_alignment_is_that_of_finite_differences(version, training):
    model, views = build(alignment=version).double(), make_views()
    model.eval().encoder.train(training)
    model.encoder_input = lambda clips, color, difference=False: augment.normalize(clips.double() / 255)
    model.project = lambda head, features: F.normalize(head(features), dim=-1)  # in float64, too
    views["motion"] = views["motion"].double()
    parameters = [*model.encoder.parameters(), *model.head.parameters()]
    directions = [random(k, *p.shape) * p.detach().abs().mean() for k, p in enumerate(parameters)]

    def loss(step):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += step * direction
        found = model(views)
        return sum(found[name] for name in ("t", "s", "st"))

    gradients = torch.autograd.grad(loss(0), parameters, allow_unused=version == "v1")
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True) if g is not None)
    step = 1e-7
    above, below = loss(step).item(), loss(-2 * step).item()
    assert slope.item() == pytest.approx((above - below) / (2 * step), rel=1e-3)
    assert gradients[0].any()  # of the encoder's first convolution


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_is_aligned_at_its_last_convolution_in_either_memory_format(name):
    width, crop = {"s3d": (1.0, 64), "i3d": (0.125, 64), "i3d_piergiaj": (0.125, 64), "conv4": (0.25, 32)}.get(
        name, (0.0625, 48)
    )
    views, results = make_views(batch=2, crop=crop), []
    views |= {"clip": views["clip"][:, :, :, ::2], "motion": views["motion"][:, :, ::2]}
    for memory_format in pretrain.MEMORY_FORMATS:
        model = build(encoder=name, width=width, crop=crop, memory_format=memory_format, batch_size=2, frames=8)
        last = last_norms(model.encoder)
        norms, called = [m for m in model.encoder.modules() if isinstance(m, torch.nn.BatchNorm3d)], []
        hooks = [norm.register_forward_pre_hook(lambda norm, _, called=called: called.append(norm)) for norm in norms]
        with recorded_inputs(last) as features:
            maps = model.encoder(torch.randn(2, 3, 8, crop, crop, generator=generator(0)))
        assert sum(h.shape[1] for h in features) == model.encoder.out_channels
        assert all(h.shape[2:] == maps.shape[2:] for h in features)
        assert called[-1] is last[-1]
        for hook in hooks:
            hook.remove()
        assert not any(module._forward_pre_hooks for module in model.modules())
        torch.manual_seed(0)
        found = model(views)
        sum(found[part] for part in PARTS).backward()
        first = next(model.encoder.parameters())
        results.append([*(found[part].item() for part in PARTS), first.grad.norm().item()])
        assert results[-1][-1] > 0
    assert results[0] == pytest.approx(results[1], rel=2e-2)


def test_chance_values_are_those_of_another_videos_motion():
    model, views = build(), make_views()
    found = model(views)
    rolled = views["motion"].transpose(0, 1).flatten(0, 1).roll(1, 0).unflatten(0, (2, -1)).transpose(0, 1)
    other = build()(views | {"motion": rolled})
    for part in PARTS:
        assert model.metrics[f"chance/{part}"].item() == pytest.approx(other[part].item(), rel=1e-6)
        assert not torch.equal(found[part], other[part])


def test_training_on_alignment_alone_aligns():
    model, views = build(losses="vv,st"), make_views()
    views["motion"] = torch.zeros_like(views["motion"])
    views["motion"][..., :14, :] = 1  # the upper half, in every clip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    values = []
    for _ in range(15):
        value = model(views)["st"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.8 * values[0]


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def made(videos, tmp_path_factory):
    """Motion maps of the small generated set, without OpenCV."""
    folder = tmp_path_factory.mktemp("maps")
    maps = mcl.MotionMaps(mcl.MapsConfig(data=str(videos), maps=str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mcl, "tvl1_flow", difference_flow)
        for path in find.find_videos("synthetic", videos, True).paths:
            maps.visit(path)
    return folder


def test_the_first_run_makes_the_maps_and_ends_with_what_was_learnt(run, videos, without_flow):
    maps = run.path / "maps"
    code, out, err = run(mcl, *CONV4, "--epochs", 1, "--max_steps", 2, "--maps", maps)
    assert code == 0 and "own other half" in out and "python mcl.py" in out
    assert "18/18" in err and len(list(maps.rglob("*.npz"))) == 18


def test_without_motion_nothing_asks_for_maps(run):
    flags = ["--losses", "vv", "--temporal_sampling", "random", "--spatial_sampling", "random"]
    assert run(mcl, *CONV4, "--epochs", 1, "--max_steps", 1, *flags, dataset="folder")[0] == 0


def test_a_stale_map_stops_the_run(run, videos, made, tmp_path):
    copied = tmp_path / "stale"
    subprocess.run(["cp", "-r", made, copied], check=True)
    for file in copied.rglob("*.npz"):
        with np.load(file) as held:
            np.savez(file, **{**held, "levels": held["levels"][:-1]})
    code, _, err = run(mcl, *CONV4, "--epochs", 1, "--maps", copied, dataset="folder")
    assert code == 2 and "of another video" in err.splitlines()[-1] and "Traceback" not in err
