"""Runs on the disk: folders that are one run's alone, their records and checkpoints, and which run to continue."""

import contextlib
import dataclasses
import errno
import importlib.metadata
import json
import math
import os
import platform
import shlex
import stat
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from train import Config, Options, Process, Run, UserError, check_option, fit, method_name, user_errors, write_file

CHECKPOINT = {"method": str, "config": dict, "model": dict, "optimizer": dict}  # what it holds, of which type
COUNTS = {"step": 0, "steps_per_epoch": 1, "world_size": 1, "bad_videos": 0, "skipped_steps": 0}  # at least these
THIS_START = {"out", "resume", "max_steps", "changed_data"}  # options that a checkpoint does not hand on
_locks: dict[str, TextIO] = {}  # of the run folders that this process has


def claim_folder(path: Path, resume: str = "") -> None:
    """Makes a run folder this process's own, until the process's end, also by a kill.

    The lock is the system's, on the file `lock`, of a kind (POSIX record) that children do not inherit. Where there is
    none, a line says that nothing keeps a second run away. What a killed run left half-written is deleted.

    Raises UserError where another process has the folder, or it holds another run than that of the checkpoint to
    resume, if any, or logs that are not of a run; or it can't be written, or has checkpoints later than that which is
    to be resumed, which would be replaced.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file: name another --out")
    with user_errors((OSError,), path / "lock"):
        path.mkdir(parents=True, exist_ok=True)
        if (name := os.path.realpath(path)) not in _locks:  # to open and close it again would free it
            check_replaceable(path / "lock", b"process ")
            file = open(path / "lock", "a+")  # noqa: SIM115, as it is to be held
            try:
                import fcntl  # Windows has none

                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                file.seek(0)
                holder = file.read(200).strip() or "another process"
                raise UserError(f"{path} is in use by {holder}: wait for its end, or name another --out") from error
            except (ImportError, OSError) as error:
                print(f"warning: {path} can't be locked ({error}): start no second run with this --out")
            _locks[name] = file
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}\n")
            file.flush()
    checkpoints = [path / "checkpoint.pt", *sorted(path.glob("epoch_*.pt"))]
    if not resume or Path(resume).parent.resolve() != path.resolve():
        for saved in checkpoints:
            if saved.exists():
                again = f"continue it with --resume {shlex.quote(str(saved))}, move it away if it is damaged"
                raise UserError(f"{path} holds a run already: {again}, or name another --out")
        for log in (path / "log.jsonl", path / "bad_videos.log"):
            if log.exists() and not (path / "run.json").exists():
                raise UserError(f"{log} is of no run, as there is no run.json beside it: name another --out")
    elif Path(resume).name != "checkpoint.pt":
        done = epochs_done(resume)
        if later := [saved for saved in checkpoints if epochs_done(saved, False) > done and epochs_done(saved) > done]:
            raise UserError(f"{later[-1]} is later than {resume}, and would be replaced: name another --out")
    names = ("run.json", "log.jsonl", "bad_videos.log", "result.json", "result_confusion.png")
    for name in ("checkpoint.pt", "epoch_*.pt", *names):
        written = Path(os.path.realpath(path / name))  # where a link leads to
        for left in written.parent.glob(f"{written.name}.????????.partial"):
            left.unlink(missing_ok=True)


def check_replaceable(path: str | Path, *beginnings: bytes) -> None:
    """Raises UserError where `path` is there, but for an empty file and one with one of these beginnings."""
    begin = b"a folder" if os.path.exists(path) else b""
    if os.path.isfile(path):
        with user_errors((OSError,)), open(path, "rb") as file:
            begin = file.read(64)
    if begin and not begin.startswith(beginnings):
        other = "something else than what would be written there" if beginnings else "there already"
        raise UserError(f"{path} is {'a folder' if os.path.isdir(path) else other}: name another --out")


def git_commit() -> str:
    """Commit of the code that runs, "+changes" if a Python file of it differs; "" outside a git checkout."""
    here = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "--verify", "HEAD"], **here).stdout.strip()
        differs = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "*.py"], **here).returncode == 1
        return commit and commit + "+changes" * differs
    return ""


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results may depend on; on a GPU, what float32 is computed in."""
    packages = ("torch", "torchvision", "av", "numpy")
    found = {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}
    if torch.cuda.is_available():
        found["float32 convolutions"] = "TF32" if torch.backends.cudnn.allow_tf32 else "float32"
        found["float32 products"] = "TF32" if torch.backends.cuda.matmul.allow_tf32 else "float32"
    return found


