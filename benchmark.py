"""Speed of this code, as ratios of variants that take turns in one run.

    python benchmark.py data --data /videos     # reading, against decoding alone; the loader by number of workers
    python benchmark.py step                    # a training step of FIMA, against its encoder passes alone

A machine's speed wanders, so milliseconds of two runs do not compare. After a warm-up of each, variants go round robin
(A B C A B C …), and what to quote is the ratio: the median over the rounds of a variant's time by the base's in the
same round. "plain" is the step written straight down, as in the authors' code: a forward of its own for each view,
modality and sub-clip, decoder and L_Pix once per direction and feature frame, contiguous memory, float32. Tables are
printed and written, with machine, versions, commit, command and options, to OUT/benchmark_COMMAND_DEVICE.json.
"""

import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor, nn

import data
import fima
import find
import losses
import moco
from cli import command_line, dispatch
from models import ENCODERS, momentum_update, recorded_inputs
from processes import start_process
from runs import check_replaceable, made_by
from train import Options, Process, UserError, autocast_bf16, option, progress, user_errors, write_file
from video import BadVideo, Video


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Options):
    """Options of the benchmarks."""

    data: str = option("datasets/synthetic", "data: a folder of videos; the default's are made if need be")
    samples: int = option(32, "data: samples a turn", (1, 100_000))
    workers: int = option(2, "data: loader processes at most, tried are 0, 1, 2, 4 …", (0, 1024))
    encoder: str = option("i3d", "step: video encoder", tuple(ENCODERS))
    width: float = option(1.0, "step: factor on the encoder's numbers of channels", (0.01, 8))
    queue: int = option(2048, "step: length of each queue of keys", (1, 2**24))
    crop: int = option(224, "height and width of a clip in pixels", (1, 1024))
    frames: int = option(16, "frames of a clip", (8, 4096))
    batch_size: int = option(0, "videos; 0: the paper's 8, or 2 for steps on a CPU", (0, 65_536))
    rounds: int = option(5, "turns of each variant", (1, 10_000))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of weights, views and samples", (0, 2**31 - 1))
    out: str = option("results", "folder to write to")


def timed(work: Callable[[], Any], clock: Callable[[], float], repeats: int = 1) -> Callable[[], float]:
    """A variant for `take_turns`: works `repeats` times and returns the seconds of once."""

    def turn() -> float:
        start = clock()
        for _ in range(repeats):
            work()
        return (clock() - start) / repeats

    return turn


def take_turns(variants: dict[str, Callable[[], float]], rounds: int, process: Process) -> dict[str, list[float]]:
    """Seconds of each variant in each round, round robin, after two rounds to warm up: at first, memory is new."""
    seconds = {name: [] for name in variants}
    for name in progress(process, [*variants] * (2 + rounds), desc="turns", unit="turn", leave=False):
        seconds[name].append(variants[name]())
    return {name: turns[2:] for name, turns in seconds.items()}


def compare(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Prints and returns each variant's median, its ratio to the base, and its rounds."""
    print(f"\n{title}; ratio to: {base}\n{'':<46}{'median ms':>14}{'ratio':>9}")
    rows = {}
    for name, turns in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(turns, seconds[base], strict=True))
        median = 1e3 * statistics.median(turns)
        rows[name] = {"median_ms": median, "ratio": ratio, "rounds_ms": [1e3 * turn for turn in turns]}
        print(f"{name:<46}{median:>14,.3f}{ratio:>9.3f}")
    return rows


def write(config: BenchmarkConfig, command: str, device: torch.device, results: dict[str, Any]) -> None:
    """Writes results and where they come from to OUT/benchmark_COMMAND_DEVICE.json."""
    machine = {"cpu": platform.processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        machine["cpu"] = next((x.partition(": ")[2] for x in lines if "model name" in x), machine["cpu"])
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    record = made_by(config) | {"machine": machine, "written": time.strftime("%Y-%m-%d %H:%M:%S %z")} | results
    path = Path(config.out) / f"benchmark_{command}_{device.type}.json"
    with user_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(record, indent=1) + "\n")
    print(f"\nwritten to {path}")


class PicturesDropped(Video):
    """Decodes what the wanted frames need and drops each picture: the least that reading can cost."""

    def _pixels(self, image: av.VideoFrame) -> None:
        return None


