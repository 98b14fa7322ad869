"""Speed and memory of this code, as ratios of variants that take turns in one run.

    python benchmark.py data --data /videos     # reading, against decoding alone; the loader by number of workers
    python benchmark.py step                    # a training step, against its encoder passes alone
    python benchmark.py scale                   # its time and memory by processes, batch, crop, frames and queue

A machine's speed wanders, so milliseconds of two runs do not compare. After a warm-up of each, variants go round robin
(A B C A B C …), and what to quote is the ratio: the median over the rounds of a variant's time by the base's in the
same round. Every command prints tables and writes them, with machine, versions, commit, command and options, to
OUT/benchmark_COMMAND_DEVICE.json.

"plain" is the training step written straight down, as in the authors' code: a forward of its own for each view,
modality and sub-clip, decoder and L_Pix once per direction and feature frame, contiguous memory, float32. "encoders
alone" is the floor: the encoder passes of the step, forward and backward, on the same clips, and nothing else.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
import torch.distributed as dist
from av.video.reformatter import VideoReformatter
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import data
import fima
import find
import losses
import moco
import processes
import train
from cli import command_line, dispatch
from models import ENCODERS, momentum_update
from processes import start_process
from runs import check_replaceable, made_by
from train import Options, Process, UserError, option, progress, user_errors
from video import BadVideo, Video


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig(Options):
    """Options of the benchmarks; lists are numbers separated by commas."""

    data: str = option("datasets/synthetic", "data: a video or a folder of videos; the default's are made if need be")
    samples: int = option(32, "data: samples a turn", (1, 100_000))
    workers: str = option("0,1,2", "data: numbers of loader processes")
    encoder: str = option("i3d", "video encoder", tuple(ENCODERS))
    width: float = option(1.0, "factor on the encoder's numbers of channels", (0.01, 8))
    crop: int = option(224, "height and width of a clip in pixels", (1, 1024))
    frames: int = option(16, "frames of a clip", (8, 4096))
    batch_size: int = option(0, "videos a process; 0: the paper's 8, or 2 for steps on a CPU", (0, 65_536))
    losses: str = option("vv,pix,fra", "losses to sum, of vv, vd, pix and fra")
    queue: int = option(2048, "length of each queue of keys", (1, 2**24))
    rounds: int = option(5, "turns of each variant", (1, 10_000))
    processes: str = option("1,2,4", "scale: numbers of processes")
    batches: str = option("1,2,4", "scale: batch sizes")
    crops: str = option("112,160,224", "scale: crops")
    lengths: str = option("8,16,32", "scale: frames of a clip")
    queues: str = option("2048,16384,65536", "scale: lengths of the queues")
    way: str = option("ours", "one: which way of writing the step", ("ours", "plain"))
    device: str = option("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))
    seed: int = option(0, "seed of weights, views and samples", (0, 2**31 - 1))
    out: str = option("results", "folder to write to")

    def numbers(self, name: str, least: int = 1) -> list[int]:
        """The numbers of a list option, from `least` on; raises UserError."""
        most = 1024 if name in ("workers", "processes") else 2**24
        try:
            found = [int(number) for number in getattr(self, name).split(",")]
        except ValueError:
            found = [least - 1]
        if not least <= min(found) <= max(found) <= most:
            raise UserError(f"--{name} {getattr(self, name)}: numbers from {least} to {most}, separated by commas")
        return found


@dataclasses.dataclass(frozen=True)
class ScaleConfig(BenchmarkConfig):
    """Options of `scale`, each of whose settings is measured in processes of its own."""

    crop: int = option(112, "height and width of a clip in pixels", (1, 1024))
    rounds: int = option(3, "turns of each setting", (1, 10_000))


# ------------------------------------------------------------------------------------------------------------ timing


def now(device: torch.device) -> float:
    """Seconds on the wall clock, when the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


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


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> float:
    """Median over the rounds of a variant's time by that of the base in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def compare(title: str, seconds: dict[str, list[float]], base: str) -> dict[str, dict[str, Any]]:
    """Prints and returns each variant's median, minimum, rate, ratio to the base, and rounds."""
    rows = {}
    for name, turns in seconds.items():
        median = statistics.median(turns)
        rows[name] = {"median_ms": 1e3 * median, "min_ms": 1e3 * min(turns), "per_s": 1 / median}
        rows[name] |= {"ratio": ratio(seconds, name, base), "rounds_ms": [1e3 * turn for turn in turns]}
    show(f"{title}; ratio to: {base}", rows)
    return rows


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    """Prints the numbers of each row."""
    columns = [name for name, value in next(iter(rows.values())).items() if isinstance(value, float)]
    print(f"\n{title}\n{'':<46}" + "".join(f"{column.replace('_', ' '):>17}" for column in columns))
    for name, row in rows.items():
        print(f"{name:<46}" + "".join(f"{row[column]:>17,.3f}" for column in columns))


