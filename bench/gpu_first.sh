#!/usr/bin/env bash
# The first ten minutes on a GPU, without pip and without network: the most valuable parts first, each within a time limit
# of its own, all output in eight files in the folder $OUT (default bench-results/gpu). Needs python3 with torch, triton,
# numpy, safetensors and psutil; pytest with xdist for the tests; ncu and compute-sanitizer for the last two parts, which
# are skipped where there is none.
#   PARTS="smoke times"  runs only those        BASE=folder  another tree, to be timed beside this one
#   CARD=h100            of the predictions     SIZE, BATCHES, DEVICE  for a small trial, TRITON_INTERPRET=1 DEVICE=cpu
set -u
cd "$(dirname "$0")/.."
OUT=$(realpath -m "${OUT:-bench-results/gpu}")
PARTS=${PARTS:-limits smoke tests times counters sanitize}
SECONDS_IN_ALL=${SECONDS_IN_ALL:-590}
BATCHES=${BATCHES:-1 8 64 1024}
SIZE="${SIZE:-} --device ${DEVICE:-cuda}"
PROCESSORS=$(env -u OMP_NUM_THREADS nproc)
mkdir -p "$OUT"
site=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$site"' EXIT
failed=0

# The tree as it is installed: kernels/ and bench/ are fastmaf.kernels and fastmaf.bench.
install_tree() { # from, to
	mkdir -p "$2" && cp -r "$1"/{fastmaf,tests,pyproject.toml} "$2" && cp -r "$1"/{kernels,bench} "$2/fastmaf/"
	rm -f "$2"/fastmaf/kernels/_native.*
}
install_tree . "$site/tree"
[ -z "${BASE:-}" ] || install_tree "$BASE" "$site/base"
cd "$site/tree"
export PYTHONPATH="$site/tree" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} SIZE site

say() { printf '%s\n' "$*" | tee -a "$OUT/summary.log"; }
wanted() { case " $PARTS " in *" $1 "*) ;; *) return 1 ;; esac; }
has() { command -v "$1" >/dev/null || { say "$2: skipped, as $1 is not here"; return 1; }; }

# Runs a command within its time or what is left of all. Its output goes to the end of a log, no more than 4 MB of it.
limited() { # log, seconds, command...
	local log=$1 limit=$2 left=$((SECONDS_IN_ALL - SECONDS)) rc=0
	shift 2
	[ "$limit" -le "$left" ] || limit=$left
	if [ "$limit" -lt 5 ]; then
		echo "== no time is left for $*" >>"$log"
		return 124
	fi
	timeout -k 5 "$limit" "$@" >"$log.part" 2>&1 || rc=$?
	{
		echo "== $*"
		tail -c 4000000 "$log.part"
		case $rc in 0) ;; 124 | 137) echo "== stopped after $limit s" ;; *) echo "== exit $rc" ;; esac
	} >>"$log"
	rm -f "$log.part"
	return $rc
}
ended() { # name, start, exit code
	[ "$3" = 0 ] || failed=1
	say "$1: exit $3 after $((SECONDS - $2)) s, $SECONDS s in all"
}

: >"$OUT/summary.log"
for name in limits smoke tests times counters sanitize; do ! wanted $name || rm -f "$OUT/$name.log"; done
versions='import platform, torch, triton; print("Python", platform.python_version(), "torch", torch.__version__, "Triton", triton.__version__)'
say "$(date -u +%FT%TZ), $PROCESSORS processors, $(python3 -c "$versions" 2>&1 | tail -n 1)"
say "$(nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv,noheader 2>&1 | head -n 1)"

if wanted limits; then # copy rate, matrix rates, the time of a kernel in a graph
	begin=$SECONDS rc=0
	limited "$OUT/limits.log" 30 python3 -m fastmaf.bench.dev.times --limits $SIZE || rc=$?
	ended limits "$begin" $rc
	cat "$OUT/limits.log"
fi

