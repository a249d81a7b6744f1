#!/bin/sh
# From nothing to a model that does what it could not, on the CPU: what `make train-demo` runs. A
# world is rendered: scenes, and their depth in the colours of a rainbow, which weights.bin has never
# seen. Asked for it with three examples in front of the question, it answers with something else;
# with adapters (LoRA) that learnt from other scenes of that world it needs no example. The
# demonstration has worked when the perplexity of held-out answers is at most half of what the
# examples alone reach; else the exit status is 1.
#
# Everything lies in OUT, which is made anew: sheet.png (question, answer before, answer after,
# truth), loss.png, the adapters rainbow.bin. Variables make it larger, or small as in the tests;
# with BOUND empty nothing is judged.
set -eu
LVM=${LVM:-./lvm} SCENES=${SCENES:-./scenes} WEIGHTS=${WEIGHTS:-weights.bin} OUT=${OUT:-build/demo}
PAIRS=${PAIRS:-160} STEPS=${STEPS:-200} CONTEXT=${CONTEXT:-514} # to train
QUESTIONS=${QUESTIONS:-8} BOUND=${BOUND-0.5}                    # to judge
EXAMPLES=3
here=$(dirname "$0")

# Shows a command, then runs it.
run() {
    printf '\n$ %s\n' "$*" >&2
    "$@"
}

# The questions as lines of a set, each with N examples in front of it; no example serves twice.
questions() {
    awk -v n="$QUESTIONS" -v examples="$1" 'BEGIN {
        for (q = 0; q < n; q++) {
            printf "{\"input\": ["
            for (e = n + q * examples; e < n + (q + 1) * examples; e++)
                printf "\"images/%06d.png\", \"depth/%06d.png\", ", e, e
            printf "\"images/%06d.png\"], \"target\": [\"depth/%06d.png\"], ", q, q
            printf "\"output\": \"%06d.png\"}\n", q
        }
    }'
}

# What is asked of the model, with the options that follow: perplexity, answers, their likeness.
judge() {
    name=$1
    shift
    run "$LVM" eval "$WEIGHTS" "$OUT/test/$name.jsonl" "$@" -q > "$OUT/$name.txt"
    cat "$OUT/$name.txt"
    run "$LVM" batch "$WEIGHTS" "$OUT/test/$name.jsonl" "$@" -o "$OUT/$name" \
        --resize original -q > /dev/null
    run "$LVM" score psnr "$OUT/$name" "$OUT/test/$name.jsonl" -q > "$OUT/$name-psnr.txt"
    cat "$OUT/$name-psnr.txt"
}

perplexity() { awk '/^perplexity/ { print $2 + 0 }' "$OUT/$1.txt"; }
psnr() { awk '$1 == "psnr" { print $2 + 0 }' "$OUT/$1-psnr.txt"; }

rm -rf "$OUT"
mkdir -p "$OUT"
began=$(date +%s)

# A world to learn from, and one that is never drawn in it to judge by.
run "$SCENES" "$OUT/train" --kind depth --style 4 --count "$PAIRS" --seed 1
run "$SCENES" "$OUT/test" --kind depth --style 4 --count $((QUESTIONS * (1 + EXAMPLES))) --seed 1 \
    --held-out
questions $EXAMPLES > "$OUT/test/before.jsonl"
questions 0 > "$OUT/test/after.jsonl"

# Visual sentences: a scene and its depth.
for part in train test; do
    run "$LVM" sentences pairs "$OUT/$part/images" "$OUT/$part/depth" --length 2 \
        --tokenizer "$WEIGHTS" -o "$OUT/$part.tok"
done
judge before

# A sentence is bos, two images of 256 tokens and eos: one fills a row.
trains=$(date +%s)
run "$LVM" train --init "$WEIGHTS" --lora 8,16 --data "$OUT/train.tok" --val "$OUT/test.tok" \
    -o "$OUT/rainbow.bin" --steps "$STEPS" --batch 1 --context "$CONTEXT" --pack whole \
    --lr 2e-3 --min-lr 1e-4 --val-every $(((STEPS + 1) / 2)) --plot "$OUT/loss.png"
trained=$(date +%s)
judge after --lora "$OUT/rainbow.bin"

set --
for q in 0 1 2; do
    [ "$q" -ge "$QUESTIONS" ] || set -- "$@" --row "$OUT/test/images/00000$q.png" \
        "$OUT/before/00000$q.png" "$OUT/after/00000$q.png" "$OUT/test/depth/00000$q.png"
done
run python3 "$here/../tests/make_contact_sheet.py" -o "$OUT/sheet.png" -k 1 "$@"

ended=$(date +%s)
echo
{
    echo "$QUESTIONS held-out questions|perplexity|PSNR"
    echo "the model as it was, $EXAMPLES examples each|$(perplexity before)|$(psnr before)"
    echo "with the adapters, no examples|$(perplexity after)|$(psnr after)"
} | awk -F '|' '{ printf "%-38s %10s %9s\n", $1, $2, $3 }'
printf '%d s in all, %d of them training\n' $((ended - began)) $((trained - trains))
[ -n "$BOUND" ] || exit 0
awk -v before="$(perplexity before)" -v after="$(perplexity after)" -v bound="$BOUND" 'BEGIN {
    printf "perplexity is %.2f of what it was; at most %.2f was asked for\n", after / before, bound
    exit !(after > 0 && after <= bound * before)
}'