def write(config: BenchmarkConfig, command: str, device: torch.device, results: dict[str, Any]) -> None:
    """Writes results and where they come from to OUT/benchmark_COMMAND_DEVICE.json."""
    info = Path("/proc/cpuinfo")
    models = [x.partition(": ")[2] for x in info.read_text().splitlines() if "model name" in x] if info.exists() else []
    machine = {"cpu": models[0] if models else platform.processor(), "cores": os.cpu_count(), "load": os.getloadavg()}
    if device.type == "cuda":
        machine |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    record = made_by(config) | {
        "machine": machine | {"threads": torch.get_num_threads()},
        "written": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }
    path = Path(config.out) / f"benchmark_{command}_{device.type}.json"
    with user_errors():
        path.parent.mkdir(parents=True, exist_ok=True)
        train.write_file(path, json.dumps(record | results, indent=1) + "\n")
    print(f"\nwritten to {path}")


# -------------------------------------------------------------------------------------------------------------- data


class PicturesDropped(Video):
    """Decodes what the wanted frames need and drops each picture: the least that reading can cost."""

    def _pixels(self, image: av.VideoFrame) -> None:
        return None


def read_whole(path: str, side: int) -> list[np.ndarray]:
    """The usual way: all frames of a file in RGB, the shorter side scaled to `side` pixels."""
    with av.open(path) as container:
        codec = container.streams.video[0].codec_context
        codec.thread_type, codec.thread_count = "SLICE", 1
        size = [round(side * n / min(codec.width, codec.height)) for n in (codec.width, codec.height)]
        to_rgb = VideoReformatter()
        return [to_rgb.reformat(image, *size, "rgb24", threads=1).to_ndarray() for image in container.decode(video=0)]


def find_folder(config: BenchmarkConfig) -> data.VideoList:
    """The videos of `--data`."""
    if Path(config.data).is_file():
        return data.VideoList([config.data], [-1], [], f"{config.data}: 1 video")
    with user_errors():
        dataset = "synthetic" if config.data == BenchmarkConfig.data else "folder"
        return find.find_videos(dataset, config.data, train=True)


