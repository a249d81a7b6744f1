#!/bin/sh
# lvm on the systems that this one can stand in for: a static program on musl, Windows by mingw-w64
# and wine, AArch64 by qemu's user mode. Each is built without a warning, passes the small models'
# golden vectors and the tests of images and of the operating system, and predicts and encodes the
# very bytes that lvm does here in plain C. run_tests.sh calls it, having made ./lvm and the small
# models; the last line is `platforms: N passed, N failed, N skipped`.
#
#   PLATFORMS=required     a missing tool is a failure, not a skip
# shellcheck disable=SC2086
set -u
cd "$(dirname "$0")/.." || exit 1
unset LVM_ISA
LVM=${LVM:-./lvm}
work=build/platforms
model=build/golden/both.bin
prompt="prompt/01.png prompt/02.png"
strict="-std=c11 -ffp-contract=off -Wall -Wextra -Wshadow -Wpedantic -Werror"
export LC_ALL=C.UTF-8 WINEDEBUG=-all WINEPREFIX="$PWD/$work/wine" WINEDLLOVERRIDES="mscoree,mshtml="

# check NAME COMMAND...: one line a check; what a failed command said follows it.
check() {
    name=$1
    shift
    failure=0
    "$@" > "$work/$system.out" 2>&1 || failure=$?
    if [ $failure -eq 0 ]; then echo "ok: $system: $name"; return 0; fi
    echo "FAILED: $system: $name (exit status $failure)"
    tail -n 20 "$work/$system.out" | sed 's/^/    /'
    return 1
}

# status WANTED WORDS COMMAND...: its exit status, and words that its message has.
status() {
    wanted=$1 words=$2 got=0
    shift 2
    "$@" > "$work/$system.said" 2>&1 || got=$?
    cat "$work/$system.said"
    echo "exit status $got"
    [ "$got" -eq "$wanted" ] && grep -q -- "$words" "$work/$system.said"
}

plain() { env LVM_ISA=scalar "$@"; }

compile() {  # COMPILER OUTPUT SOURCE: as a whole program, which leaves out what a test does not use
    check "compiles $3" "$1" $strict -O1 -fwhole-program -static -o "$work/$system/$2" "$3" \
        -lm -lpthread
}

build() {    # COMPILER ENDING: the program and its tests
    compile "$1" "lvm$2" lvm.c && compile "$1" "test_golden$2" tests/test_golden.c &&
        compile "$1" "test_images$2" tests/test_images.c &&
        compile "$1" "test_os$2" tests/test_os.c
}

# the_same ENDING GOLDENS IMAGES RUN...: what every system must do alike.
the_same() {
    ending=$1 goldens=$2 images=$3
    shift 3
    lvm=$work/$system/lvm$ending
    check version "$@" "$lvm" --version
    check golden "$@" "$work/$system/test_golden$ending" "$goldens" build/golden
    check images "$@" "$work/$system/test_images$ending" "$images"
    check os "$@" "$work/$system/test_os$ending" "$work/$system/os"
    check predicts plain "$@" "$lvm" $model $prompt -j 3 -c 2 -o "$work/$system/x.png"
    check "predicts the same" cmp "$work/$system/x-1b.png" "$work/native/x-1b.png"
    check encodes plain "$@" "$lvm" encode $model $prompt -o "$work/$system/ids"
    check "encodes the same" cmp "$work/$system/ids" "$work/native/ids"
    check "missing weights" status 1 "none.bin: No such file" "$@" "$lvm" none.bin prompt/01.png
    check "wrong usage" status 2 "no such option" "$@" "$lvm" $model --wrong
}

is_static() { ! readelf -l "$1" | grep INTERP; }

small_stack() { (ulimit -s 128 && "$@"); } # KiB: what musl gives the threads of whoever embeds lvm

static_musl() {
    build musl-gcc "" || return
    check "is static" is_static "$work/$system/lvm"
    the_same "" tests/golden tests/images env
    check "a small stack" small_stack "$lvm" $model $prompt tests/images/adobe_0.jpg \
        -o "$work/$system/x.png"
}

