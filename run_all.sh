#!/usr/bin/env bash
# The replication: all runs, one at a time on each GPU, then RESULTS.md and the pictures. Safe to interrupt and start again.
#   ./run_all.sh             the papers' recipe, CIFAR-10 and CIFAR-100: 100 epochs, three seeds
#   ./run_all.sh --dry-run   print the commands
#   ./run_all.sh --quick     the same list in small, on the demo's data, into trial/: nothing that is published is touched
set -euo pipefail
cd "$(dirname "$0")"
python=$(command -v python || command -v python3)

rhos="0.05 0.1 0.2 0.3 0.4"  # the grid of radii
linf="1 2 4 8"
l2="16 32 64 128"

place=. seeds="0 1 2" targets=("--dataset cifar10" "--dataset cifar100") networks="wrn28_10 deit_ti"
common="--preset paper" runs="--runs runs"
case ${1-} in
  --quick)
    place=trial seeds=0 targets=("--dataset demo") networks=""
    common="--preset demo --epochs 2 --attack-steps 2 --eval-steps 2 --images 100" runs="--runs trial/runs" ;;
  --dry-run | "") ;;
  *) echo "run_all.sh: there are --quick and --dry-run, not $1" >&2; exit 2 ;;
esac

list() {  # seeds outermost: stopped early, it leaves whole tables of fewer seeds
  for seed in $seeds; do
    for target in "${targets[@]}"; do
      run="$python sam_at.py $common $runs $target --seed $seed --method"
      echo "$run sgd"
      for rho in $rhos; do echo "$run sam --rho $rho"; done
      for eps in $linf; do echo "$run at --norm linf --eps $eps/255"; done
      for eps in $l2; do echo "$run at --norm l2 --eps $eps/255"; done
    done
  done
  run="$python sam_at.py $common $runs ${targets[0]} --method"  # variants and larger networks, one seed
  for method in "asam --rho 1" "esam --rho 0.1" "sam+at --rho 0.1" awp; do echo "$run $method"; done
  for network in $networks; do
    for method in sgd "sam --rho 0.1" at; do echo "$run $method --model $network"; done
  done
}

if [ "${1-}" = --dry-run ]; then list; exit; fi
if [ "$place" = . ]; then  # the data first, once for all
  $python -c 'import sam_at; [sam_at.load_data(name, "data") for name in ("cifar10", "cifar100")]'
fi
count='import torch; print(*range(max(1, torch.cuda.device_count())), sep=",")'
export GPUS=${CUDA_VISIBLE_DEVICES-$($python -c "$count")}
IFS=, read -ra gpus <<< "$GPUS,"
failed=0  # a run that fails ends neither the others nor the report
list | xargs -P "${#gpus[@]}" --process-slot-var=SLOT -I RUN bash -c '
  export CUDA_VISIBLE_DEVICES=$(cut -d, -f$((SLOT + 1)) <<< $GPUS)
  echo "+ RUN"; RUN || exit 1' || failed=1
$python sam_at.py --report "$place" $runs
if $python -c 'import matplotlib' 2> /dev/null; then $python sam_at.py --pictures "$place" $runs; fi
exit "$failed"
