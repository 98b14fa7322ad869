#!/bin/bash
# Makes runs/small anew, the trained encoder that comes with the project: half an hour on two CPU cores.
set -eu
cd "$(dirname "$0")/.."
python fima.py --epochs 48 --workers 1 --out runs/whole --resume auto
mkdir -p runs/small
cp runs/whole/{run.json,log.jsonl} runs/small
python - <<'END'
import torch

from runs import pack

state = torch.load("runs/whole/checkpoint.pt")
kept = {name: value for name, value in state["model"].items() if name.startswith(("encoder.", "decoder."))}
state["model"] = {name: value.half() if value.is_floating_point() else value for name, value in kept.items()}
seen = pack({"videos": []})  # so that --resume auto never takes it
torch.save(state | {"optimizer": {}, "seen": seen}, "runs/small/checkpoint.pt")
END
python evaluate.py retrieve --checkpoint runs/small/checkpoint.pt
python evaluate.py linear --checkpoint runs/small/checkpoint.pt --cached 10