# The emulator is slow: one of the small models, a fifth of the images, few rounds of the kernels.
aarch64() {
    build aarch64-linux-gnu-gcc "" || return
    compile aarch64-linux-gnu-gcc test_kernels tests/test_kernels.c || return
    mkdir "$work/$system/golden" "$work/$system/images"
    cp -r tests/golden/both tests/golden/quant "$work/$system/golden"
    cp tests/images/* "$work/$system/images"
    awk 'NR % 5 == 0' tests/images/index.txt > "$work/$system/images/index.txt"
    the_same "" "$work/$system/golden" "$work/$system/images" qemu-aarch64
    check kernels qemu-aarch64 "$work/$system/test_kernels" --quick
}

encode_decode() {   # through pipes, which carry bytes
    "$wine" "$lvm" encode $model prompt/01.png | "$wine" "$lvm" decode $model - -o - > "$1"
}

# Names beyond ASCII with blanks, back slashes, * in arguments, files replaced, mapping and reading.
windows_names() {
    folder="$work/$system/Bäume und 木"
    mkdir -p "$folder/prompt.d" && cp $model "$folder/gewichte é.bin" &&
        cp $prompt "$folder/prompt.d" && echo old > "$folder/ö.png" || return 1
    check "a folder" "$wine" "$lvm" "$folder/gewichte é.bin" "$folder/prompt.d" -o "$folder/ö.png"
    check "the same image" cmp "$folder/ö.png" "$work/native/default.png"
    check "read, not mapped" "$wine" "$lvm" "$folder/gewichte é.bin" "$folder/prompt.d/0*.png" \
        --no-mmap -o "$folder/ü.png"
    check "the same again" cmp "$folder/ü.png" "$work/native/default.png"
    check "back slashes" "$wine" "$lvm" $model $prompt -n 2 -o "$folder\\prompt.d\\y"
    check "their names" [ -s "$folder/prompt.d/y-1.png" -a -s "$folder/prompt.d/y-2.png" ]
    check "a name in a message" status 1 "木/fehlt ß.png: No such file" \
        "$wine" "$lvm" $model "$folder/fehlt ß.png"
    check "an input as output" status 1 "is an input too" \
        "$wine" "$lvm" $model "$folder/prompt.d/01.png" -o "$folder\\.\\PROMPT.D\\01.PNG"
    check "a name printed" status 0 "木/ö.png" \
        "$wine" "$lvm" encode $model prompt/01.png -o "$folder/ö.png"
    cat > "$folder/set.jsonl" << 'END'
{"input": ["prompt.d\\01.png", "prompt.d/02.png"], "output": "b/c\\ä"}
{"input": ["prompt.d\\01.png"], "output": "..\\x"}
{"input": ["prompt.d\\01.png"], "output": "c:x"}
END
    check "a set" status 1 "line 3: output \"c:x\" must be a name below" \
        "$wine" "$lvm" batch $model "$folder\\set.jsonl" -o "$folder\\answers"
    check "its answer" cmp "$folder/answers/b/c/ä.png" "$work/native/default.png"
    check "nothing beside it" [ ! -e "$folder/x.png" ]
    check "encode | decode" encode_decode "$work/$system/decoded.png"
    check "decodes the same" cmp "$work/$system/decoded.png" "$work/native/decoded.png"
    check "nothing half-written" [ -z "$(find "$work/$system" -name '*.tmp')" ]
}

wine_server() { "${wine%/*}/wineserver" "$@" || wineserver "$@"; }

windows() {
    build x86_64-w64-mingw32-gcc .exe || return
    # By itself it ends when its last client does, and drops one that comes just then; it wants the
    # prefix to be there.
    mkdir -p "$WINEPREFIX" && check "a server that stays" wine_server -p60
    the_same .exe tests/golden tests/images "$wine"
    windows_names
    wine_server -k
}

native() {
    plain "$LVM" $model $prompt -c 2 -o $work/native/x.png &&
        plain "$LVM" encode $model $prompt -o $work/native/ids &&
        "$LVM" $model $prompt -o $work/native/default.png &&
        "$LVM" encode $model prompt/01.png | "$LVM" decode $model - -o $work/native/decoded.png
}

# begin SYSTEM TOOL...: runs the function of that name if its tools are here.
begin() {
    system=$1
    shift
    mkdir -p "$work/$system"
    for tool in "$@"; do
        command -v "$tool" > /dev/null && continue
        if [ "${PLATFORMS:-}" = required ]; then echo "FAILED: $system: $tool is missing"
        else echo "skipped: $system: $tool is missing"; fi
        return
    done
    $system
}

wine=wine64
command -v $wine > /dev/null || wine=/usr/lib/wine/wine64
command -v $wine > /dev/null || wine=wine

rm -rf $work
mkdir -p $work/native
system=native
check "predicts here" native > $work/native.log
begin windows x86_64-w64-mingw32-gcc $wine > $work/windows.log 2>&1 &
begin static_musl musl-gcc > $work/musl.log 2>&1
begin aarch64 aarch64-linux-gnu-gcc qemu-aarch64 > $work/aarch64.log 2>&1
wait
rm -rf $work/wine
cat $work/*.log
count() { cat $work/*.log | grep -c "^$1:"; }
echo "platforms: $(count ok) passed, $(count FAILED) failed, $(count skipped) skipped"
[ "$(count FAILED)" -eq 0 ]
