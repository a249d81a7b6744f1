#!/bin/sh
# Runs every fuzz target of tests/test_fuzz.c for SECONDS (60), two at a time; needs clang with libFuzzer.
# Inputs that break something stay in build/fuzz-*; the last line counts targets.
#
#   tests/fuzz.sh [SECONDS [TARGET...]]
#   FUZZ_CFLAGS="-O0 -g1"    compiles in seconds instead of a minute, runs a few times slower
set -u
cd "$(dirname "$0")/.." || exit 1
seconds=${1:-60}
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- gguf cache ckpt lora png jpeg pnm jsonl tokens tok lines coco layout \
    scores
mkdir -p build
# shellcheck disable=SC2086
${CLANG:-clang} -std=c11 -ffp-contract=off ${FUZZ_CFLAGS:--O1 -g} \
    -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -DLIBFUZZER -o build/fuzz \
    tests/test_fuzz.c -lm -lpthread || exit 1

fuzz() {
    mkdir -p "build/corpus/$1"
    LVM_FUZZ=$1 build/fuzz -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -max_len=65536 \
        -print_final_stats=1 -artifact_prefix="build/fuzz-$1-" "build/corpus/$1" \
        $([ ! -d "tests/corpus/$1" ] || echo "tests/corpus/$1") \
        $(case $1 in png|jpeg|pnm) echo tests/images;; esac) > "build/fuzz-$1.log" 2>&1
    echo $? > "build/fuzz-$1.status"
}

passed=0 failed=0 targets=$*
while [ $# -gt 0 ]; do
    fuzz "$1" &
    [ $# -eq 1 ] || fuzz "$2" &
    wait
    shift $(($# > 1 ? 2 : 1))
done
for target in $targets; do
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "build/fuzz-$target.log")
    echo "$target: ${runs:-0} inputs"
    if [ "$(cat "build/fuzz-$target.status")" = 0 ] && [ "${runs:-0}" -gt 0 ]; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        tail -n 40 "build/fuzz-$target.log"
    fi
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
