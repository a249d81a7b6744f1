#!/bin/sh
# Builds lvm and runs every test; needs cc, make and python3. The last line is `N passed, N failed`
# (and `, N skipped` where some were); the exit status is 0 only when nothing failed.
#
#   PLATFORMS=required           other systems' compilers and emulators must be here; else: skipped
#   LVM_REFERENCE=DIR            compares with a full-size reference model too
#   LVM_LINES=N                  with N lines of each of its sets (2); 0: two lines in all
#   LVM_FULL=1                   with all of its lines
#   SANITIZE=address,undefined   everything that runs lvm.c, built with these sanitizers
#   SANITIZE=thread              the threaded part only
set -u
cd "$(dirname "$0")" || exit 1
SANITIZE=${SANITIZE:-}
LVM_REFERENCE=${LVM_REFERENCE:-}
LVM_FULL=${LVM_FULL:-}
LIMIT=${LIMIT:-$([ -z "$LVM_FULL" ] && echo 900 || echo 7200)}     # seconds a part may take
passed=0 failed=0 skipped=0

case $SANITIZE in
    "") B=build TEST_CFLAGS=-O2 LVM=./lvm ;;
    thread) B=build/tsan TEST_CFLAGS="-O1 -g1 -fsanitize=thread" LVM=build/tsan/lvm ;;
    *) B=build/debug TEST_CFLAGS="-O1 -g1 -fsanitize=$SANITIZE -fno-sanitize-recover=all"
       LVM=build/debug/lvm ;;
esac
WEIGHTS=${WEIGHTS:-weights.bin}
LVM_DEVICE=cpu # a GPU has its own tests
export SANITIZE LVM WEIGHTS LVM_REFERENCE LVM_FULL LVM_DEVICE
mkdir -p "$B/logs" build/golden

limited() {
    if command -v timeout > /dev/null 2>&1; then timeout "$LIMIT" "$@"; else "$@"; fi
}

# The sums of all count lines of a log: "passed failed skipped", or nothing where there is none.
counts() {
    awk '
        /^[a-z_]+: [0-9]+ passed, [0-9]+ failed/ { p += $2; f += $4; s += $6; lines++ }
        /^Ran [0-9]+ tests? in / { ran = $2; lines++ }
        /^(OK|FAILED)( |$)/ && ran != "" {
            bad = left = 0
            n = split($0, part, /[(,)]/)
            for (i = 2; i <= n; i++) {
                split(part[i], pair, "=")
                if (pair[1] ~ /failures|errors|unexpected/) bad += pair[2]
                if (pair[1] ~ /skipped/) left += pair[2]
            }
            if (bad + left > ran) bad = ran - left
            p += ran - bad - left; f += bad; s += left; ran = ""
        }
        END { if (lines) print p + 0, f + 0, s + 0 }' "$1"
}

# begin NAME COMMAND...: starts one part. end NAME: waits for it and adds what it counted. A part
# that counts nothing, or fails without having counted a failure, is a failure itself.
begin() {
    part=$1
    shift
    rm -f "$B/logs/$part.log" "$B/logs/$part.status"
    (
        start=$(date +%s)
        "$@" > "$B/logs/$part.log" 2>&1 < /dev/null
        echo "$? $(($(date +%s) - start))" > "$B/logs/$part.status"
    ) &
    eval "pid_$part=$!"
}

