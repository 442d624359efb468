#!/usr/bin/env bash
# Does training work here? Demo clips, preflight, 3 steps and a sample of the embedded tiny base, on a GPU or a CPU.
#   docker run --rm --gpus all svdtune docker/smoke.sh [SECTION.KEY=VALUE ...]
# Everything it writes goes into a new folder below /tmp that is deleted, or into $SMOKE_DIR that is kept.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -n "${SMOKE_DIR:-}" ]; then
    work=$SMOKE_DIR
else
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
fi
options=(
    "data.root=$work/clips" "run.dir=$work/runs" run.name=smoke
    train.steps=3 train.warmup=1 train.batch_size=2 checkpoint.interval=3 validation.interval=3 validation.samples=1 "$@"
)

svdtune data demo "$work/clips" --clips 6
svdtune preflight configs/tiny.yaml "${options[@]}"
accelerate launch svdtune train configs/tiny.yaml "${options[@]}"
run=$work/runs/smoke
frame=$(find "$run/samples" -name '*.png' | sort | head -n 1)
video=$(svdtune sample "$run" "$frame" --out "$work/sample.mp4")

for made in "$run/checkpoints/step-00000003" "$run/export" "$run/metrics.jsonl" "$video"; do
    [ -s "$made" ] || { echo "error: smoke: $made is missing or empty" >&2; exit 1; }
done
grep -q '"state": "done"' "$run/status.json"
echo "smoke: ok"