def made_by(config: Options) -> dict[str, Any]:
    """What a record says of how it was made: command, options, commit and versions."""
    command, options = shlex.join([Path(sys.executable).name, *sys.argv]), dataclasses.asdict(config)
    return {"command": command, "config": options, "git_commit": git_commit(), "versions": versions()}


def read_json(path: Path) -> Any:
    """What a file of JSON holds; raises UserError where it can't be read, or is damaged."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): move it away") from error


def read_starts(path: Path) -> list[dict]:
    """run.json: a dict for each start of a run, the last one last; raises UserError as `read_json` does."""
    starts = read_json(path)
    for start in starts if isinstance(starts, list) and starts else [None]:
        if not (isinstance(start, dict) and all(isinstance(start.get(name), dict) for name in ("config", "versions"))):
            raise UserError(f"{path} is damaged (no list of starts with their config and versions): move it away")
    return starts


def read_lines(path: Path) -> list[dict[str, float]]:
    """The lines of log.jsonl, without damaged ones, as a kill may leave one."""
    lines = []
    for text in path.read_bytes().splitlines():
        with contextlib.suppress(AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            line = json.loads(text)
            numbers = [float(value) for value in line.values() if type(value) in (int, float)]
            if len(numbers) == len(line) and all(0 <= line[name] < math.inf for name in ("step", "epoch")):
                lines.append(line)
    return lines


def described(run: Run) -> str:
    """The options of a run, and what follows from them."""
    config, total, batch = run.config, run.total_batch, run.config.batch_size
    parameters = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    trained = f"{parameters:,} trainable parameters, {'bf16' if run.bf16 else 'float32'} on {run.process.device}"
    rate = f"learning rate {config.lr} × {total} / {config.LR_BATCH} = {config.lr * total / config.LR_BATCH:.3g}"
    steps = f"{run.steps_per_epoch} steps an epoch, {config.epochs * run.steps_per_epoch} in all"
    return f"{config}\n{trained}\ntotal batch {batch} × {total // batch} = {total}, {rate}, {steps}"


def open_record(run: Run, folder: Path) -> None:
    """Adds this start of a run to run.json, and cuts the logs to what a resumed run goes on from; a run that is not
    resumed, or that is from another folder, begins them anew. Raises UserError where a file can't be written, run.json
    is damaged, or --exclude names what the run writes."""
    record, log, bad_videos = folder / "run.json", folder / "log.jsonl", folder / "bad_videos.log"
    start = {"start_step": run.done, "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
    on_gpu = run.process.device.type == "cuda"
    hardware = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPU cores"
    start |= {"processes": run.process.world_size, "hardware": hardware}
    starts = read_starts(record) if record.exists() else []  # which finds out whether it is a run's
    excluded = map(str.strip, getattr(run.config, "exclude", "").split(","))
    if os.path.realpath(bad_videos) in map(os.path.realpath, excluded):
        raise UserError(f"--exclude {bad_videos}: this run writes there; copy the file, and name the copy")
    with user_errors((OSError,)):
        resume = run.config.resume
        if Path(resume).resolve().parent != folder.resolve() if resume else not run.done:
            # What is there is of one that was killed before it saved.
            starts = []
            for left in (log, bad_videos):
                left.unlink(missing_ok=True)
        write_file(record, json.dumps([*starts, made_by(run.config) | start], indent=1) + "\n")
        if log.exists():  # later steps come again; by the epoch, as with another batch a step is another part of it
            last = (run.done + 0.6) / run.steps_per_epoch
            write_file(log, "".join(json.dumps(line) + "\n" for line in read_lines(log) if line["epoch"] < last))
        if bad_videos.exists():
            content = bad_videos.read_bytes()
            write_file(bad_videos, content[: content.rfind(b"\n") + 1])  # a kill may have cut the last line


def load_checkpoint(path: str | Path, foreign: bool = False, whole: bool = True) -> dict:
    """A checkpoint of `fit`: what `CHECKPOINT` and `COUNTS` name, each of its type; runs no code in it.

    Args:
        foreign: take another project's file too, as a checkpoint of no method and no config whose "model" is all of it.
        whole: read and check the tensors' bytes, too, not only what is said of them.

    Raises UserError: no such file, no permission, damaged, or not a checkpoint of this project.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FileNotFoundError
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=not whole)
        if whole and zipfile.is_zipfile(path) and (wrong := zipfile.ZipFile(path).testzip()):
            raise zipfile.BadZipFile(wrong)  # torch compares no check sums
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"no checkpoint at {path}") from error
    except OSError as error:
        why = "is damaged" if error.errno == errno.EINVAL else f"can't be read: {error.strerror or error}"
        raise UserError(f"{path} {why}") from error  # torch seeks before the beginning of one that is cut off
    except MemoryError:
        raise
    except Exception as error:  # torch raises whatever its readers meet: pickle, zip, runtime and end-of-file errors
        raise UserError(f"{path} is damaged, or no checkpoint, or holds code, which is never run") from error
    state = {"bad_videos": 0, "skipped_steps": 0} | state if isinstance(state, dict) else state  # older ones lack them
    if not isinstance(state, dict) or not {*CHECKPOINT, *COUNTS} <= state.keys():
        if foreign:
            return {"method": "", "config": {}, "model": state}
        raise UserError(f"{path} is no checkpoint of this project: it lacks what `fit` saves")
    good = {name: isinstance(state[name], kind) for name, kind in CHECKPOINT.items()}
    good |= {name: type(state[name]) is int and least <= state[name] < 2**63 for name, least in COUNTS.items()}
    tensors = state["model"].items() if good["model"] else ()
    good["model"] &= all(isinstance(n, str) and isinstance(v, Tensor) and not v.is_meta for n, v in tensors)
    if wrong := ", ".join(name for name in good if not good[name]):
        raise UserError(f"{path} is damaged, or of other code: no valid {wrong} in it")
    if any(name.endswith(("units.0.conv3d.weight", "layers.12.weight")) for name in state["model"]):
        raise UserError(f"{path} is of an older conv4: only code of then takes it")
    return state


