#!/bin/sh
# Everything about lvm_cuda.cu in one call, on a machine with nvcc and a GPU: builds, checks, looks
# for wild accesses and times. The last line is `N passed, N failed`; logs lie in build/cuda/.
#
#   tests/cuda/check.sh [STAGE...]    build golden conformance beside sanitizer times bench (all)
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
            for tool in memcheck racecheck initcheck synccheck; do
                note $tool compute-sanitizer --tool $tool --error-exitcode 9 \
                    build/test_cuda --small
            done ;;
        times) note times build/test_cuda --times && cat "$out/times.log" ;;
        bench)
            note bench bench
            grep -v '^$' "$out/bench.log" ;;
    esac
done
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
