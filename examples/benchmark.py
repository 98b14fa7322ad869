"""Speed of this code, as ratios of variants that take turns in one run.

    python examples/benchmark.py data --dataset folder --data /videos    # reading a sample, against decoding alone
    python examples/benchmark.py step --dataset ucf101    # a training step, against its encoder passes alone
    python examples/benchmark.py count --dataset ucf101    # bytes, FLOP, memory of a step on a GPU, without one

A machine's speed wanders, so milliseconds of two runs do not compare. After a warm-up of each, variants go round robin
(A B C A B C …), and what to quote is the ratio: the median over the rounds of a variant's time by the base's in the
same round. Tables are printed and written, with machine, versions, commit, command and options, to
OUT/benchmark_COMMAND_DEVICE.json.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import os
import platform
import statistics
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import av
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder
import augment
import data
import fima
from cli import command_line, dispatch, start_process
from models import recorded_inputs
from pretrain import Method
from runs import check_replaceable, made_by
from train import Process, Run, UserError, option, progress, sgd, user_errors, write_file
from video import BadVideo, Video

SAMPLES = 32  # that are read in a turn


@dataclasses.dataclass(frozen=True)
class StepConfig(fima.FIMAConfig):
    """Options of FIMA, and of its benchmarks; the default is what `python fima.py` trains."""

    rounds: int = option(5, "turns of each variant", (1, 10_000))
    processes: int = option(1, "count: processes, to count what they exchange", (1, 65_536))
    gpu: str = option("h100", "count: whose bandwidth, FLOP/s and memory to estimate by", ("h100", "a100", "2080ti"))
    out: str = option("results", "folder to write to")


def take_turns(
    works: dict[str, Callable[[], Any]], clock: Callable[[], float], rounds: int, process: Process
) -> dict[str, list[float]]:
    """Seconds of each work in each round, round robin, after two rounds to warm up: at first, memory is new."""
    seconds = {name: [] for name in works}
    for name in progress(process, [*works] * (2 + rounds), desc="turns", unit="turn", leave=False):
        start = clock()
        works[name]()
        seconds[name].append(clock() - start)
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


def write(config: StepConfig, command: str, device: torch.device, results: dict[str, Any]) -> None:
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


def reading(config: StepConfig) -> None:
    """Times the reading of samples, as training takes them, on one core, against decoding alone."""
    process, videos = start_process("cpu"), config.find_videos()
    torch.set_num_threads(1)
    print(videos.report)
    views = fima.FIMA(config).make_views(videos)
    keys = [(n, n * max(len(videos) // SAMPLES, 1) % len(videos)) for n in range(SAMPLES)]
    memory = views.empty()  # used again and again, as a place in the loader's batches is
    window = np.arange(config.frames * config.frame_stride)

    def read(reader: type[Video]) -> None:
        for epoch, index in keys:
            with reader(videos.paths[index]) as video:
                starts = views.draw_starts(np.random.default_rng([config.seed, epoch, index, 0]), video)[:, None]
                video.read(np.minimum(starts + window, len(video) - 1).ravel())

    ways = {
        "decoding alone, the limit": lambda: read(PicturesDropped),
        "and RGB of the frames": lambda: read(Video),
        "and crops, scaled: the whole sample": lambda: [views.write(key, memory) for key in keys],
    }
    try:
        seconds = take_turns(ways, time.process_time, config.rounds, process)
    except BadVideo as error:
        raise UserError(f"{error}: leave it out by --exclude") from error
    seconds = {name: [turn / len(keys) for turn in turns] for name, turns in seconds.items()}
    write(config, "data", process.device, {"one_core": compare("a sample on one core", seconds, next(iter(ways)))})


class Training:
    """Training of FIMA on one batch of noise; `flags` are other options. All steps do the same, as their rate is 0."""

    def __init__(self, config: StepConfig, process: Process, **flags: Any):
        torch.manual_seed(config.seed)
        options = dataclasses.replace(config, lr=0.0, **flags)
        self.method = fima.FIMA(options)
        self.run = Run(self.method, options, process, steps_per_epoch=1)
        made = self.method.make_views(data.VideoList([], [], [], ""))
        views = {name: values.zero_() for name, values in made.empty(config.batch_size * config.accumulate).items()}
        for name in {"clip", "sub_clips"} & views.keys():
            views[name].random_(0, 256)
        views["box"][:] = torch.tensor([40.0, 0.0, 280.0, 240.0])  # a step takes as long with any
        rng = np.random.default_rng(config.seed)
        for color in views["color"].flatten(0, 2):
            color.copy_(torch.from_numpy(data.draw_color(rng, **made.color)))
        self.views = {name: values.to(process.device) for name, values in views.items()}

    def step(self) -> None:
        self.run.step(self.views)

    def encoder_inputs(self) -> tuple[list[Tensor], list[Tensor]]:
        """What a step gives to the query and to the key encoder, pass by pass."""
        with recorded_inputs([self.method.encoder]) as query, recorded_inputs([self.method.key_encoder]) as key:
            self.step()
        return query, key

    def augmentation(self) -> Callable[[], Any]:
        """A function that makes, from uint8, all that a step gives to the encoders."""
        make = self.method.encoder_input
        with mock.patch.object(self.method, "encoder_input", wraps=make) as made:
            self.step()
        return lambda: [make(*call.args, **call.kwargs) for call in made.call_args_list]

    def encoders_alone(self, query_clips: list[Tensor], key_clips: list[Tensor]) -> None:
        """The floor of a step: its encoder passes, backward from a random gradient of the feature maps."""
        self.run.optimizer.zero_grad()
        with torch.autocast(self.run.process.device.type, torch.bfloat16, self.run.bf16):
            maps = [self.method.encoder(clips) for clips in query_clips]
            with torch.no_grad():
                for clips in key_clips:
                    self.method.key_encoder(clips)
        torch.autograd.backward(maps, [torch.randn_like(features) for features in maps])


def step(config: StepConfig) -> None:
    """Times a training step against its encoder passes and augmentation alone, and with other settings and losses."""
    process = start_process(config.device)
    on_gpu = process.device.type == "cuda"

    def clock() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    turns = functools.partial(take_turns, clock=clock, rounds=config.rounds, process=process)
    title = f"a training step, {config.encoder}, {config.frames} × {config.crop}²"
    training = Training(config, process)
    floor = functools.partial(training.encoders_alone, *training.encoder_inputs())
    works = {"step": training.step, "encoders alone": floor, "augmentation": training.augmentation()}
    results = {"floor": compare(title, turns(works), "encoders alone")}
    settings = {"contiguous": dict(memory_format="contiguous")}
    if on_gpu:
        settings |= {"float32": dict(precision="float32"), "compiled": dict(compile="on")}
    works = {"step": training.step} | {k: Training(config, process, **flags).step for k, flags in settings.items()}
    results["settings"] = compare(title, turns(works), "step")
    works = {terms: Training(config, process, losses=terms).step for terms in ("vv,vd", "vv,pix")}
    results["losses"] = compare("a training step with other losses", turns(works), "vv,vd")
    write(config, "step", process.device, results)


# Bytes/s of its memory, FLOP/s in float32 (convolutions in TF32 where it has that) and in 16 bit, dense, and GB.
GPUS = {"h100": (3.35e12, 494e12, 989e12, 80), "a100": (2.04e12, 156e12, 312e12, 80)}
GPUS["2080ti"] = 616e9, 13e12, 108e12, 11


class Counter(TorchDispatchMode):
    """Adds up what operators read and write, their FLOP, and the least time a GPU needs for them, by part of a step."""

    def __init__(self, bandwidth: float, flops: float):
        super().__init__()
        self.limits, self.part = (bandwidth, flops), "losses"
        self.parts = collections.defaultdict(collections.Counter)
        self.held = weakref.WeakSet()  # storages
        self.memory = self.peak = self.exchanged = 0

    def hold(self, tensor: Tensor) -> None:
        """Counts a tensor's memory until it is freed."""
        storage = tensor.untyped_storage()
        if storage not in self.held:
            self.held.add(storage)
            self.change(storage.nbytes())
            weakref.finalize(storage, self.change, -storage.nbytes())

    def change(self, size: int) -> None:
        self.memory += size
        self.peak = max(self.peak, self.memory)

    def __torch_dispatch__(self, function: Any, types: Any, given: tuple = (), named: dict | None = None) -> Any:
        result = function(*given, **(named or {}))
        ins, outs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((given, named), result))
        if function.namespace == "c10d":
            self.exchanged += sum(x.nbytes for x in ins)  # what it sends and what it receives
        if function.is_view or not outs or function.namespace == "c10d":
            return result
        for x in ins + outs:
            self.hold(x)
        size = sum(min(x.numel() * x.itemsize, x.untyped_storage().nbytes()) for x in ins + outs)
        count = flop_registry.get(function.overloadpacket, lambda *_, **__: 0)(*given, **(named or {}), out_val=result)
        least = max(size / self.limits[0], count / self.limits[1])
        self.parts[self.part].update({"GB": size / 1e9, "TFLOP": count / 1e12, "operators": 1.0, "ms": 1e3 * least})
        return result

    @contextlib.contextmanager
    def counts_as(self, part: str) -> Iterator[None]:
        """What is done in the block, or in a function that this decorates, counts as this part."""
        before, self.part = self.part, part
        yield
        self.part = before


