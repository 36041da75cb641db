#!/usr/bin/env bash
# The replication: all runs, one at a time on each GPU, then RESULTS.md and pictures. Safe to interrupt (Ctrl-C) and start again.
#   ./run_all.sh                            the papers' recipe, 100 epochs, three seeds, CIFAR-10 and CIFAR-100
#   TINY_IMAGENET=DIR ./run_all.sh          and Tiny-ImageNet, as it unpacks into DIR
#   ./run_all.sh --dry-run                  print the commands
#   ./run_all.sh --quick                    the same list in small, on synthetic data, into trial/: nothing published changes
set -euo pipefail
cd "$(dirname "$0")"
python=python
command -v python > /dev/null || python=python3

rhos="0.05 0.1 0.2 0.3 0.4"
linf="0.1 0.25 0.5 1 2 4 8"  # of AT, /255; up to 1 also with one step, at SAM's price
l2="16 32 64 128"

place=. seeds="0 1 2" networks="wrn28_10 deit_ti"
common="--model prn18 --epochs 100 --compile --runs runs"
targets=("--dataset cifar10" "--dataset cifar100")
case ${TINY_IMAGENET-} in
  "") ;;
  *[!A-Za-z0-9/._-]*) echo "run_all.sh: TINY_IMAGENET: only letters, digits and / . _ -, please" >&2; exit 2 ;;
  *) targets+=("--dataset tiny-imagenet --data-dir $TINY_IMAGENET") ;;
esac
case ${1-} in
  --quick)
    place=./trial seeds=0 networks="" targets=("--dataset demo")
    common="--epochs 1 --eval-steps 1 --images 50 --runs trial/runs" ;;
  --dry-run | "") ;;
  *) echo "run_all.sh: there are --quick and --dry-run, not $1" >&2; exit 2 ;;
esac

list() {  # seeds outermost: stopped early, it leaves whole tables of fewer seeds
  for seed in $seeds; do
    for target in "${targets[@]}"; do
      run="$python sam_at.py $common $target --seed $seed --method"
      echo "$run sgd"
      for rho in $rhos; do echo "$run sam --rho $rho"; done
      for eps in 0.1 0.25 0.5 1; do echo "$run at --attack-steps 1 --eps $eps/255"; done
      for eps in $linf; do echo "$run at --eps $eps/255"; done
      for eps in $l2; do echo "$run at --norm l2 --eps $eps/255"; done
    done
    run="$python sam_at.py $common ${targets[0]} --seed $seed --method"  # variants and larger networks
    at="--attack-steps 1 --eps 0.5/255"
    for method in "asam --rho 1" "esam --rho 0.1" "sam+at --rho 0.1 $at" "awp --rho 0.005 $at"; do echo "$run $method"; done
    for network in $networks; do
      for method in sgd "sam --rho 0.1" "at $at"; do echo "$run $method --model $network"; done
    done
  done
}

if [ "${1-}" = --dry-run ]; then list; exit; fi
mkdir -p "$place/results"
touch "$place/results/records.jsonl"
if [ "$place" = . ]; then  # the data first, once for all
  $python -c 'import sam_at; [sam_at.load_data(name, "data") for name in ("cifar10", "cifar100")]'
fi
count='import torch; print(*range(max(1, torch.cuda.device_count())), sep=",")'
export GPUS=${CUDA_VISIBLE_DEVICES-$($python -c "$count")}
IFS=, read -ra gpus <<< "$GPUS,"
runs=$(list | wc -l) failed=0  # a run that fails ends neither the others nor the report
list | nl -w1 -s ' ' | xargs -P "${#gpus[@]}" --process-slot-var=SLOT -I RUN bash -c '
  export CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLOT + 1)) <<< $GPUS)
  line="RUN"; echo "+ ${line%% *}/'"$runs"' ${line#* }"; ${line#* } || exit 1' || failed=1
(cd "$place" && $python "$OLDPWD/results/report.py")
exit "$failed"