def epochs_done(path: str | Path, whole: bool = True) -> float:
    """How many epochs a checkpoint has behind it; none, if it can't be read (`load_checkpoint`)."""
    try:
        state = load_checkpoint(path, whole=whole)
    except UserError:
        return 0.0
    return state["step"] / state["steps_per_epoch"]


def saved_options(path: str | Path, state: dict, config_class: type[Options], given: Container[str] = ()) -> dict:
    """Those options of a checkpoint that a config has, but for what belongs to one start of a run. Raises UserError
    where one that is not given anew has a value that it can't have."""
    fields = [field for field in dataclasses.fields(config_class) if field.name in state["config"].keys() - THIS_START]
    for field in fields:
        if field.name not in given:
            check_option(field, state["config"][field.name], f"{path} was made with ")
    return {field.name: state["config"][field.name] for field in fields}


def pack(seen: dict) -> Tensor:
    """What a run has seen, as a checkpoint holds it: its videos' lists are long."""
    return torch.frombuffer(bytearray(zlib.compress(json.dumps(seen).encode())), dtype=torch.uint8)


def unpack(path: str | Path, state: dict) -> dict:
    """What the run of a checkpoint has seen; nothing, if it was written before that was kept."""
    try:
        seen = json.loads(zlib.decompress(state["seen"].numpy())) if "seen" in state else {}
        rows = [row for name, rows in seen.items() if name != "encoder" for row in rows]
        if any(len(row) != 4 or type(row[0]) is not str for row in rows):
            raise ValueError
        return seen
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError, zlib.error) as error:
        raise UserError(f"{path} is damaged, or of other code: no valid seen in it") from error


def differences(was: dict, now: dict) -> str:
    """How what was seen differs from what is seen now, as far as both know it; "" for not at all. Either has lists of
    videos by name, with lines of path, label, class and bytes, or anything else by name."""
    found = []
    for name in (name for name in now if name in was and was[name] != now[name]):
        if not isinstance(now[name], list):
            found.append(f"another {name}")
            continue
        old, new = ({path: rest for path, *rest in seen[name]} for seen in (was, now))
        both = [path for path in new if path in old]
        kinds = {
            "more": [path for path in new if path not in old],
            "fewer": [path for path in old if path not in new],
            "with another label": [path for path in both if old[path][:2] != new[path][:2]],
            "of another size": [path for path in both if old[path][2] != new[path][2]],
        }
        parts = [f"{len(paths)} {kind} ({paths[0]!r})" for kind, paths in kinds.items() if paths]
        found.append(f"{name}: " + (", ".join(parts) or "in another order"))
    return "; ".join(found)


