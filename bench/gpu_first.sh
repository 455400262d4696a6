#!/usr/bin/env bash
# A first run on a GPU without pip and without network: the most important checks first, each part within a time
# limit of its own, all output to the folder $OUT (default bench-results/gpu). Needs python3 with torch and triton; pytest with
# xdist for the tests, compute-sanitizer for the last part. PARTS="smoke times" runs only those.
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-bench-results/gpu}")
PARTS=${PARTS:-smoke times tests sanitize}
mkdir -p "$OUT"
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# The tree as it is installed: kernels/ and bench/ are fastmaf.kernels and fastmaf.bench.
cp -r fastmaf tests pyproject.toml "$site/" && cp -r kernels bench "$site/fastmaf/"
rm -f "$site"/fastmaf/kernels/_native.*
export PYTHONPATH="$site" PYTHONUNBUFFERED=1
cd "$site"
failed=0

part() { # name, seconds, command...
	local name=$1 limit=$2 start=$SECONDS rc=0
	shift 2
	timeout -k 5 "$limit" "$@" >"$OUT/$name.log" 2>&1 || rc=$?
	[ "$rc" = 0 ] || failed=1
	printf '== %s: exit %s in %s s\n' "$name" "$rc" "$((SECONDS - start))"
}
wanted() { case " $PARTS " in *" $1 "*) ;; *) return 1 ;; esac; }

python3 -c 'import torch, triton; print(torch.cuda.get_device_name(), torch.__version__, "triton", triton.__version__)'
if wanted smoke; then # side by side: most of it is compiling
	for precision in ieee tf32x3 tf32 bf16; do
		part "smoke-$precision" 240 python3 -W ignore -m fastmaf.bench.dev.smoke --precisions $precision &
	done
	wait
	tail -n 40 "$OUT"/smoke-*.log
	! grep -qE 'WRONG|Error' "$OUT"/smoke-*.log || failed=1
fi
if wanted times; then
	part times 90 python3 -W ignore -m fastmaf.bench.dev.times --profile --out "$OUT/times.csv"
	part times-tf32x3 40 python3 -W ignore -m fastmaf.bench.dev.times --precision tf32x3 --profile --samples --batches 8 64 1024 --out "$OUT/times-tf32x3.csv"
	cat "$OUT"/times*.log
fi
if wanted tests; then
	part tests 160 python3 -m pytest -q -m gpu -n 12 -p no:cacheprovider tests/kernels tests/training/test_cuda_graphs.py tests/training/test_graphed_step.py
	tail -n 30 "$OUT/tests.log"
fi
if wanted sanitize; then
	for tool in memcheck racecheck synccheck; do
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 part $tool 75 compute-sanitizer --tool $tool --error-exitcode 1 \
			python3 -m pytest -q -x -m gpu -k 'launch_paths or paths_of_the_inverse' tests/kernels &
	done
	wait
	tail -n 12 "$OUT"/*check.log
fi
exit $failed
