#!/usr/bin/env bash
# Hardware counters of one launch of each kind of kernel, by Nsight Compute: docs/results/counters-h200.txt.
#
#   bash benchmarks/counters.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD

metrics=gpu__time_duration.sum
for unit in sm lts dram l1tex; do metrics+=,${unit}__throughput.avg.pct_of_peak_sustained_elapsed; done
metrics+=,sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active,smsp__issue_active.avg.pct_of_peak_sustained_active
for stall in barrier long_scoreboard short_scoreboard wait math_pipe_throttle mio_throttle; do
  metrics+=,smsp__average_warps_issue_stalled_${stall}_per_issue_active.ratio
done

# shape, dtype, kernel, launches of it to skip
counters() {
  printf '== %s %s (%s)\n' "$1" "$2" "$3"
  ncu --clock-control none --kernel-name "regex:$3" --launch-skip "$4" --launch-count 1 --metrics "$metrics" \
    python3 - "$1" "$2" <<'PYTHON' | grep __
import sys
import torch
from torch_gru_fuse.tools.bench import SHAPES, Problem
problem = Problem(SHAPES[sys.argv[1]], getattr(torch, sys.argv[2]), torch.device("cuda"), train=False)
with torch.no_grad():
    for _ in range(3):
        problem.fused()
        torch.cuda.synchronize()
PYTHON
}

counters kb39 float16 wavefront_kernel 2
counters kb39 float32 wavefront_kernel 2
counters wide float16 staged_kernel 2
counters big float32 staged_kernel 2
counters h128 float16 resident_kernel 2
counters step float16 stream_kernel 4
counters dreamer float16 sequence_forward_kernel 100
