"""Which run to continue: what checkpoints say of options and videos, against what is asked for."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

from train import Config, Process, UserError, _method_name, load_checkpoint, saved_options, unpack


def differences(was: dict, now: dict) -> str:
    """How what was seen differs from what is seen now, as far as both know it; "" for not at all.

    Args:
        was, now: lists of videos by name, with lines of path, label, class and bytes, or anything else by name.
    """
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
    must have seen what the first process sees now, `seen` (as in `differences`), unless --changed_data is on.

    Raises:
        UserError: it has not.
    """

    def compare() -> None:
        was = unpack(config.resume, load_checkpoint(config.resume, whole=False))
        changed = differences(was, seen)
        if changed and config.changed_data == "off":
            raise UserError(
                f"the data are not those that {config.resume} has seen: {changed}; undo that, start anew without "
                "--resume, or go on with them by --changed_data"
            )
        if changed:
            process.say(f"note: goes on with other data than {config.resume} has seen: {changed}")
        elif not was:
            process.say(f"note: {config.resume} does not say which videos it has seen, so they are not compared")

    if config.resume == "auto":
        path = process.of_first(lambda: find_run(config, seen, process.say))
        return dataclasses.replace(config, resume=path, out=config.out or (path and str(Path(path).parent)))
    if config.resume:
        process.of_first(compare)
    return config


def find_run(config: Config, seen: dict, say: Callable[[str], None]) -> str:
    """The readable checkpoint of most steps whose method, options (but FREE ones) and seen videos are these; "" for
    none. Says which, and what speaks against others.
    """
    method, found, others = _method_name(type(config)), [], {}
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
    nearest = sorted((len(against), path.parent, ", ".join(against)) for path, against in others.items())
    for _, other, against in list(dict.fromkeys(nearest))[:3]:
        say(f"--resume auto: another run is in {other}: {against}")
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
        try:
            os.makedirs(name)
        except FileExistsError:
            number += 1
            name = f"{path}-{number}"
        else:
            return name
