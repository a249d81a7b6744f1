#!/bin/sh
# Everything about lvm_cuda.cu in one call, on a machine with nvcc and a GPU: builds, checks, looks
# for wild accesses and times. The last line is `N passed, N failed`; logs lie in build/cuda/.
#
#   tests/cuda/check.sh [STAGE...]    build golden conformance beside sanitizer times bench (all)
#                                     and, when it is named, peers
#
# Where a call may take ten minutes: `build golden conformance beside`, `sanitizer`, `times bench`,
# `peers`; each builds what is missing.
#
# peers measures PyTorch in the same call as lvm, by a program that is not part of lvm:
#
#   GPU_PEERS=FILE [GPU_PEERS_ITEMS="1b:int8:1 ..."] tests/cuda/check.sh peers
#
# `python3 FILE OUT.json SECONDS [ITEM...]` must end within SECONDS or soon after and leave in
# OUT.json, of what it has measured: "copy TB/s", "bf16 gemm TFLOP/s"; of SHAPE 300m, 1b and 3b and
# TYPE bf16 and int8 "SHAPE TYPE B=N decode@3840" with {"tok_s": of N sequences together} and "SHAPE
# bf16 B=1 prompt 3840 compiled ms" (or eager); "vq encode MODE n=15" with {"ms": of all, "agree":
# share of the tokens in f32}, "vq decode MODE n=1" and "... n=1 graph" in ms, MODE f32, tf32, bf16
# and f16. It is run in lvm's folder.
set -u
cd "$(dirname "$0")/../.." || exit 1
out=build/cuda
mkdir -p "$out" build/golden
stages=${*:-build golden conformance beside sanitizer times bench}
passed=0 failed=0
LVM_DEVICE=cuda
export LVM_DEVICE

# note NAME COMMAND...: one part, its log and its verdict.
note() {
    name=$1
    shift
    start=$(date +%s)
    if "$@" > "$out/$name.log" 2>&1; then passed=$((passed + 1)) word=passed
    else failed=$((failed + 1)) word=FAILED; fi
    echo "$name: $word, $(($(date +%s) - start)) s"
    grep -v '^\.*$' "$out/$name.log" | tail -n "$([ $word = passed ] && echo 1 || echo 25)" |
        sed 's/^/    | /'
}

golden() {
    for folder in tests/golden/*/; do
        set --
        [ ! -d "$folder/llama" ] || set -- "$@" --llama "$folder/llama"
        [ ! -d "$folder/vqgan" ] || set -- "$@" --vqgan "$folder/vqgan"
        model=build/golden/$(basename "$folder").bin
        [ $# -eq 0 ] || python3 convert.py --force -o "$model" "$@" || return 1
    done
    build/cuda_golden tests/golden build/golden
}

bench() {
    for config in 300m 1b 3b; do
        for kv in q8_0 f16; do
            ./lvm bench --config $config --type q8_0 --kv $kv --device cuda || return 1
        done
    done
}

# The same as JSON, a file a shape and cache, and several prompts together.
ours() {
    rm -f "$out"/ours_*
    for config in 300m 1b 3b; do
        for kv in q8_0 f16; do
            ./lvm bench --json --config $config --type q8_0 --kv $kv --device cuda \
                > "$out/ours_${config}_$kv.json" || return 1
        done
    done
    build/test_cuda --times > "$out/ours_times.txt"
}

peers() {
    [ -f "${GPU_PEERS:-}" ] || { echo "GPU_PEERS names no file"; return 1; }
    # shellcheck disable=SC2086
    python3 "$GPU_PEERS" "$out/peers.json" "${GPU_PEERS_SECONDS:-440}" ${GPU_PEERS_ITEMS:-}
    python3 tests/cuda/peers.py "$out/peers.json" "$out" > "$out/peers.txt"
}

for stage in $stages; do
    case $stage in
        build) note build make -j8 cuda build/test_cuda build/cuda_golden ;;
        golden) note golden golden ;;
        conformance) LVM_DEVICE='' note conformance build/test_cuda "$out/cache" ;;
        beside)
            note beside build/test_cuda --beside weights.bin prompt/0*.png prompt/*/0*.png
            note cost build/cuda_golden --cost 2.3 tests/golden/weights/likelihoods.txt weights.bin
            note weights build/cuda_golden --case tests/golden/weights weights.bin ;;
        sanitizer)
            make -s -j8 build/test_cuda || exit 1
            for tool in memcheck racecheck initcheck synccheck; do
                note $tool compute-sanitizer --tool $tool --error-exitcode 9 \
                    build/test_cuda --small
            done
            # Calls of CUDA that fail are what it is about.
            note failing env LVM_DEVICE= compute-sanitizer --tool memcheck --leak-check full \
                --report-api-errors no --error-exitcode 9 build/test_cuda --failing ;;
        times)
            make -s -j8 build/test_cuda || exit 1
            note memory build/test_cuda --memory && cat "$out/memory.log"
            note open build/test_cuda --open "$out/1b.bin" weights.bin && cat "$out/open.log"
            note times build/test_cuda --times && cat "$out/times.log" ;;
        bench)
            make -s -j8 cuda || exit 1
            note bench bench
            grep -v '^$' "$out/bench.log" ;;
        peers)
            make -s -j8 cuda build/test_cuda || exit 1
            note ours ours
            note peers peers && cat "$out/peers.txt" ;;
    esac
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
