#!/bin/bash
# Trains and probes the rows of docs/results.md, two at a time with one thread each, and adds a line for each run to
# results/generated.jsonl. Rows that are there are left out, and a run that was stopped goes on:
#
#     bash results/make.sh                    # all rows, seeds 1, 2, 3: 15 minutes each, people 20 to 150
#     bash results/make.sh '^1 shots fima'    # those whose "SEED SET ROW" matches
#
# Videos and runs lie in datasets/ and runs/results/: remove them afterwards.
set -eu
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1

rows() { # set, row (…_last: the frame difference is coloured, not frames), script and flags
    local labels="evaluate.py finetune --encoder conv4 --crop 32 --min_scale 0.5 --epochs 24 --batch_size 32"
    labels="$labels --dropout 0 --jitter_p 0.2" # chosen on seed 4 of the default set
    cat <<END
shots   untrained   none
shots   moco        moco.py
shots   moco_longer moco.py --epochs 62
shots   moco_vd     moco.py --losses vv,vd
shots   fra         fima.py --losses vv,fra
shots   dc          fima.py --losses vv,pix --mask_position none --decoder none
shots   dc_fs       fima.py --losses vv,pix --decoder none
shots   dc_md       fima.py --losses vv,pix --mask_position none
shots   pix         fima.py --losses vv,pix
shots   fima        fima.py
shots   adjacent    fima.py --difference adjacent
shots   fima_last   fima.py --color_first off
shots   adjacent_last fima.py --difference adjacent --color_first off
shots   fg_30       fima.py --losses vv,pix --foreground 0.3
shots   fg_70       fima.py --losses vv,pix --foreground 0.7
shots   fg_rgb      fima.py --losses vv,pix --mask_source rgb
shots   fg_diff     fima.py --losses vv,pix --mask_source difference
shots   fg_source   fima.py --losses vv,pix --mask_position prediction
shots   fg_target   fima.py --losses vv,pix --mask_position target
shots   tubelet     examples/tubelet_contrast.py
motion  single      $labels
motion  supervised  $labels
motion  moco        moco.py
motion  moco_longer moco.py --epochs 62
motion  moco_vd     moco.py --losses vv,vd
motion  fra         fima.py --losses vv,fra
motion  dc          fima.py --losses vv,pix --mask_position none --decoder none
motion  dc_fs       fima.py --losses vv,pix --decoder none
motion  dc_md       fima.py --losses vv,pix --mask_position none
motion  pix         fima.py --losses vv,pix
motion  fima        fima.py
motion  adjacent    fima.py --difference adjacent
motion  fima_last   fima.py --color_first off
motion  adjacent_last fima.py --difference adjacent --color_first off
motion  fame        fame.py
motion  dclr        dclr.py --delay 12
motion  mcl         mcl.py
motion  mcl_v2      mcl.py --alignment v2
motion  fima_fame   fima.py --fame single
motion  tubelet     examples/tubelet_contrast.py
long    moco        moco.py
long    moco_vd     moco.py --losses vv,vd
long    dc          fima.py --losses vv,pix --mask_position none --decoder none
long    pix         fima.py --losses vv,pix
long    fima        fima.py
scenes  untrained   none
scenes  supervised  $labels
scenes  moco        moco.py
scenes  moco_vd     moco.py --losses vv,vd
scenes  pix         fima.py --losses vv,pix
scenes  fima        fima.py
scenes  fame        fame.py
scenes  dclr        dclr.py --delay 12
scenes  single      $labels
half    untrained   none
half    supervised  $labels
half    moco        moco.py
half    moco_vd     moco.py --losses vv,vd
half    pix         fima.py --losses vv,pix
half    fima        fima.py
half    fame        fame.py
half    dclr        dclr.py --delay 12
half    single      $labels
even    untrained   none
even    supervised  $labels
even    moco        moco.py
even    moco_vd     moco.py --losses vv,vd
even    pix         fima.py --losses vv,pix
even    fima        fima.py
even    fame        fame.py
even    dclr        dclr.py --delay 12
even    single      $labels
shake   untrained   none
shake   moco        moco.py
shake   moco_vd     moco.py --losses vv,vd
shake   dc          fima.py --losses vv,pix --mask_position none --decoder none
shake   dc_fs       fima.py --losses vv,pix --decoder none
shake   pix         fima.py --losses vv,pix
shake   fima        fima.py
shake   adjacent    fima.py --difference adjacent
shake   fima_last   fima.py --color_first off
shake   adjacent_last fima.py --difference adjacent --color_first off
people  untrained   none
people  supervised  evaluate.py finetune --encoder conv4 --crop 64 --dropout 0 --jitter_p 0.2
people  moco        moco.py --momentum 0.99
people  moco_vd     moco.py --losses vv,vd --momentum 0.99
people  pix         fima.py --losses vv,pix --momentum 0.99 --decoder_width 128
people  fima        fima.py --momentum 0.99 --decoder_width 128
people  color_first fima.py --momentum 0.99 --decoder_width 128 --color_first on
people  moco_whole  moco.py --momentum 0.99 --frame_stride 3 --min_scale 0.5
people  fima_whole  fima.py --momentum 0.99 --decoder_width 128 --frame_stride 3 --min_scale 0.5
people  fima_longer fima.py --momentum 0.99 --decoder_width 128 --frame_stride 3 --min_scale 0.5 --epochs 100
people  moco_300    moco.py --momentum 0.99 --frame_stride 3 --min_scale 0.5 --epochs 300 --keep_every 100
people  fima_300    fima.py --momentum 0.99 --decoder_width 128 --frame_stride 3 --min_scale 0.5 --epochs 300 --keep_every 100
people  i3d         none --encoder i3d --width 0.25
people  i3d_labels  evaluate.py finetune --crop 64 --encoder i3d --width 0.25
people  i3d_moco    moco.py --momentum 0.99 --encoder i3d --width 0.25
people  i3d_fima    fima.py --momentum 0.99 --decoder_width 128 --encoder i3d --width 0.25
people  fra         fima.py --losses vv,fra --momentum 0.99 --decoder_width 128
people  fame        fame.py --momentum 0.99
people  dclr        dclr.py --delay 10 --refresh 1
people  mcl         mcl.py --momentum 0.99 --flow_side 64 --flow_warps 2
END
}