end() {
    part=$1 log=$B/logs/$1.log
    eval "wait \$pid_$part"
    read -r status seconds < "$B/logs/$part.status"
    # shellcheck disable=SC2046
    set -- $(counts "$log")
    p=${1:-0} f=${2:-0} s=${3:-0} note=
    if [ $# -eq 0 ]; then f=1 note=" (no count, status $status)"
    elif [ "$status" -ne 0 ] && [ "$f" -eq 0 ]; then f=1 note=" (status $status)"; fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-12s %6d passed %4d failed %3d skipped %4d s%s\n' \
        "$part" "$p" "$f" "$s" "$seconds" "$note"
    grep '^skipped: ' "$log" | sed 's/^/    /'
    [ "$f" -eq 0 ] || grep -v '^\.*$' "$log" | tail -n 100 | sed 's/^/    | /'
}

run() {
    begin "$@"
    end "$1"
}

build() {
    targets=$B/lvm
    [ -n "$SANITIZE" ] || targets=lvm
    for test in "$@"; do targets="$targets $B/test_$test"; done
    # shellcheck disable=SC2086
    make -k -j2 B="$B" TEST_CFLAGS="$TEST_CFLAGS" $targets && echo "build: 1 passed, 0 failed"
}

# Every small model of tests/golden as a weights file.
convert_golden() {
    made=0 bad=0
    for folder in tests/golden/*/; do
        model=build/golden/$(basename "$folder").bin
        set --
        [ ! -d "$folder/llama" ] || set -- "$@" --llama "$folder/llama"
        [ ! -d "$folder/vqgan" ] || set -- "$@" --vqgan "$folder/vqgan"
        [ $# -gt 0 ] || continue
        if python3 convert.py --force -o "$model" "$@"; then made=$((made + 1))
        else bad=$((bad + 1)); fi
    done
    [ "$made" -gt 0 ] || bad=1
    echo "convert: $made passed, $bad failed"
    [ "$bad" -eq 0 ]
}

# The full-size reference: its own weights in float; in full also the shipped file's default
# arithmetic.
reference() {
    set -- "$([ -z "$LVM_FULL" ] && echo "${LVM_LINES:-2}" || echo --full)"
    out=build/reference$([ -z "$LVM_FULL" ] || echo _full)
    code=0
    rm -rf "$out"
    python3 convert.py --force -o build/reference.bin --llama "$LVM_REFERENCE/llama" \
        --vqgan "$LVM_REFERENCE/tokenizer" || return 1
    python3 tests/reference_vectors.py "$LVM_REFERENCE" "$out" "$@" || return 1
    for folder in "$out"/*/; do
        limited "$B/test_golden" --case "$folder" build/reference.bin || code=1
    done
    [ ! -s "$out/answers.txt" ] ||
        limited "$B/test_golden" --nll "$out/answers.txt" build/reference.bin || code=1
    [ -z "$LVM_FULL" ] || limited "$B/test_golden" --nll "$out/answers.txt" "$WEIGHTS" q || code=1
    limited python3 tests/reference_sets.py "$LVM_REFERENCE" "$LVM" build/reference.bin "$B/test_golden" \
        "$([ "$1" = 0 ] && echo 1 || echo "$1")" || code=1
    return $code
}

# Threads at work under the thread sanitizer; it ends a program that it finds fault with with 66.
threaded_commands() {
    p=0 f=0
    for options in "-j 3" "-j 3 -c 3 -n 2" "-j 2 --kv q8_0"; do
        # shellcheck disable=SC2086
        if limited "$LVM" build/golden/both.bin prompt/01.png prompt/02.png -o "$B/x.png" $options
        then p=$((p + 1)); else f=$((f + 1)); fi
    done
    if limited "$LVM" encode build/golden/both.bin prompt/01.png prompt/02.png -j 3
    then p=$((p + 1)); else f=$((f + 1)); fi
    echo "threads: $p passed, $f failed"
    [ "$f" -eq 0 ]
}

embedded="build/golden/both.bin build/golden/llama_tied.bin tests/images"
if [ "$SANITIZE" = thread ]; then
    run build build properties embed
    run convert convert_golden
    run properties limited "$B/test_properties" --threads-only
    # shellcheck disable=SC2086
    run embed limited "$B/test_embed" $embedded --threads-only
    run threads threaded_commands
else
    run build build images kernels properties backend golden os embed fuzz
    run convert convert_golden
    [ -z "$SANITIZE" ] || begin cli limited python3 tests/test_cli.py \
        Commands Quantize Images Tokens Weights Outputs Interruption
    # shellcheck disable=SC2046
    begin properties limited "$B/test_properties" $([ -z "$SANITIZE" ] || echo --quick)
    # shellcheck disable=SC2046,SC2086
    run embed limited "$B/test_embed" $embedded $([ -z "$SANITIZE" ] || echo --quick)
    # shellcheck disable=SC2046
    run backend limited "$B/test_backend" "$B/backend.cache" $([ -z "$SANITIZE" ] || echo --quick)
    run images limited "$B/test_images" tests/images
    run corpus limited "$B/test_fuzz" tests/corpus
    run kernels limited "$B/test_kernels"
    run os limited "$B/test_os" "$B/os"
    run golden limited "$B/test_golden" tests/golden build/golden
    end properties
    [ -z "$SANITIZE" ] || end cli
    [ -z "$SANITIZE" ] || run sets limited python3 tests/test_sets.py Rank Eval Batch Cache
    if [ -z "$SANITIZE" ]; then
        begin platforms limited tests/platforms.sh
        begin cli limited python3 tests/test_cli.py
        run sets limited python3 tests/test_sets.py
        run weights limited "$B/test_golden" --case tests/golden/weights "$WEIGHTS"
        run converter limited python3 tests/test_convert.py
        run examples limited python3 tests/test_embed.py
        end cli
        end platforms
        run mutants limited python3 tests/mutants.py
        [ -z "$LVM_REFERENCE" ] || run reference reference
    fi
fi

[ "$skipped" -eq 0 ] || more=", $skipped skipped"
echo "$passed passed, $failed failed${more:-}"
[ "$failed" -eq 0 ]