def counted_step(method: Method, views: dict[str, Any], gpu: str, bf16: bool) -> Counter:
    """What a method's step costs, on tensors without data, in the operators that run on a GPU. torch raises an error
    where a step would wait for values, or has a shape that depends on them."""
    bandwidth, *flops, _ = GPUS[gpu]
    counter, fakes = Counter(bandwidth, flops[bf16]), FakeTensorMode(allow_non_fake_inputs=True)
    for name, module in method.named_children():
        if bf16 and name != "queues":  # autocast on a CPU leaves other operators in float32 than on a GPU
            module.bfloat16().register_forward_pre_hook(lambda _, given: tuple(x.bfloat16() for x in given))
    with mock.patch.object(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True):
        method._apply(fakes.from_tensor)
    views = {name: fakes.from_tensor(x) if isinstance(x, Tensor) else x for name, x in views.items()}
    with fakes, mock.patch.multiple(augment, _on_cpu=lambda clips: False, _on_gpu=augment._encoder_input):
        optimizer = sgd(method, method.config)
        method.encoder_input = counter.counts_as("colours")(method.encoder_input)
        for part, name in (("query pass", "encoder"), ("key passes", "key_encoder"), ("decoder", "decoder")):
            if module := getattr(method, name, None):
                module.forward = counter.counts_as(part)(module.forward)
        for x in (*method.parameters(), *method.buffers(), *views.values()):
            if isinstance(x, Tensor):
                counter.hold(x)
        with counter:
            loss = torch.stack(list(method(views).values())).sum()
            counter.counts_as("backward")(loss.backward)()
            counter.counts_as("optimizer")(optimizer.step)()
    return counter