def continued(config: Config, process: Process, seen: dict) -> Config:
    """The options with the checkpoint to continue: the one that `--resume auto` finds, or none; or the one named, which
    must have seen what the first process sees now, `seen` (as in `differences`), unless --changed_data is on, or else
    raises UserError."""
    if config.resume == "auto":
        path = process.of_first(lambda: find_run(config, seen, process.say))
        return dataclasses.replace(config, resume=path, out=config.out or (path and str(Path(path).parent)))
    if path := config.resume:
        changed = process.of_first(lambda: differences(unpack(path, load_checkpoint(path, whole=False)), seen))
        if changed and config.changed_data == "off":
            raise UserError(f"the data are not those that {path} has seen: {changed}; undo that, or add --changed_data")
        if changed:
            process.say(f"note: goes on with other data than {path} has seen: {changed}")
    return config


def find_run(config: Config, seen: dict, say: Callable[[str], None]) -> str:
    """The readable checkpoint of most epochs whose method, options (but FREE ones) and seen videos are these; "" for
    none. Says which, what speaks against the nearest other one, and which can't be read."""
    method, found, others = method_name(type(config)), [], {}
    beside = getattr(config, "checkpoint", "")
    folder = Path(config.out or (Path(beside).parent if beside else "runs"))
    look = folder.glob if config.out else folder.rglob
    for path in [path for name in ("checkpoint.pt", "epoch_*.pt") for path in sorted(look(name)) if path.is_file()]:
        try:
            state = load_checkpoint(path, whole=False)
            if state["method"] != method:
                continue
            was, saved = unpack(path, state), saved_options(path, state, type(config))
        except UserError as error:
            say(f"--resume auto: passes over a checkpoint: {error}")
            continue
        free = config.FREE | {"checkpoint"} if was else config.FREE - {"data"}  # files tell what paths may not
        now = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
        saved = {name: saved.get(name, getattr(type(config), name)) for name in now}
        against = [f"--{name} {saved[name]}, not {now[name]}" for name in now if saved[name] != now[name]]
        against += filter(None, [differences(was, seen)])
        if against:
            others[path] = against
        elif path.with_name("checkpoint.pt") not in others:  # else it was continued as another run
            found.append((state["step"] / state["steps_per_epoch"], path.name == "checkpoint.pt", path))
    if others:
        path = min(others, key=lambda path: len(others[path]))
        say(f"--resume auto: another run is in {path.parent}: {', '.join(others[path])}")
    for *_, path in sorted(found, reverse=True):
        try:
            step = load_checkpoint(path)["step"]
            say(f"--resume auto: found {path}, step {step}, the furthest of these options and videos")
            return str(path)
        except UserError as error:
            say(f"--resume auto: passes over a checkpoint: {error}")
    say(f"--resume auto: no checkpoint of {method} with these options below {folder}: starts anew")
    return ""


def unused_folder(path: str) -> str:
    """Makes a folder of this name, or if there is one, as of a run started in the same second, of NAME-2, NAME-3 …"""
    name, number = path, 1
    while True:
        with contextlib.suppress(FileExistsError):
            os.makedirs(name)
            return name
        number += 1
        name = f"{path}-{number}"


def fit_in_folder(
    method: nn.Module, config: Config, process: Process, load: Callable, steps: int, out: str, seen: dict, **options
) -> Path:
    """`fit` in a run folder, `config.out` or else `out`, from the checkpoint `config.resume` on, if any. `steps` are
    batches in an epoch; `seen` is what checkpoints are to say of the videos, on the first process (`continued`); `load`
    and `options` are as in `fit`.

    Raises UserError where the folder is another run's, or can't be made; and as `fit` and `load_checkpoint` do.
    """
    folder, path = Path(config.out or out), config.resume
    process.of_first(lambda: claim_folder(folder, path))  # before the checkpoint is read: none writes it now
    state = process.of_first(lambda: load_checkpoint(path)) if path else None  # other nodes need not have it
    run = Run(method, config, process, steps, state)
    if state:
        seen, was, now = unpack(path, state) | seen, state["config"], dataclasses.asdict(config)
        both = [name for name in now if name in was.keys() - THIS_START and str(was[name]) != str(now[name])]
        if both:
            process.say("note: goes on with " + ", ".join(f"--{k} {now[k]} (was {was[k]})" for k in both))
        del state  # its tensors are the run's now
    if run.done >= run.stop:
        process.say(f"{path} is at step {run.done} of {run.stop}: nothing left to train (--epochs, --max_steps)")
        return Path(path)
    process.say(described(run))
    process.of_first(lambda: open_record(run, folder))
    process.say(f"run folder {folder}" + (f", resumed after step {run.done}" if path else ""))
    return fit(run, load, folder, extra={"seen": pack(seen)}, **options)