def reading(config: BenchmarkConfig) -> None:
    """Times a sample against decoding alone, and the loader by its number of workers."""
    process, workers, videos = start_process("cpu"), config.numbers("workers", least=0), find_folder(config)
    torch.set_num_threads(1)
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
        "usual way: the whole file, scaled, uncropped": lambda: [
            read_whole(videos.paths[index], config.crop * 8 // 7) for _, index in keys
        ],
    }
    try:
        seconds = take_turns({k: timed(way, time.process_time) for k, way in ways.items()}, config.rounds, process)
    except (BadVideo, av.FFmpegError) as error:
        raise UserError(f"{error}: take it out of {config.data}") from error
    seconds = {name: [turn / len(keys) for turn in turns] for name, turns in seconds.items()}
    results = {"one_core": compare("CPU time of a sample on one core", seconds, next(iter(ways)))}

    batch = config.batch_size
    copies = math.ceil(batch / len(videos))  # a single file fills a batch, too
    views.videos = data.VideoList(videos.paths * copies, videos.labels * copies, [], "")

    def sample_time(count: int) -> float:
        batches, sampler = 8 * max(count, 1), data.StepSampler(len(views), batch, epochs=10**6)
        with contextlib.closing(data.load_batches(views, sampler, count)) as loader:
            for _ in range(1 + data.PREFETCH * count):  # made ahead of the clock, while the workers started
                next(loader)
            return timed(lambda: [next(loader) for _ in range(batches)], time.perf_counter)() / (batches * batch)

    names = {f"workers {count}": count for count in workers}
    turns = {name: functools.partial(sample_time, count) for name, count in names.items()}
    seconds = take_turns(turns, config.rounds, process)
    results["loader"] = compare(f"a sample from the loader, batches of {batch}", seconds, next(iter(names)))
    write(config, "data", process.device, results)


# -------------------------------------------------------------------------------------------------------------- step


def random_views(method: fima.FIMA) -> dict[str, Tensor]:
    """A batch as training gets it, but of noise, in frames of 240 × 320."""
    config, rng = method.config, np.random.default_rng(0)
    nothing = data.VideoList([], [], [], "")
    views = data.PretrainingViews(nothing, config.crop, config.frames, config.frame_stride, method.sub_clips)
    batch = {name: memory.zero_() for name, memory in views.empty(config.batch_size).items()}
    for name in {"clip", "sub_clips"} & batch.keys():
        batch[name].random_(0, 256, generator=torch.Generator().manual_seed(0))
    for box, colors in zip(batch["box"].flatten(0, 1), batch["color"].flatten(0, 1), strict=True):
        top, left, height, width = data.draw_region(rng, 240, 320)
        x = rng.permutation([left, left + width])  # flipped or not
        box.copy_(torch.tensor([x[0], top, x[1], top + height]))
        colors.copy_(torch.from_numpy(np.stack([data.draw_color(rng) for _ in colors])))
    return batch


def plain_losses(method: fima.FIMA, views: dict[str, Tensor]) -> dict[str, Tensor]:
    """`FIMA.forward` at the paper's settings for UCF101, straight down: same losses, same keys in the queues."""
    config, terms, color, both = method.config, method.config.terms, views["color"], (0, 1)
    if method.training:
        momentum_update(method.encoder, method.key_encoder, config.momentum)
        momentum_update(method.head, method.key_head, config.momentum)

    def key_maps(clips: Tensor, v: int, draw: int) -> Tensor:
        return method.key_encoder(method.encoder_input(clips, color[:, v, draw], difference=draw > 0))

    def instance(head: nn.Module, maps: Tensor) -> Tensor:
        return method.project(head, moco.pool(maps))  # (B, D)

    def pixels(maps: Tensor, i: int) -> Tensor:
        return maps[:, :, i].flatten(2).mT  # (B, HW, C)

    clips = views["clip"].unbind(1)
    query = [method.encoder(method.encoder_input(clips[v], color[:, v, 0])) for v in both]
    frames, grid = range(query[0].shape[2]), query[0].shape[3:]
    keys = {}
    with torch.no_grad():
        key = [key_maps(clips[v], v, 0) for v in both]
        keys["vv"] = torch.cat([instance(method.key_head, maps) for maps in key])
        if {"vd", "pix"} & {*terms}:
            motion = [key_maps(clips[v], v, 1) for v in both]
            keys["vd"] = torch.cat([instance(method.key_head, maps) for maps in motion])
            m = [[method.project(method.key_head, pixels(motion[v], i)) for i in frames] for v in both]
            masks = [losses.foreground_mask(sum(map(losses.activation_map, x))) for x in zip(key, motion, strict=True)]
        if "fra" in terms:
            parts = [(v, i, views["sub_clips"][:, v, i]) for v in both for i in frames]
            local = [instance(method.key_head, key_maps(part, v, 2 + i)) for v, i, part in parts]
            keys["fra"] = torch.stack(local).unflatten(0, (2, -1)).transpose(1, 2).flatten(0, 2)
    found = {name: [] for name in terms}
    for v, other in ((0, 1), (1, 0)):
        for name in {"vv", "vd"} & {*terms}:
            q, k = instance(method.head, query[v]), keys[name].chunk(2)[other]
            found[name].append(losses.info_nce(q, k, method.queues[name].keys, config.temperature))
        for i in frames if method.decoder else ():
            y, y_cls = method.decoder(pixels(query[v], i), pixels(query[other], i))
            if "pix" in terms:
                pairs = losses.positive_pairs(views["box"][:, v], views["box"][:, other], grid)
                pairs = pairs & masks[v].flatten(1)[:, :, None] & masks[other].flatten(1)[:, None]
                prediction, everything = method.project(method.head, y), torch.stack(m[other]).flatten(0, 2)
                found["pix"].append(losses.pixel_contrast(prediction, m[other][i], pairs, everything))
            if "fra" in terms:
                own = other * len(frames) + i
                negatives = torch.cat([*local[:own], *local[own + 1 :], method.queues["fra"].keys])
                prediction = method.project(method.head, y_cls)
                found["fra"].append(losses.frame_info_nce(prediction, local[own], negatives))
    method.enqueue(keys)
    return {name: torch.stack(values).mean() for name, values in found.items()}


