#!/usr/bin/env bash
# The whole replication, one run after another on each GPU; then RESULTS.md and the pictures.
#
#   ./run_all.sh             the papers' recipe: 100 epochs, three seeds; safe to interrupt and start again
#   ./run_all.sh --dry-run   print the commands, and how long they take here
#   ./run_all.sh --quick     the same list on the demo's data, one short seed: some minutes on a CPU
set -euo pipefail
cd "$(dirname "$0")"

quick=false dry=false
for flag in "$@"; do
  case $flag in
    --quick) quick=true ;;
    --dry-run) dry=true ;;
    *) echo "run_all.sh: unknown flag $flag; there are --quick and --dry-run" >&2; exit 2 ;;
  esac
done

if $quick; then
  common="--preset demo --epochs 3 --attack-steps 2 --eval-steps 3"
  seeds=0 targets=("--dataset demo --model small") networks=()
else
  common="--preset paper"
  seeds="0 1 2" targets=("--dataset cifar10 --model prn18" "--dataset cifar100 --model prn18")
  networks=("--dataset cifar10 --model wrn28_10" "--dataset cifar10 --model deit_ti")
fi

# The list. Seeds outermost: stopped early, it leaves whole tables of fewer seeds.
list() {
  for seed in $seeds; do
    for target in "${targets[@]}"; do
      run="python sam_at.py $common $target --seed $seed"
      echo "$run --method sgd"
      for rho in 0.4 0.1 0.2 0.3; do echo "$run --method sam --rho $rho"; done
      for eps in 8 1 2 4; do echo "$run --method at --norm linf --eps $eps/255"; done
      for eps in 32 128 16 64; do echo "$run --method at --norm l2 --eps $eps/255"; done
    done
  done
  run="python sam_at.py $common ${targets[0]}"  # variants and larger networks, one seed
  for method in "asam --rho 1" "esam --rho 0.1" "sam+at --rho 0.1" awp; do echo "$run --method $method"; done
  for target in "${networks[@]}"; do
    for method in sgd "sam --rho 0.1" at; do echo "python sam_at.py $common $target --method $method"; done
  done
}

if $dry; then
  list
  compile=$(python -c 'import torch; print("--compile" * torch.cuda.is_available())')  # as runs of 100 epochs are there
  # shellcheck disable=SC2086  # the flags are words
  table=$(mktemp) && python sam_at.py $common $compile --method sgd sam asam esam at sam+at awp --benchmark --json "$table"
  list | python -c '
import json, sys
step = {row["method"]: row["step_s"] for row in json.load(open(sys.argv[1]))}
epochs, steps = (3, 4000 / 128) if sys.argv[2] == "true" else (100, 50000 / 128)
lines = [line for line in sys.stdin if "wrn28_10" not in line and "deit_ti" not in line]
runs = [line.split("--method ")[1].split()[0] for line in lines]
hours = sum(step[method] for method in runs) * epochs * steps / 3600
time = f"{hours:.1f} hours" if hours > 1 else f"{60 * hours:.0f} minutes"
print(f"{len(runs)} runs of the first network, about {time} of training on one such device, evaluation aside")
if sys.argv[2] != "true":
    print("the other networks: python sam_at.py --preset paper --model wrn28_10 --benchmark, or deit_ti")' "$table" "$quick"
  rm "$table"
  exit
fi

# One run at a time on each GPU: xargs gives its slot, 0, 1, ..., to each run. Without a GPU, one at a time. A run that
# fails does not end the others (unless xargs is told 255), nor the report; at the end it makes the exit code 1.
failed=0
if ! $quick; then  # the data first, once for all
  python -c '
import sam_at, sys
try:
    sam_at.load_data("cifar10", "data"), sam_at.load_data("cifar100", "data")
except (sam_at.BadInput, OSError) as error:
    sys.exit(print(f"run_all.sh: {error}", file=sys.stderr) or 2)'
fi
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -gt 0 ]; then
  IFS=, read -ra ids <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
  export GPU_IDS="${ids[*]}"
  # shellcheck disable=SC2016  # expanded by the inner shell
  list | xargs -P "$gpus" --process-slot-var=SLOT -I RUN \
    bash -c 'ids=($GPU_IDS); export CUDA_VISIBLE_DEVICES=${ids[$SLOT]}; echo "+ RUN"; RUN || exit 1' || failed=1
else
  list | xargs -I RUN bash -c 'echo "+ RUN"; RUN || exit 1' || failed=1
fi

python sam_at.py --report
if python -c 'import matplotlib' 2> /dev/null; then python sam_at.py --pictures; fi
exit "$failed"