def reading(config: BenchmarkConfig) -> None:
    """Times a sample against decoding alone, and the loader by its number of workers."""
    process = start_process("cpu")
    torch.set_num_threads(1)
    with user_errors():
        dataset = "synthetic" if config.data == BenchmarkConfig.data else "folder"
        videos = find.find_videos(dataset, config.data, train=True)
        sampler = data.StepSampler(len(videos), config.batch_size, epochs=10**6)
    print(videos.report)
    parts, window = config.frames // 8, 2 * config.frames  # FIMA's sub-clips, one a feature frame, and frame stride
    views = data.PretrainingViews(videos, config.crop, config.frames, 2, parts, config.seed)
    keys = [(n, n * max(len(videos) // config.samples, 1) % len(videos)) for n in range(config.samples)]
    memory = views.empty()  # used again and again, as a place in the loader's batches is

    def read(reader: type[Video]) -> None:
        for epoch, index in keys:
            with reader(videos.paths[index]) as video:
                starts = views.draw_starts(np.random.default_rng([config.seed, epoch, index, 0]), video)[:, None]
                video.read(np.minimum(starts + np.arange(window), len(video) - 1).ravel())

    ways = {
        "decoding alone, the limit": lambda: read(PicturesDropped),
        "and RGB of the frames": lambda: read(Video),
        "and crops, scaled: the whole sample": lambda: [views.write(key, memory) for key in keys],
    }
    try:
        seconds = take_turns({k: timed(way, time.process_time) for k, way in ways.items()}, config.rounds, process)
    except BadVideo as error:
        raise UserError(f"{error}: take it out of {config.data}") from error
    seconds = {name: [turn / len(keys) for turn in turns] for name, turns in seconds.items()}
    results = {"one_core": compare("CPU time of a sample on one core", seconds, next(iter(ways)))}

    def sample_time(workers: int) -> float:
        batches = 8 * max(workers, 1)
        with contextlib.closing(data.load_batches(views, sampler, workers)) as loader:
            for _ in range(1 + data.PREFETCH * workers):  # made ahead of the clock, while the workers started
                next(loader)
            return timed(lambda: next(loader), time.perf_counter, batches)() / config.batch_size

    counts = [0, *(2**n for n in range(config.workers.bit_length()))]
    turns = {f"workers {count}": functools.partial(sample_time, count) for count in counts}
    seconds = take_turns(turns, config.rounds, process)
    results["loader"] = compare(f"a sample from the loader, batches of {config.batch_size}", seconds, "workers 0")
    write(config, "data", process.device, results)


def plain_losses(method: fima.FIMA, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """`FIMA.forward` at the paper's settings for UCF101, straight down: same losses, same keys in the queues."""
    config, color, found = method.config, views["color"], {"vv": [], "pix": [], "fra": []}
    momentum_update(method.encoder, method.key_encoder, config.momentum)
    momentum_update(method.head, method.key_head, config.momentum)

    def key_maps(clips: Tensor, v: int, draw: int) -> Tensor:
        return method.key_encoder(method.encoder_input(clips, color[:, v, draw], difference=draw > 0))

    def instance(head: nn.Module, maps: Tensor) -> Tensor:
        return method.project(head, moco.pool(maps))  # (B, D)

    clips = views["clip"].unbind(1)
    query = [method.encoder(method.encoder_input(clips[v], color[:, v, 0])) for v in (0, 1)]
    frames, grid = range(query[0].shape[2]), query[0].shape[3:]
    with torch.no_grad():
        key, motion = ([key_maps(clips[v], v, draw) for v in (0, 1)] for draw in (0, 1))
        k = [instance(method.key_head, maps) for maps in key]
        m = [[method.project(method.key_head, maps[:, :, i].flatten(2).mT) for i in frames] for maps in motion]
        masks = [losses.foreground_mask(sum(map(losses.activation_map, x))) for x in zip(key, motion, strict=True)]
        parts = [(v, i, views["sub_clips"][:, v, i]) for v in (0, 1) for i in frames]
        local = [instance(method.key_head, key_maps(part, v, 2 + i)) for v, i, part in parts]
    for v, other in ((0, 1), (1, 0)):
        q, queues = instance(method.head, query[v]), method.queues
        found["vv"].append(losses.info_nce(q, k[other], queues["vv"].keys, config.temperature))
        for i in frames:
            source, target = (query[view][:, :, i].flatten(2).mT for view in (v, other))  # (B, HW, C)
            y, y_cls = (method.project(method.head, x) for x in method.decoder(source, target))
            pairs = losses.positive_pairs(views["box"][:, v], views["box"][:, other], grid)
            pairs = pairs & masks[v].flatten(1)[:, :, None] & masks[other].flatten(1)[:, None]
            found["pix"].append(losses.pixel_contrast(y, m[other][i], pairs, torch.stack(m[other]).flatten(0, 2)))
            own = other * len(frames) + i
            negatives = torch.cat([*local[:own], *local[own + 1 :], queues["fra"].keys])
            found["fra"].append(losses.frame_info_nce(y_cls, local[own], negatives))
    keys = torch.stack(local).unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 2)
    method.enqueue({"vv": torch.cat(k), "fra": keys})
    return {name: torch.stack(values).mean() for name, values in found.items()}


class Training:
    """Training steps of FIMA on one batch of noise, ours or plain; `flags` are options of `FIMAConfig`."""

    def __init__(self, config: BenchmarkConfig, process: Process, plain: bool = False, **flags: Any):
        names = ("encoder", "width", "crop", "frames", "queue", "batch_size")
        torch.manual_seed(config.seed)
        with user_errors():
            options = fima.FIMAConfig(**{name: getattr(config, name) for name in names} | flags)
            self.method = fima.FIMA(options).to(process.device).train()
        self.forward = functools.partial(plain_losses, self.method) if plain else self.method
        nothing, parts = data.VideoList([], [], [], ""), self.method.sub_clips
        memory = data.PretrainingViews(nothing, config.crop, config.frames, options.frame_stride, parts)
        self.views = {name: values.zero_() for name, values in memory.empty(config.batch_size).items()}
        for name in {"clip", "sub_clips"} & self.views.keys():
            self.views[name].random_(0, 256)
        rng = np.random.default_rng(config.seed)
        for box, colors in zip(self.views["box"].flatten(0, 1), self.views["color"].flatten(0, 1), strict=True):
            top, left, height, width = data.draw_region(rng, 240, 320)
            x = rng.permutation([left, left + width])  # flipped or not
            box.copy_(torch.tensor([x[0], top, x[1], top + height]))
            colors.copy_(torch.from_numpy(np.stack([data.draw_color(rng) for _ in colors])))
        self.views = {name: values.to(process.device) for name, values in self.views.items()}
        bf16 = autocast_bf16(options, process)
        self.autocast = functools.partial(torch.autocast, process.device.type, torch.bfloat16, bf16)
        trainable = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, 0.0, 0.9, weight_decay=1e-4)  # rate 0: all steps do the same

    def step(self) -> None:
        self.optimizer.zero_grad()
        with self.autocast():
            loss = torch.stack(list(self.forward(self.views).values())).sum()
        loss.backward()
        self.optimizer.step()

    def encoder_inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a step gives to the query and to the key encoder, pass by pass."""
        with recorded_inputs([self.method.encoder]) as query, recorded_inputs([self.method.key_encoder]) as key:
            self.step()
        return query, key

    def encoders_alone(self, query_clips: list[Tensor], key_clips: list[Tensor]) -> None:
        """The floor of a step: its encoder passes, backward from a random gradient of the feature maps."""
        self.optimizer.zero_grad()
        with self.autocast():
            maps = [self.method.encoder(clips) for clips in query_clips]
            with torch.no_grad():
                for clips in key_clips:
                    self.method.key_encoder(clips)
        torch.autograd.backward(maps, [torch.randn_like(features) for features in maps])


def step(config: BenchmarkConfig) -> None:
    """Times a training step against its encoder passes alone, and in other settings and with other losses."""
    process = start_process(config.device)
    on_gpu = process.device.type == "cuda"

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def turns(works: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        repeats = 5 if on_gpu else 1
        return take_turns({k: timed(work, clock, repeats) for k, work in works.items()}, config.rounds, process)

    title = f"a training step, {config.encoder}, {config.frames} × {config.crop}²"
    training = Training(config, process)
    floor = functools.partial(training.encoders_alone, *training.encoder_inputs())
    seconds = turns({"step": training.step, "encoders alone": floor})
    results = {"floor": compare(title, seconds, "encoders alone")}
    settings = {"contiguous": dict(memory_format="contiguous")}
    settings["plain"] = settings["contiguous"] | dict(plain=True, precision="float32")
    if on_gpu:
        settings |= {"float32": dict(precision="float32"), "compiled": dict(compile="on")}
    works = {"step": training.step} | {k: Training(config, process, **flags).step for k, flags in settings.items()}
    results["settings"] = compare(title, turns(works), "step")
    works = {terms: Training(config, process, losses=terms).step for terms in ("vv,vd", "vv,pix")}
    results["losses"] = compare("a training step with other losses", turns(works), "vv,vd")
    write(config, "step", process.device, results)


def main() -> None:
    """`benchmark.py COMMAND --flag value …`"""
    commands = {"data": (reading, BenchmarkConfig), "step": (step, BenchmarkConfig)}
    name, command, config, _ = dispatch(commands, __doc__)
    default = 8 if name == "data" or torch.cuda.is_available() else 2
    config = dataclasses.replace(config, batch_size=config.batch_size or default)
    for path in Path(config.out).glob(f"benchmark_{name}_*"):
        check_replaceable(path, b'{\n "command"')
    command(config)


if __name__ == "__main__":
    command_line(main)