class Training:
    """Training steps of FIMA on one batch of noise, ours or plain; `flags` are options of `FIMAConfig`."""

    def __init__(self, config: BenchmarkConfig, process: Process, plain: bool = False, **flags: Any):
        flags |= {name: getattr(config, name) for name in ("encoder", "width", "crop", "frames", "queue")}
        flags = {"losses": config.losses, "batch_size": config.batch_size} | flags
        flags |= dict(memory_format="contiguous", precision="float32") if plain else {}
        torch.manual_seed(config.seed)
        with user_errors():
            self.method = fima.FIMA(fima.FIMAConfig(**flags)).to(process.device).train()
        self.views = {k: view.to(process.device) for k, view in random_views(self.method).items()}
        self.autocast = functools.partial(
            torch.autocast, process.device.type, torch.bfloat16, train.autocast_bf16(self.method.config, process)
        )
        model = self.method
        if process.world_size > 1:
            model = nn.parallel.DistributedDataParallel(
                self.method, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self.forward = functools.partial(plain_losses, self.method) if plain else model
        trainable = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trainable, 0.0, 0.9, weight_decay=1e-4)  # rate 0: all steps do the same

    def loss(self) -> Tensor:
        with self.autocast():
            return torch.stack(list(self.forward(self.views).values())).sum()

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()

    def encoder_inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a step gives to the query and to the key encoder, pass by pass."""
        inputs = [], []
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for encoder, seen in zip((self.method.encoder, self.method.key_encoder), inputs, strict=True):
                hook = functools.partial(lambda seen, _, clips: seen.extend(clips), seen)
                hooks.enter_context(encoder.register_forward_pre_hook(hook))
            self.loss()
        return inputs

    def encoders_alone(self, query_clips: list[Tensor], key_clips: list[Tensor]) -> None:
        """The floor of a step: its encoder passes, backward from a random gradient of the feature maps."""
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            maps = [self.method.encoder(clips) for clips in query_clips]
            with torch.no_grad():
                for clips in key_clips:
                    self.method.key_encoder(clips)
        torch.autograd.backward(maps, [torch.randn_like(features) for features in maps])


def step(config: BenchmarkConfig) -> None:
    """Times a training step: ours in several settings, plain, and the encoder passes alone."""
    process = start_process(config.device)
    clock, on_gpu, rounds = functools.partial(now, process.device), process.device.type == "cuda", config.rounds
    settings = {"ours": {}}
    if on_gpu:  # the default is among these once more: how far its ratio is from 1 shows the noise
        torch._dynamo.config.cache_size_limit = 64  # beyond its 8 graphs, the later variants would run uncompiled
        grid = itertools.product(("float32", "bf16"), ("contiguous", "channels_last"), ("off", "on"))
        names = ("precision", "memory_format", "compile")
        settings |= {f"{p}, {m}, compile {c}": dict(zip(names, (p, m, c), strict=True)) for p, m, c in grid}
    variants = {"plain": Training(config, process, plain=True).step}
    variants["ours, contiguous"] = Training(config, process, memory_format="contiguous").step
    variants |= {f"ours, {terms}": Training(config, process, losses=terms).step for terms in ("vv,vd", "vv,pix")}
    floors = {}
    for name, flags in settings.items():
        training = Training(config, process, **flags)
        uncompiled = Training(config, process, **flags | dict(compile="off"))  # compiled calls pass hooks by
        variants[name] = training.step
        floors[name] = functools.partial(training.encoders_alone, *uncompiled.encoder_inputs())

    def turns(works: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
        return take_turns({k: timed(work, clock, 5 if on_gpu else 1) for k, work in works.items()}, rounds, process)

    seconds = turns(variants)
    shape = f"{config.encoder} × {config.width:g}, {config.frames} × {config.crop}², {config.losses}"
    results = {"variants": compare(f"a training step, {shape}", seconds, "ours"), "floors": {}}
    for name, floor in floors.items():  # two by two: what shares a process shares its heap, and others stir it up
        pair = turns({name: variants[name], "encoders alone": floor})
        results["floors"][name] = compare(f"{name}, against the encoder passes that it needs", pair, "encoders alone")
    extra = ratio(seconds, "ours, vv,pix", "ours, vv,vd")
    results["pixel_loss_ratio"] = extra
    print(f"\nL_VV + L_Pix / L_VV + L_VD: {extra:.3f}")

    training = Training(config, process)
    with FlopCounterMode(display=False) as counter:
        training.step()
    results["gflop_per_sample"] = counter.get_total_flops() / 1e9 / config.batch_size
    print(f"\n{results['gflop_per_sample']:,.1f} GFLOP a sample")
    write(config, "step", process.device, results)  # what follows takes long, and may be stopped
    apart = {"ours": [], "plain": []}
    for way in progress(process, [*apart] * rounds, desc="processes of their own", unit="run", leave=False):
        apart[way].append(statistics.median(fresh(config, way=way)["seconds"]))
    title = "a training step in a process of its own, plain with the system's handling of the heap"
    results["apart"] = compare(title, apart, "ours")
    write(config, "step", process.device, results)


# ------------------------------------------------------------------------------------------------------------- scale


def one(config: BenchmarkConfig) -> None:
    """Times a step of one setting in this process, or in these, and prints one line of JSON.

    Plain does without our handling of the heap here: a process has one for all.
    """
    plain, received = config.way == "plain", collections.Counter()
    with mock.patch.object(processes, "keep_freed_memory") if plain else contextlib.nullcontext():
        process = start_process(config.device)
    training, on_gpu = Training(config, process, plain=plain), process.device.type == "cuda"

    def counted(name: str) -> Callable[..., Any]:
        call = getattr(dist, name)

        def counting(output: Tensor | list[Tensor], *arguments: Any, **options: Any) -> Any:
            received[name] += sum(part.nbytes for part in (output if isinstance(output, list) else [output]))
            return call(output, *arguments, **options)

        return counting

    with contextlib.ExitStack() as patches:
        for name in ("all_gather", "all_to_all_single", "all_reduce", "broadcast"):
            patches.enter_context(mock.patch.object(dist, name, counted(name)))
        training.step()
    if process.world_size > 1:
        received["gradients"] = sum(p.nbytes for p in training.method.parameters() if p.requires_grad)
    turn = timed(training.step, functools.partial(now, process.device), 5 if on_gpu else 1)
    seconds = take_turns({"step": turn}, config.rounds, process)["step"]
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if process.rank == 0:
        print(json.dumps({"seconds": seconds, "peak_gb": peak / 1e9, "received_bytes": received}))


def fresh(config: BenchmarkConfig, processes: int = 1, **flags: Any) -> dict[str, Any]:
    """What `one` prints of a setting in fresh processes, which share the CPU threads evenly.

    Raises:
        UserError: it failed.
    """
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    options = [f"--{name}={value}" for name, value in (dataclasses.asdict(config) | flags).items()]
    threads = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // processes))}
    command = [*launch, os.path.abspath(__file__), "one", *options]
    run = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True)
    if run.returncode:
        reasons = [line for line in run.stderr.splitlines() if "rror: " in line] or [f"exit code {run.returncode}"]
        setting = " ".join(f"--{name} {value}" for name, value in flags.items())
        raise UserError(f"{setting} with {processes} processes: {reasons[0].removeprefix('error: ')}")
    return json.loads(run.stdout.splitlines()[-1])


def scale(config: BenchmarkConfig) -> None:
    """Times a step by processes, batch, crop, frames and queue, one of them at a time from where the options start."""
    process = start_process(config.device)
    start = dict(processes=1, batch_size=config.batch_size, crop=config.crop, frames=config.frames, queue=config.queue)
    lists = dict(zip(start, ("processes", "batches", "crops", "lengths", "queues"), strict=True))
    swept = [(name, value) for name, flag in lists.items() for value in sorted({start[name], *config.numbers(flag)})]
    if process.device.type == "cuda":
        swept = [(name, n) for name, n in swept if name != "processes" or n <= torch.cuda.device_count()]
    found = {tuple((start | {name: value}).values()): [] for name, value in swept}
    for values in progress(process, [*found] * config.rounds, desc="settings", unit="run", leave=False):
        found[values].append(fresh(config, **dict(zip(start, values, strict=True)), rounds=2))
    seconds = {values: [statistics.median(run["seconds"]) for run in runs] for values, runs in found.items()}
    rows = {}
    for name, value in swept:
        setting = start | {name: value}
        values = tuple(setting.values())
        median, first = statistics.median(seconds[values]), found[values][0]
        rows[f"{name} {value}"] = setting | {
            "swept": name,
            "median_ms": 1e3 * median,
            "min_ms": 1e3 * min(seconds[values]),
            "ratio": ratio(seconds, values, tuple(start.values())),
            "samples_per_s": setting["processes"] * setting["batch_size"] / median,
            "peak_gb": first["peak_gb"],
            "exchanged_mb": sum(first["received_bytes"].values(), 0.0) / 1e6,
            "received_bytes": first["received_bytes"],
        }
    described = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in start.items())
    title = f"FIMA, {config.encoder} × {config.width:g} on {process.device.type}; where not swept: {described}"
    show(f"{title}; ratio to that", rows)
    write(config, "scale", process.device, {"rows": list(rows.values())})


COMMANDS = {
    "data": (reading, BenchmarkConfig),
    "step": (step, BenchmarkConfig),
    "scale": (scale, ScaleConfig),
    "one": (one, BenchmarkConfig),
}


def main() -> None:
    """`benchmark.py COMMAND --flag value …`"""
    name, command, config, _ = dispatch(COMMANDS, __doc__)
    default = 8 if name == "data" or torch.cuda.is_available() else 2
    config = dataclasses.replace(config, batch_size=config.batch_size or default)
    for path in Path(config.out).glob(f"benchmark_{name}_*"):
        check_replaceable(path, b'{\n "command"')
    command(config)


if __name__ == "__main__":
    command_line(main)
