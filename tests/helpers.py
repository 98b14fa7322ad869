"""What several test files share."""

import hashlib
import json
import math
import multiprocessing
import operator
import os
import socket
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import default_collate

import augment
import data
import runs
import train

ROOT = Path(__file__).parents[1]
ALONE = train.Process(0, 1, torch.device("cpu"))
multiprocessing.set_forkserver_preload(["evaluate", "helpers", "hypothesis", "torch._dynamo"])  # imported once for all
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None
SMALL = ["--encoder=r3d_18", "--width=0.0625", "--crop=48", "--batch_size=4", "--queue=8", "--device=cpu"]
CONV4 = ["--encoder=conv4", "--width=0.25", "--crop=32"]  # the cheapest
FAST = {"clips_per_s", "data_wait", "seconds"}  # numbers of a line of the log, or of a sample, that no two runs share


def weights(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equality, bit for bit, of nested containers of tensors, but for what depends on the machine."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in FAST)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def collate(items):
    """Items as a batch; their lists of what is bad are joined, which need not be of one length as torch's do."""
    batch = default_collate([{name: value for name, value in item.items() if name != "bad"} for item in items])
    return batch | {"bad": [entry for item in items for entry in item["bad"]]}


def free_folders():
    """Lets others have the run folders that this process has, as its end does."""
    while runs._locks:
        runs._locks.popitem()[1].close()


def lines(folder):
    """The lines of a run's log.jsonl, without what depends on the machine."""
    text = (folder / "log.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in FAST} for line in text.splitlines()]


def one_line(err, *says):
    """Asserts that the last line of what a command has said is an error of the user's that says these words."""
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in err, err
    assert all(str(word) in last for word in says), last


def refused(says, function, *arguments, **options):
    """Asserts that a function raises an error of the user's that says this."""
    with pytest.raises(train.UserError, match=says):
        function(*arguments, **options)


def moving_texture(frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 (frames, height, width, 3): a texture that moves and grows lighter with every frame, so that all differ."""
    texture = np.random.default_rng(0).integers(0, 60, (height // 4 + 2, width // 4 + 2, 3)).repeat(4, 0).repeat(4, 1)
    moved = [np.roll(texture, (k, 2 * k), (0, 1))[:height, :width] + 10 + k * 180 // frames for k in range(frames)]
    return np.stack(moved).astype(np.uint8)


def encode(path, images, codec, times=None, index_first=False, pix_fmt="yuv420p", **options):
    """Writes RGB images (H, W, 3) as a video at 25 frames a second, or at `times` in units of 1/25 s: its path."""
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w", options={"movflags": "faststart"} if index_first else {}) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt, stream.codec_context.thread_count = pix_fmt, 1
        for image, time in zip(images, range(len(images)) if times is None else times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path):
    """A file of one second of silence and no picture."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), layout="mono")
        sound.sample_rate = 8000
        container.mux([*stream.encode(sound), *stream.encode(None)])
    return path


def touch(root: Path, *names: str) -> None:
    """Empty files, with their folders."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, *lines: str, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode())


def free_port():
    """A port of this machine that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torchrun(script, *flags, folder):
    """Starts two processes of a script, which have one thread each, and print into a folder's out.txt."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with open(folder / "out.txt", "w") as out:
        return subprocess.Popen([*command, *map(str, flags)], cwd=folder, stdout=out, stderr=out)


def run_two(script, *flags, folder):
    """Two processes of a script to their end, which is to be a good one."""
    launcher = torchrun(script, *flags, folder=folder)
    try:
        launcher.wait(300)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, (folder / "out.txt").read_text()


def processes(function, *arguments, count):
    """Runs a function of rank and these arguments in processes of their own, to their end."""
    torch.multiprocessing.start_processes(function, arguments, count, start_method="forkserver")


def join_group(rank, folder, world=2):
    """Makes this process one of a group that finds itself in a folder, with one thread, as its parent has."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)


def alive(pids):
    """Those of these processes that do more than wait to be buried."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, state in states.items() if state.exists() and " Z " not in state.read_text()]


def descendants(pid):
    """Processes that a process has started, and theirs."""
    found = Path(f"/proc/{pid}/task/{pid}/children")
    children = found.read_text().split() if found.exists() else []
    return [int(child) for child in children] + [found for child in children for found in descendants(child)]


def digests(*places):
    """What every file at or below these places holds; of locks, nothing."""
    files = [path for place in places for path in sorted([place, *place.rglob("*")]) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.name != "lock"}


def within(seconds, holds):
    """Waits until something holds, for so long at most: whether it does."""
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.1)
    return holds()


def generator(seed: int):
    return torch.Generator().manual_seed(seed)


def random(seed: int, *shape: int):
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def units(seed: int, *shape: int):
    """Random unit vectors in float64."""
    return F.normalize(random(seed, *shape), dim=-1)


def assert_trains(model, found):
    """These are the losses asked for, each with its chance value; the encoder learns from each of them, and all other
    parameters but those of keys from their sum."""
    assert set(found) == set(model.config.terms) and {f"chance/{name}" for name in found} <= model.metrics.keys()
    for name, value in found.items():
        gradients = torch.autograd.grad(value, [*model.encoder.parameters()], retain_graph=True, allow_unused=True)
        assert any(gradient is not None and gradient.any() for gradient in gradients), name
    torch.stack(list(found.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (not name.startswith("key_")), name
        assert parameter.grad is None or parameter.grad.isfinite().all(), name


def assert_gradients(model, views, names):
    """Of each of these losses, in a direction in which all that is trained moves; in float64, without colours."""
    model.encoder_input = lambda clips, color, difference=False: augment.normalize(clips.double() / 255)
    model.project = lambda head, features: F.normalize(head(features), dim=-1)  # in float64, too
    trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
    directions = {name: random(k, *p.shape) * p.abs().mean() for k, (name, p) in enumerate(trained.items())}

    def losses(step):
        torch.manual_seed(0)
        moved = {name: parameter + step * directions[name] for name, parameter in trained.items()}
        found = torch.func.functional_call(model, moved, (views,))
        return torch.stack([found[name] for name in names])

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(losses, step, eps=1e-7, atol=0, rtol=1e-3)


def with_equal_features(model):
    """The model with heads by which every feature is the same, as are the keys in its queues."""
    for head in (model.head, model.key_head):
        torch.nn.init.zeros_(head.net[2].weight)  # every feature is the bias
        head.net[2].bias.data = (-1.0) ** torch.arange(128)  # whose channels differ
    for queue in model.queues.values():
        queue.keys = ((-1.0) ** torch.arange(queue.keys.shape[1]) * 128**-0.5).expand_as(queue.keys).clone()
    return model


def log_ratio(query: list, chosen: list, everything: list, temperature: float) -> float:
    """−log of Σ h over `chosen` by Σ h over `everything`, where h(x, y) = exp(x · y / temperature)."""
    h = [[math.exp(sum(map(operator.mul, query, key)) / temperature) for key in keys] for keys in (chosen, everything)]
    return -math.log(sum(h[0]) / sum(h[1]))


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def info_nce_loop(query, positive, negatives, temperature=0.1):
    pairs = zip(query, positive, strict=True)
    return mean([log_ratio(q, [p], [p, *negatives], temperature) for q, p in pairs])


def make_views(batch=3, sub_clips=2, crop=48, seed=0):
    """Views as the loader makes them, of smooth random videos, with random boxes (half of them flipped)."""
    rng = np.random.default_rng(seed)
    low = torch.from_numpy(rng.random((batch, 2, 2)) * 0.3)
    box = torch.cat([low, low + 0.5 + torch.from_numpy(rng.random((batch, 2, 2)) * 0.2)], 2).float()
    flipped = torch.from_numpy(rng.random((batch, 2)) < 0.5)[..., None]
    box = torch.where(flipped, box[..., [2, 1, 0, 3]], box)
    coarse = torch.from_numpy(rng.random((batch * 2 * (1 + sub_clips), 3, 4, 6, 6))).float()
    clips = (F.interpolate(coarse, (16, crop, crop), mode="trilinear") * 255).byte().unflatten(0, (batch, 2, -1))
    color = np.stack([data.draw_color(rng) for _ in range(batch * 2 * (2 + sub_clips))])
    views = {"clip": clips[:, :, 0], "box": box, "color": torch.from_numpy(color).unflatten(0, (batch, 2, -1))}
    return views | ({"sub_clips": clips[:, :, 1:]} if sub_clips else {})


def views_without_colours(**options):
    """Views of crop 32 whose colours stay as they are, for the sake of speed."""
    views = make_views(**dict(crop=32) | options)
    return views | {"color": torch.tensor([1.0, 1, 1, 0, 0, 0]).expand_as(views["color"])}


class Bare(torch.nn.Linear):
    """All that a method must have."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(3, 1)

    def forward(self, batch):
        return {"x": (super().forward(batch["x"]) - 1).square().mean()}