def count(config: StepConfig) -> None:
    """Counts what a training step reads, writes and computes on a GPU, operator by operator, without a GPU: a bound
    from below of its time by `--gpu`, as an estimate, and its peak memory. Nothing is fused: colours, which are
    compiled on a GPU, then move less (see docs/speed.md)."""
    process, bf16 = start_process("cpu"), config.precision != "float32" and config.gpu != "2080ti"
    training = Training(dataclasses.replace(config, precision="float32", accumulate=1), process)
    if config.processes > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=config.processes)
    counter = counted_step(training.method, training.views, config.gpu, bf16)
    parts = counter.parts
    parts["all"] = {name: sum(row[name] for row in parts.values()) for name in parts["losses"]}
    shape = f"{config.batch_size} videos, {config.frames} × {config.crop}², {'bf16' if bf16 else 'float32'}"
    print(f"a step of {config.encoder}, {shape}; ms: at least, by operators, on {config.gpu}")
    print(" " * 12 + "".join(f"{name:>12}" for name in parts["all"]))
    for name, row in parts.items():
        print(f"{name:<12}" + "".join(f"{value:>12.{0 if value > 99 else 2}f}" for value in row.values()))
    trained = sum(p.numel() for p in training.method.parameters() if p.requires_grad)
    sizes = {"peak_memory": counter.peak / 1e9, f"of_{config.gpu}": GPUS[config.gpu][-1]}
    sizes |= {"exchanged": counter.exchanged / 1e9, "gradient": 16 * trained * (1 - 1 / config.processes) / 1e9}
    print("GB: " + ", ".join(f"{name} {size:.3g}" for name, size in sizes.items()))
    write(config, "count", process.device, {"parts": parts, "GB": sizes})


def main() -> None:
    """`benchmark.py COMMAND --flag value …`"""
    commands = {"data": reading, "step": step, "count": count}
    commands = {name: (function, StepConfig, fima.PRESETS) for name, function in commands.items()}
    name, command, config, _ = dispatch(commands, __doc__)
    for path in Path(config.out).glob(f"benchmark_{name}_*"):
        check_replaceable(path, b'{\n "command"')
    command(config)


if __name__ == "__main__":
    command_line(main)