videos() { # seed, set; the long videos are for pretraining alone
    case $2 in
        motion) python data.py synthetic "datasets/motion_$1" --seed "$1" --test 1500 ;;
        shots) python data.py synthetic "datasets/shots_$1" --seed "$1" --test 1500 --shots 4 ;;
        long) python data.py synthetic "datasets/long_$1" --seed "$1" --test 10 --frames 192 ;;
        scenes) python data.py synthetic "datasets/scenes_$1" --seed "$1" --scene_bias 0.95 ;;
        half) python data.py synthetic "datasets/half_$1" --seed "$1" --scene_bias 0.5 ;;
        even) python data.py synthetic "datasets/even_$1" --seed "$1" --scene_bias 0.1 ;;
        shake) python data.py synthetic "datasets/shake_$1" --seed "$1" --test 1500 --shake 0.1 ;;
        people) people "$1" ;;
        *_stills) stills "datasets/${2%_stills}_$1" "datasets/$2_$1" ;;
    esac
}

stills() { # videos, folder to write; of each video the middle frame, twice
    python - "$@" <<'END'
import sys
from pathlib import Path

import numpy as np

from synthetic import _write_video
from video import Video

root, out = map(Path, sys.argv[1:])
for part in ("train", "test"):
    names = [path.relative_to(root) for path in sorted(root.glob(f"{part}/*/*.mp4"))]
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        with Video(root / name) as video:
            _write_video(out / name, np.stack(video.read([len(video) // 2]) * 2))
    (out / f"{part}.txt").write_text("".join(f"{name} {name.parent.name}\n" for name in names))
END
}

people() { # seed; writes the lists of the videos in datasets/people (docs/reproduce.md)
    python - "$1" <<'END'
import json, sys
from pathlib import Path

seed, root = int(sys.argv[1]), Path("datasets/people")
strokes = json.loads(Path("results/people.json").read_text())
lists = {name: [] for name in ("pool", "train", "test", "shared_train", "shared_test", "fight_train", "fight_test")}
for stroke, groups in strokes["groups"].items():
    for number, group in enumerate(groups, 1):
        name = f"tennis7/{stroke}/{stroke}{number}.mp4"
        half = "test" if group in strokes["test"][seed - 1] else "train"
        lists[half].append(f"{name} {stroke}")
        lists["shared_test" if number % 3 == seed - 1 else "shared_train"].append(f"{name} {stroke}")  # courts, too
        lists["pool"].extend([name] * (half == "train"))
for number in range(150):  # neighbours may be of one source: a third in a row is tested
    for label in ("fight", "noFight"):
        name = f"fight_surv/{label}/{label[:-5].lower()}fi{number + 1:03}.mp4"
        lists["fight_test" if number // 50 == seed - 1 else "fight_train"].append(f"{name} {label}")
        lists["pool"].append(name)
lists["pool"] += sorted(str(path.relative_to(root)) for path in root.glob("pushup_form/*/*.mp4"))
for name, lines in lists.items():
    Path(f"datasets/people_{name}_{seed}.txt").write_text("\n".join(lines) + "\n")
END
}

work() { # script and flags; trains and probes by the variables of `run`
    local videos="--dataset synthetic --data datasets/${set}_$seed" options="--epochs 24 --keep_every 6" crop=32
    local probe="--dataset synthetic --data datasets/${set/long/motion}_$seed --workers 1" lists=datasets/people
    if [ "$set" = people ]; then
        probe="--dataset folder --data datasets/people --workers 1" crop=64
        videos="--dataset folder --data datasets/people --list_file ${lists}_pool_$seed.txt"
        options="--encoder conv4 --crop 64 --epochs 20 --batch_size 16 --queue 512"
        local strokes="--list_file ${lists}_train_$seed.txt --test_list ${lists}_test_$seed.txt"
        if [ "$1" = evaluate.py ]; then videos="--dataset folder --data datasets/people $strokes"; fi
    fi
    if [ "$row" = single ]; then
        local still="datasets/${set}_stills_$seed"
        videos="--dataset folder --data $still --list_file $still/train.txt --test_list $still/test.txt"
        if [ "$set" = motion ]; then probe="$videos --workers 1"; fi
    fi
    if [ "$1" = none ]; then
        probe="$probe --encoder conv4 --crop $crop --seed $seed ${*:2}"
    else
        if [ "$1" = evaluate.py ]; then options=; set -- "$1 $2" "${@:3}"; fi # its protocol comes first
        python $1 $videos --seed "$seed" $options --workers 1 --out "$out" --resume auto "${@:2}" || return
        probe="$probe --checkpoint $out/checkpoint.pt"
    fi
    if [[ $set =~ ^(scenes|half|even)$ ]]; then
        python examples/scene_bias.py $probe --clips 3 --cost 100 --out "$out/bias.json"
        return
    fi
    if [ "$set" = people ]; then
        local other
        for other in shared fight; do
            if [[ "$other $1" = shared\ evaluate* ]]; then continue; fi # its test videos were trained on, with labels
            python evaluate.py linear $probe --list_file ${lists}_${other}_train_$seed.txt --cached 10 \
                --test_list ${lists}_${other}_test_$seed.txt --out "$out/$other" --resume auto || return
        done
        probe="$probe $strokes"
        python evaluate.py knn $probe --out "$out/knn.json" || return
    fi
    if [[ "$set $row" =~ ^(shots|people)\ (untrained|moco|fima|fima_longer|i3d.*)$ ]]; then
        local kept
        for kept in '' $(cd "$out" && ls epoch_*.pt 2> /dev/null); do # the last --checkpoint counts
            python examples/foreground.py $probe ${kept:+--checkpoint "$out/$kept"} \
                --out "$out/masks_${kept%.pt}.json" || return
        done
    fi
    python evaluate.py linear $probe --cached 10 --out "$out/linear" --resume auto &&
        python evaluate.py retrieve $probe --out "$out/retrieve.json"
}

run() { # seed, set, row, script and flags
    local seed=$1 set=$2 row=$3 out=runs/results/$2_$3_$1 began=$SECONDS
    shift 3
    if grep -qs "\"seed\": $seed, \"set\": \"$set\", \"row\": \"$row\"" results/generated.jsonl; then return; fi
    mkdir -p "$out"
    work "$@" > "$out/output.txt" 2>&1 || { echo "failed: see $out/output.txt"; return; }
    python - "$seed" "$set" "$row" "$*" "$out" $((SECONDS - began)) >> results/generated.jsonl <<'END'
import json, sys
from pathlib import Path

seed, videos, row, command, out, seconds = sys.argv[1:]
line = {"seed": int(seed), "set": videos, "row": row}
names = "result", "shared/result", "fight/result", "knn", "linear/result", "retrieve", "bias"
for name in names:
    if (file := Path(out) / f"{name}.json").exists():
        made = json.loads(file.read_text())
        result, measure = made["result"], {"result": "finetune", "knn": "kNN"}.get(name, name.partition("/")[0])
        line |= {measure: result["top1_percent"]} if "top1_percent" in result else {}
        line |= {"R@1": result["recall_percent"]["R@1"]} if "recall_percent" in result else {}
        line |= {name: value["percent"] for name, value in result.get("table", {}).items()}
if found := sorted(Path(out).glob("masks_*.json")):  # of the last checkpoint, and of those kept for good
    line["masks"] = {file.stem[6:]: json.loads(file.read_text())["result"]["inside_percent"] for file in found}
line |= {"command": command, "seconds": int(seconds), "commit": made["git_commit"], "torch": made["versions"]["torch"]}
print(json.dumps(line))
END
    echo "$(date +%H:%M) done: $seed $set $row"
}

export -f work run
chosen=$(for seed in 1 2 3; do rows | sed "s/^/$seed /"; done | tr -s ' ' | grep -E "${1:-.}")
if [ ! -d datasets/people ] && grep -q " people " <<< "$chosen"; then
    echo "rows of people are left out: datasets/people is not there, docs/reproduce.md says how it is made"
    chosen=$(grep -v " people " <<< "$chosen")
fi
echo "$chosen" | while read -r seed set row _; do
    echo "$seed $set"
    if [ "$row" = single ]; then echo "$seed $set" && echo "$seed ${set}_stills"; fi
    if [ "$set" = long ]; then echo "$seed motion"; fi
done | sort -u | while read -r seed set; do videos "$seed" "$set" < /dev/null; done
echo "$chosen" | xargs -P 2 -L 1 bash -c 'run "$@"' run