smoke() { # batch, precision
	python3 -m fastmaf.bench.dev.smoke $SIZE --batches "$1" --precisions "$2" >"$site/smoke-$1-$2" 2>&1
}
export -f smoke
if wanted smoke; then # a process for each batch and precision, side by side, as most of it is compiling
	begin=$SECONDS rc=0
	for batch in $BATCHES; do printf "$batch %s\n" ieee tf32x3 tf32 bf16; done | sort -rn >"$site/todo"
	limited "$OUT/smoke.log" 90 xargs -a "$site/todo" -P "$PROCESSORS" -L 1 bash -c 'smoke $0 $1 || { echo "batch $0, $1: exit $?"; exit 1; }' || rc=$?
	cat "$site"/smoke-* >>"$OUT/smoke.log"
	ended smoke "$begin" $rc
	grep -E 'WRONG|Error|exit|stopped' "$OUT/smoke.log" | head -n 30
fi

model=predict
if wanted times && [ -f "$site/tree/fastmaf/bench/dev/$model.py" ]; then # processors are idle while the GPU is tested
	TRITON_CACHE_DIR="$site/cache" timeout 240 nice python3 -m "fastmaf.bench.dev.$model" --card "${CARD:-h100}" >"$site/predictions" 2>&1 &
fi

if wanted tests; then
	begin=$SECONDS rc=0
	limited "$OUT/tests.log" 160 python3 -m pytest -q -m gpu -n 12 -p no:cacheprovider tests/kernels tests/training || rc=$?
	ended tests "$begin" $rc
	tail -n 15 "$OUT/tests.log"
fi

if wanted times; then # replays of graphs beside predictions, ieee and tf32x3; without single parts; and the other tree
	begin=$SECONDS rc=0
	limited "$OUT/times.log" 105 python3 -m fastmaf.bench.dev.times $SIZE --batches $BATCHES --precisions ieee tf32x3 --profile \
		--predicted "$site/predictions" --out "$OUT/times.csv" || rc=$?
	limited "$OUT/times.log" 45 python3 -m fastmaf.bench.dev.parts $SIZE --batches $BATCHES || rc=$?
	if [ -n "${BASE:-}" ]; then
		PYTHONPATH="$site/base" limited "$OUT/times.log" 90 python3 -m fastmaf.bench.dev.times --budget 0.5 || rc=$?
	fi
	if [ -f "$site/predictions" ]; then
		{ echo "== predictions" && tail -c 1000000 "$site/predictions"; } >>"$OUT/times.log"
	fi
	ended times "$begin" $rc
	grep -E '^(case|FAILED|WRONG|panels|lanes|moments|==)' "$OUT/times.log"
fi

if wanted counters && has ncu counters; then # of the first kernels of four ops
	begin=$SECONDS rc=0
	while read -r batch op; do
		limited "$OUT/counters.log" 25 ncu --clock-control none --profile-from-start off --launch-count 12 \
			--section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats --section Occupancy --section LaunchStats \
			python3 -m fastmaf.bench.dev.one "$op" "$batch" --blocks 1 $SIZE --repeats 1 </dev/null || rc=$?
	done <<<$'8 log_prob\n64 log_prob\n8 train step\n1 sample'
	ended counters "$begin" $rc
	grep -E '^==' "$OUT/counters.log"
fi

if wanted sanitize && has compute-sanitizer sanitize; then # programs have 4 and 8 warps in these tests
	begin=$SECONDS rc=0 pids=
	for tool in memcheck racecheck synccheck; do
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$site/$tool.log" 75 compute-sanitizer --tool $tool --error-exitcode 1 \
			python3 -m pytest -q -x -m gpu -p no:cacheprovider -k 'launch_paths or paths_of_the_inverse' tests/kernels &
		pids="$pids $!"
	done
	for pid in $pids; do wait "$pid" || rc=$?; done
	cat "$site"/{memcheck,racecheck,synccheck}.log >"$OUT/sanitize.log"
	ended sanitize "$begin" $rc
	tail -n 6 "$site"/*check.log
fi

say "$([ $failed = 0 ] && echo "all parts passed" || echo "not all parts passed"), $SECONDS s"
exit $failed
