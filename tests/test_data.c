/* Training data: .tok files (written, read, damaged), sentences in random order, and the rows that
   become of them, beside a naive model that lists every token first.

       test_data FOLDER    where it may write files

   What a row should be stands in naive_rows alone; nothing of it is shared with lvm.c but the order
   of the sentences (shuffled), which has tests of its own. */
#include <stddef.h>
void *counted_calloc(size_t count, size_t size);
void counted_free(void *p);
#define LVM_CALLOC counted_calloc
#define LVM_FREE counted_free
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"

static int fail_at = -1, calls, live; /* of calloc: the call that fails, calls so far, blocks */

void *counted_calloc(size_t count, size_t size) {
    if (calls++ == fail_at) return NULL;
    live++;
    return must(calloc(count, size));
}

void counted_free(void *p) {
    live -= p != NULL;
    free(p);
}

/* ---- Files in memory ---- */

/* Sentences as the test knows them. */
struct known {
    int n, lengths[64];
    int32_t ids[64][41];
    uint8_t weights[64][41];
    int weighted, image_tokens;
};

static struct rng rng;

static int below(int n) { return (int)(rng_next(&rng) % (uint32_t)n); }

static struct known random_set(int n, int longest, int bound, int weighted) {
    struct known s = {.n = n, .weighted = weighted};
    for (int i = 0; i < n; i++) {
        s.lengths[i] = 1 + below(longest);
        for (int k = 0; k < longest + 1; k++) { /* one more, for who lengthens it */
            s.ids[i][k] = below(bound);
            s.weights[i][k] = weighted ? (uint8_t)below(256) : 16;
        }
    }
    return s;
}

/* The bytes of a set's .tok file; mem_freed. With plain > 0 the first ones are given no weights. */
static uint8_t *pack(const struct known *s, int plain, size_t *size) {
    struct token_writer w;
    lvm_error e;
    int code = token_writer_open(&w, NULL, &e);
    w.image_tokens = (uint32_t)s->image_tokens;
    for (int i = 0; code == LVM_OK && i < s->n; i++)
        code = token_writer_add(&w, s->ids[i], s->weighted && i >= plain ? s->weights[i] : NULL,
                                (size_t)s->lengths[i], &e);
    code = token_writer_close(&w, code, &e);
    check(code == LVM_OK, "packing gives %d", code);
    *size = w.memory.n;
    return (uint8_t *)w.memory.data;
}

static lvm_tokens *open_set(const struct known *s, int plain) {
    size_t size;
    uint8_t *data = pack(s, plain, &size);
    lvm_error e;
    lvm_tokens *t = lvm_tokens_open_memory(data, size, "set", &e);
    check(t != NULL, "a set does not open: %s", e.text);
    if (t == NULL) abort();
    t->owned = data;
    return t;
}

/* ---- Layout ---- */

static uint64_t number_at(const uint8_t *p, int bytes) {
    uint64_t v = 0;
    for (int i = 0; i < bytes; i++) v |= (uint64_t)p[i] << 8 * i;
    return v;
}

/* Bytes by the drawing in chapter 8, read without its code. */
static void check_bytes(const struct known *s, const uint8_t *data, size_t size) {
    uint64_t n = 0, at = 0, bound = 0;
    for (int i = 0; i < s->n; i++) n += (uint64_t)s->lengths[i];
    uint64_t weights = 64 + (2 * n + 63) / 64 * 64;
    uint64_t starts = weights + (s->weighted ? (n + 63) / 64 * 64 : 0);
    const uint8_t *foot = data + size - 64;
    check(size == starts + ((uint64_t)s->n * 8 + 8 + 63) / 64 * 64 + 64, "size %zu", size);
    check(memcmp(data, "LVM.tok\n\1\0\0\0", 12) == 0 && memcmp(foot + 56, "LVM.tok\n", 8) == 0,
          "its ends");
    for (int i = 0; i < s->n; i++) {
        check(number_at(data + starts + 8 * i, 8) == at, "start %d", i);
        for (int k = 0; k < s->lengths[i]; k++, at++) {
            uint64_t id = number_at(data + 64 + 2 * at, 2);
            if (id >= bound) bound = id + 1;
            check(id == (uint64_t)s->ids[i][k], "id %d of sentence %d", k, i);
            if (s->weighted)
                check(data[weights + at] == s->weights[i][k], "weight %d of sentence %d", k, i);
        }
    }
    check(number_at(data + starts + 8 * s->n, 8) == n, "the last start");
    check(number_at(foot, 8) == (uint64_t)s->n && number_at(foot + 8, 8) == n, "counts");
    check(number_at(foot + 16, 4) == bound, "bound");
    check(number_at(foot + 20, 4) == (uint64_t)s->image_tokens, "tokens of an image");
    check(number_at(foot + 24, 4) == (uint64_t)s->weighted, "flags");
}

static void test_layout(void) {
    for (int round = 0; round < 40; round++) {
        where("layout, round %d", round);
        struct known s = random_set(1 + below(20), 1 + below(40), 1 + below(65536), round % 2);
        int plain = s.weighted && s.n > 2 ? below(2) : 0;
        for (int i = 0; i < plain; i++) memset(s.weights[i], 16, sizeof s.weights[i]);
        size_t size;
        uint8_t *data = pack(&s, plain, &size);
        check_bytes(&s, data, size);
        lvm_tokens *t = lvm_tokens_open_memory(data, size, NULL, NULL);
        check(t != NULL && t->n_sentences == s.n && (t->weights != NULL) == s.weighted, "opened");
        check(t != NULL && strcmp(t->name, "(memory)") == 0, "a name");
        lvm_tokens_close(t);
        mem_free(data);
    }
    where("weights that come late or end early");
    int32_t ids[600] = {0};
    uint8_t weights[3] = {0, 255, 1};
    struct token_writer w;
    token_writer_open(&w, NULL, NULL);
    token_writer_add(&w, ids, NULL, 600, NULL);
    token_writer_add(&w, ids, weights, 3, NULL);
    token_writer_add(&w, ids, NULL, 600, NULL);
    check(token_writer_close(&w, LVM_OK, NULL) == LVM_OK, "written");
    lvm_tokens *t = must(lvm_tokens_open_memory(w.memory.data, w.memory.n, NULL, NULL));
    for (int i = 0; i < 1203; i++)
        check(t->weights[i] == (i < 600 || i > 602 ? 16 : weights[i - 600]), "weight %d", i);
    lvm_tokens_close(t);
    mem_free(w.memory.data);
    where("the writer");
    token_writer_open(&w, NULL, NULL);
    INVALID(token_writer_add(&w, (int32_t[]){65536}, NULL, 1, e));
    INVALID(token_writer_add(&w, (int32_t[]){-1}, NULL, 1, e));
    INVALID(token_writer_add(&w, ids, NULL, 0, e));
    check(token_writer_close(&w, LVM_CANCELLED, NULL) == LVM_CANCELLED, "given up");
    mem_free(w.memory.data);
}

/* ---- Damage ---- */

/* All rows of a file, of which the bytes may be anything. */
static int read_all(const lvm_tokens *t, int packing, lvm_error *e) {
    enum { C = 8 };
    int32_t ids[C], targets[C];
    float weights[C];
    struct piece pieces[C];
    struct rows r = {0, ids, targets, weights, pieces, 0};
    lvm_train_options o = {.data = &t, .n_data = 1, .context = C, .packing = packing};
    struct stream s;
    struct data_position at = {0, 0, 0};
    int code = stream_open(&s, &o, -1, -1, 65536, e);
    s.shuffle = 0;
    do {
        if (code == LVM_OK) code = fill_rows(&s, &at, 1, &r, e);
    } while (code == LVM_OK && r.n > 0);
    return code;
}

/* Opens bytes that are wrong somewhere: refused, with the name. */
static void refused(const uint8_t *data, size_t size, const char *words) {
    lvm_error e = {0, ""};
    lvm_tokens *t = lvm_tokens_open_memory(data, size, "x.tok", &e);
    check(t == NULL && (e.code == LVM_FORMAT || e.code == LVM_UNSUPPORTED) &&
          strncmp(e.text, "x.tok: ", 7) == 0 && strstr(e.text, words) != NULL,
          "not refused with \"%s\": %s", words, t != NULL ? "opened" : e.text);
    lvm_tokens_close(t);
}

/* A file with a number in it replaced. */
static void refused_with(const uint8_t *data, size_t size, size_t at, int bytes, uint64_t value,
                         const char *words) {
    uint8_t *copy = must(malloc(size));
    memcpy(copy, data, size);
    for (int i = 0; i < bytes; i++) copy[at + (size_t)i] = (uint8_t)(value >> 8 * i);
    where("%llu in place of %d bytes at %zu of %zu", (unsigned long long)value, bytes, at, size);
    refused(copy, size, words);
    free(copy);
}

static void test_fields(void) {
    struct known s = {.n = 3, .lengths = {4, 2, 6}, .weighted = 1, .image_tokens = 2,
                    .ids = {{1, 2, 3, 4}, {5, 6}, {7, 8, 9, 10, 11, 12}}};
    size_t size;
    uint8_t *data = pack(&s, 0, &size);
    size_t starts = size - 128, foot = size - 64;
    check_bytes(&s, data, size);
    refused_with(data, size, 0, 1, 'l', "is no .tok file");
    refused_with(data, size, 8, 4, 0, "version 0");
    refused_with(data, size, 8, 4, 2, "version 2");
    refused_with(data, size, starts, 8, 2, "not all of its tokens");
    refused_with(data, size, starts, 8, (uint64_t)1 << 63, "not all of its tokens");
    refused_with(data, size, starts + 8, 8, 0, "sentence 1");
    refused_with(data, size, starts + 8, 8, 3, "no whole images of 2");
    refused_with(data, size, starts + 8, 8, UINT64_MAX, "sentence 1");
    refused_with(data, size, starts + 16, 8, 1 << 20, "sentence 2");
    refused_with(data, size, starts + 24, 8, 10, "not all of its tokens");
    refused_with(data, size, starts + 24, 8, 14, "sentence 3");
    static const uint64_t counts[] = {0, 1, 2, 40, 1 << 20, UINT32_MAX, (uint64_t)1 << 60,
                                      INT64_MAX, (uint64_t)1 << 63, UINT64_MAX - 7, UINT64_MAX};
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (size_t field = 0; field < 16; field += 8)
            refused_with(data, size, foot + field, 8, counts[i], "damaged");
    refused_with(data, size, foot + 16, 4, 65537, "damaged");
    refused_with(data, size, foot + 20, 4, 65536, "damaged");
    refused_with(data, size, foot + 20, 4, UINT32_MAX, "damaged");
    refused_with(data, size, foot + 20, 4, 4, "no whole images of 4");
    refused_with(data, size, foot + 24, 4, 0, "damaged");
    refused_with(data, size, foot + 24, 4, 3, "does not know");
    refused_with(data, size, foot + 40, 1, 1, "does not know");
    refused_with(data, size, foot + 63, 1, 0, "end is missing");
    where("cut");
    for (size_t n = 0; n < size; n++) {
        uint8_t *copy = must(malloc(n + 1)); /* of its own, so that a sanitizer sees its end */
        memcpy(copy, data, n);
        refused(copy, n, n < 128 ? "is no .tok file" : "end is missing");
        free(copy);
    }
    mem_free(data);
}

/* What opens in spite of a changed byte is read without harm, and is another file. */
static void test_changed_bytes(void) {
    struct known s = random_set(9, 12, 500, 1);
    size_t size;
    uint8_t *data = pack(&s, 0, &size);
    lvm_tokens *t = must(lvm_tokens_open_memory(data, size, "x", NULL));
    uint64_t own = t->fingerprint;
    int64_t n = t->n_tokens, changed = 0;
    lvm_tokens_close(t);
    size_t ids_end = 64 + 2 * (size_t)n, weights = (ids_end + 63) / 64 * 64;
    for (size_t at = 0; at < size; at++)
        for (int bit = 0; bit < 8; bit++) {
            where("bit %d of byte %zu", bit, at);
            data[at] ^= (uint8_t)(1 << bit);
            lvm_error e = {0, ""};
            t = lvm_tokens_open_memory(data, size, "x.tok", &e);
            int is_data = (at >= 64 && at < ids_end) || (at >= weights && at < weights + (size_t)n);
            check(t != NULL || !is_data, "damaged data are seen when they are read");
            if (t != NULL && is_data) {
                changed++;
                check(t->fingerprint != own, "the same fingerprint");
            }
            for (int packing = 0; t != NULL && packing < 2; packing++) {
                int code = read_all(t, packing, &e);
                check(code == LVM_OK || code == LVM_INVALID ||
                      (code == LVM_FORMAT && strstr(e.text, "x.tok: sentence ") == e.text),
                      "%d: %s", code, e.text);
            }
            lvm_tokens_close(t);
            data[at] ^= (uint8_t)(1 << bit);
        }
    check(changed == 24 * n, "%lld changes were tried", (long long)changed);
    mem_free(data);
    where("a large file's fingerprint");
    int32_t *many = must(calloc(100000, sizeof *many));
    uint64_t last = 0;
    for (int i = 0; i < 3; i++) { /* the ends are always in the sample */
        struct token_writer w;
        many[i == 2 ? 99999 : 0] = i;
        many[50000] = 7;
        token_writer_open(&w, NULL, NULL);
        token_writer_add(&w, many, NULL, 100000, NULL);
        token_writer_close(&w, LVM_OK, NULL);
        t = must(lvm_tokens_open_memory(w.memory.data, w.memory.n, NULL, NULL));
        check(t->fingerprint != last, "the same as before");
        last = t->fingerprint;
        lvm_tokens_close(t);
        mem_free(w.memory.data);
    }
    free(many);
}

/* An id at or beyond the bound: named by the place where it is read. */
static void test_bad_ids(void) {
    where("an id beyond the bound");
    struct known s = {.n = 2, .lengths = {3, 4}, .ids = {{1, 2, 3}, {4, 5, 9, 1}}};
    size_t size;
    uint8_t *data = pack(&s, 0, &size);
    data[size - 64 + 16] = 9;
    lvm_error e = {0, ""};
    lvm_tokens *t = must(lvm_tokens_open_memory(data, size, "x.tok", NULL));
    check(read_all(t, LVM_CUT, &e) == LVM_FORMAT &&
          strstr(e.text, "x.tok: sentence 2, token 3: id 9,") == e.text, "%s", e.text);
    struct buffer text = {0};
    check(sentence_text(t, 0, 0, &text, &e) == LVM_OK &&
          sentence_text(t, 1, 0, &text, &e) == LVM_FORMAT, "as text: %s", e.text);
    mem_free(text.data);
    lvm_tokens_close(t);
    mem_free(data);
}

/* ---- Order ---- */

static void test_permutations(void) {
    static const int64_t large[] = {1000, 1023, 1024, 1025, 4095, 4096, 4097, 65537};
    uint8_t *seen = must(calloc(1, 70000));
    for (int i = 1; i < 300 + 8; i++) {
        int64_t n = i < 300 ? i : large[i - 300], same = 0;
        for (uint64_t seed = 0; seed < 3; seed++)
            for (int64_t epoch = 0; epoch < 2; epoch++) {
                int bad = 0;
                memset(seen, 0, (size_t)n);
                for (int64_t k = 0; k < n; k++) {
                    int64_t to = shuffled(seed * 12345, epoch, n, k);
                    bad += to < 0 || to >= n || seen[to]++;
                    same += epoch == 1 && to == shuffled(seed * 12345, 0, n, k);
                }
                check(bad == 0, "no permutation of %lld, seed %d, pass %d", (long long)n,
                      (int)seed, (int)epoch);
            }
        check(n < 30 || same < n / 3, "%lld of 3 x %lld stay where they were", (long long)same,
              (long long)n);
    }
    free(seen);
    check(shuffled(1, 0, (int64_t)1 << 40, 5) != shuffled(1, 0, (int64_t)1 << 40, 6), "large");
}

/* Each sentence comes at each place about as often: counts of many seeds and passes, within five
   standard deviations. */
static void test_uniform(void) {
    enum { N = 11, ROUNDS = 22000 };
    static int count[N][N];
    double mean = (double)ROUNDS / N, bound = 5 * sqrt(mean);
    for (int round = 0; round < ROUNDS; round++)
        for (int64_t i = 0; i < N; i++)
            count[i][shuffled((uint64_t)(round / 4), round % 4, N, i)]++;
    for (int i = 0; i < N; i++)
        for (int k = 0; k < N; k++)
            check(fabs(count[i][k] - mean) < bound, "%d comes as number %d: %d times, not %.0f", k,
                  i, count[i][k], mean);
}

/* ---- Rows beside a naive model ---- */

enum { LIST = 1 << 13, MOST_ROWS = 64, MAX_CONTEXT = 90 };

/* A token of the list: its sentence counted as they come, and whether it is its first. */
struct listed {
    int32_t id;
    float weight;
    int sentence, first;
};

static struct listed list[LIST];

/* All tokens of so many passes over sets[n], in order. */
static int list_tokens(const struct known *sets, int n_sets, const struct stream *s, int passes) {
    int n = 0, total = 0, sentence = 0;
    for (int f = 0; f < n_sets; f++) total += sets[f].n;
    for (int epoch = 0; epoch < passes; epoch++)
        for (int i = 0; i < total; i++, sentence++) {
            int f = 0, k = s->shuffle ? (int)shuffled(s->seed, epoch, total, i) : i;
            while (k >= sets[f].n) k -= sets[f++].n;
            int start = n;
            const struct known *set = &sets[f];
            if (s->bos >= 0) list[n++] = (struct listed){s->bos, !set->weighted, sentence, 0};
            for (int j = 0; j < set->lengths[k]; j++)
                list[n++] = (struct listed){set->ids[k][j], set->weights[k][j] / 16.0f, sentence,
                                            0};
            if (s->eos >= 0) list[n++] = (struct listed){s->eos, 1, sentence, 0};
            list[start].first = 1;
            if (n > LIST - 100) return n;
        }
    return n;
}

/* Rows begin at starts[] of the list and end before ends[]: one more token than inputs. Returns how
   many there are. */
static int naive_rows(const struct stream *s, int n, int most, int *starts, int *ends) {
    int rows = 0, at = 0, all = s->context + 1;
    while (rows < most && n - at >= 2) {
        int end = at + all < n ? at + all : n;
        if (s->packing == LVM_WHOLE) /* back to where a sentence ends */
            while (end < n && !list[end].first) end--;
        starts[rows] = at;
        ends[rows++] = end;
        at = s->packing == LVM_WHOLE ? end : at + s->context;
    }
    return rows;
}

/* One row of lvm's, the i-th of r, beside its part of the list; returns its number of pieces. */
static int check_row(const struct stream *s, const struct rows *r, int i, int piece, int start,
                     int end) {
    int base = i * s->context, inputs = end - start - 1, pieces = 0, covered = 0;
    for (int k = 0; k < s->context; k++) {
        int padding = k >= inputs;
        const struct listed *in = &list[start + k], *to = in + 1;
        int32_t id = padding ? 0 : in->id, target = padding ? 0 : to->id;
        float weight = padding || (s->isolate && to->first) ? 0 : to->weight;
        check(r->ids[base + k] == id, "input %d: %d, not %d", k, r->ids[base + k], id);
        check(r->targets[base + k] == target, "target %d: %d, not %d", k, r->targets[base + k],
              target);
        check(r->weights[base + k] == weight, "weight %d: %g, not %g", k,
              (double)r->weights[base + k], (double)weight);
    }
    for (int k = 0; k < inputs; covered = k) {
        int n = 1;
        while (k + n < inputs && (!s->isolate || !list[start + k + n].first)) n++;
        const struct piece *p = &r->pieces[piece + pieces++];
        check(p->first == base + k && p->n == n, "piece %d: %d from %d, not %d from %d", pieces,
              p->n, p->first - base, n, k);
        k += n;
    }
    check(covered == inputs, "%d of %d inputs are in pieces", covered, inputs);
    return pieces;
}

static struct rows new_rows(int n) {
    struct rows r = {.ids = must(malloc((size_t)n * sizeof *r.ids)),
                     .targets = must(malloc((size_t)n * sizeof *r.targets)),
                     .weights = must(malloc((size_t)n * sizeof *r.weights)),
                     .pieces = must(malloc((size_t)n * sizeof *r.pieces))};
    return r;
}

static void free_rows(struct rows *r) {
    free(r->ids);
    free(r->targets);
    free(r->weights);
    free(r->pieces);
}

/* What one call gave is what a call for each row gives, from the places that these leave. */
static void check_resumed(const struct stream *s, struct data_position at, const struct rows *r,
                          struct data_position end) {
    struct rows one = new_rows(s->context);
    int count = r->n / s->context, piece = 0;
    for (int i = 0; i < count; i++) {
        size_t from = (size_t)i * (size_t)s->context, n = (size_t)s->context;
        check(fill_rows(s, &at, 1, &one, NULL) == LVM_OK && one.n == s->context, "a row alone");
        check(memcmp(one.ids, r->ids + from, n * sizeof *one.ids) == 0 &&
              memcmp(one.targets, r->targets + from, n * sizeof *one.ids) == 0 &&
              memcmp(one.weights, r->weights + from, n * sizeof *one.weights) == 0,
              "row %d alone is another", i);
        for (int k = 0; k < one.n_pieces; k++, piece++)
            check(r->pieces[piece].n == one.pieces[k].n &&
                  r->pieces[piece].first == one.pieces[k].first + (int)from, "piece %d", piece);
    }
    check(piece == r->n_pieces, "%d pieces, not %d", piece, r->n_pieces);
    if (count > 0) {
        if (!s->shuffle && end.epoch > 0) /* whoever asks for one row more finds the end */
            check(fill_rows(s, &at, 1, &one, NULL) == LVM_OK && one.n == 0, "a row more");
        check(at.epoch == end.epoch && at.sentence == end.sentence && at.token == end.token,
              "another place afterwards");
    }
    free_rows(&one);
}

static void check_stream(const struct known *sets, int n_sets, const struct stream *s) {
    static int starts[MOST_ROWS], ends[MOST_ROWS];
    int tokens = list_tokens(sets, n_sets, s, s->shuffle ? 50 : 1);
    int rows = naive_rows(s, tokens, MOST_ROWS - 8, starts, ends), done = 0;
    struct data_position at = {0, 0, 0};
    /* with shuffling the list's own end is none of the stream's */
    while (s->shuffle && rows > 0 && ends[rows - 1] == tokens) rows--;
    while (done < rows || !s->shuffle) {
        int count = 1 + below(5);
        struct rows r = new_rows(count * s->context);
        struct data_position before = at;
        int code = fill_rows(s, &at, count, &r, NULL), got = r.n / s->context, piece = 0;
        check(code == LVM_OK && r.n % s->context == 0, "code %d, %d rows", code, r.n);
        check(got == count || !s->shuffle, "%d rows, not %d", got, count);
        for (int i = 0; i < got && done + i < rows; i++) {
            char outer[100];
            snprintf(outer, sizeof outer, "%.99s", checks.where);
            where("%.90s, row %d", outer, done + i);
            piece += check_row(s, &r, i, piece, starts[done + i], ends[done + i]);
            where("%s", outer);
        }
        check(done + got > rows || piece == r.n_pieces, "%d pieces, not %d", r.n_pieces, piece);
        check_resumed(s, before, &r, at);
        done += got;
        free_rows(&r);
        if (got < count) break;
    }
    check(s->shuffle || done == rows || rows == MOST_ROWS - 8, "%d rows of one pass, not %d", done,
          rows);
}

/* All packings, with bos and eos and without, several files, weights; three rounds each. */
static void test_rows(void) {
    for (int kind = 0; kind < 64; kind++)
        for (int round = 0; round < 3; round++) {
            int specials = kind & 3, n_sets = round == 0 ? 1 : 1 + below(3), context = 0;
            struct known sets[3];
            const lvm_tokens *files[3];
            for (int f = 0; f < n_sets; f++) {
                int weighted = n_sets > 1 ? below(2) : kind >> 5;
                sets[f] = random_set(1 + below(9), round == 2 ? 3 : 30, 90, weighted);
                for (int i = 0; kind & 8 && specials == 0 && i < sets[f].n; i++)
                    if (sets[f].lengths[i] == 1) sets[f].lengths[i] = 2; /* whole rows need two */
                files[f] = open_set(&sets[f], 0);
            }
            context = kind & 8 ? 31 + below(40) : 1 + below(40);
            lvm_train_options o = {.data = files, .n_data = n_sets, .context = context,
                                   .packing = kind & 8 ? LVM_WHOLE : LVM_CUT,
                                   .isolate = kind >> 2 & 1, .seed = (uint64_t)kind};
            struct stream s;
            lvm_error e;
            where("kind %d, round %d", kind, round);
            int code = stream_open(&s, &o, specials & 1 ? 98 : -1, specials & 2 ? 99 : -1, 100, &e);
            check(code == LVM_OK && s.shuffle, "%s", e.text);
            s.shuffle = kind >> 4 & 1;
            if (code == LVM_OK) check_stream(sets, n_sets, &s);
            for (int f = 0; f < n_sets; f++) lvm_tokens_close((lvm_tokens *)(uintptr_t)files[f]);
        }
}

/* Rows of a pass hold every sentence once, in another order than the files' and the next pass's. */
static void test_passes(void) {
    struct known sets = {.n = 60};
    for (int i = 0; i < 60; i++) {
        sets.lengths[i] = 2;
        sets.ids[i][0] = sets.ids[i][1] = i;
    }
    const lvm_tokens *file = open_set(&sets, 0);
    lvm_train_options o = {.data = &file, .n_data = 1, .context = 1, .packing = LVM_WHOLE,
                           .seed = 3};
    struct stream s;
    struct data_position at = {0, 0, 0};
    struct rows r = new_rows(60);
    int order[2][60], moved = 0, differ = 0;
    where("passes");
    check(stream_open(&s, &o, -1, -1, 60, NULL) == LVM_OK, "opened");
    for (int pass = 0; pass < 2; pass++) {
        int seen[60] = {0};
        check(at.epoch == pass && at.sentence == 0 && at.token == 0, "pass %d begins", pass);
        fill_rows(&s, &at, 60, &r, NULL);
        for (int i = 0; i < 60; i++) {
            order[pass][i] = r.ids[i];
            check(seen[r.ids[i]]++ == 0, "sentence %d comes twice", r.ids[i]);
        }
    }
    for (int i = 0; i < 60; i++) {
        moved += order[0][i] != i;
        differ += order[0][i] != order[1][i];
    }
    check(moved > 50 && differ > 50, "%d moved, %d differ", moved, differ);
    free_rows(&r);
    lvm_tokens_close((lvm_tokens *)(uintptr_t)file);
}

/* ---- What is refused ---- */

static void stream_refused(lvm_train_options o, int bos, int eos, int vocab, const char *words) {
    struct stream s;
    lvm_error e = {0, ""};
    int code = stream_open(&s, &o, bos, eos, vocab, &e);
    check(code == LVM_INVALID && strstr(e.text, words) != NULL, "\"%s\" gives %d: %s", words, code,
          e.text);
}

static void test_refusals(void) {
    struct known some = {.n = 2, .lengths = {3, 5}, .ids = {{1, 2, 3}, {4, 5, 6, 7, 8}}},
               none = {.n = 0}, single = {.n = 2, .lengths = {2, 1}};
    const lvm_tokens *a = open_set(&some, 0), *empty = open_set(&none, 0), *files[2] = {empty, a},
                     *missing[2] = {a, NULL}, *b = open_set(&single, 0);
    lvm_train_options o = {.data = &a, .n_data = 1, .context = 4};
    where("streams");
    check(empty->n_sentences == 0 && empty->bound == 0, "an empty set opens");
    stream_refused((lvm_train_options){.context = 4}, -1, -1, 9, "no data");
    stream_refused((lvm_train_options){.data = &a, .context = 4}, -1, -1, 9, "no data");
    stream_refused((lvm_train_options){.data = &empty, .n_data = 1, .context = 4}, -1, -1, 9,
                   "set: holds no sentences");
    stream_refused((lvm_train_options){.data = missing, .n_data = 2, .context = 4}, -1, -1, 9,
                   "NULL");
    stream_refused(o, -1, -1, 8, "set: has ids up to 8");
    stream_refused(o, 9, -1, 9, "bos 9");
    stream_refused(o, -1, 12, 9, "eos 12");
    o.context = 0;
    stream_refused(o, -1, -1, 9, "context of 0");
    o.context = INT_MAX;
    stream_refused(o, -1, -1, 9, "out of range");
    o.context = 4;
    o.packing = 2;
    stream_refused(o, -1, -1, 9, "packing 2");
    o.packing = LVM_WHOLE;
    stream_refused(o, 9, 10, 11, "set: sentence 2 has 7 tokens, bos and eos counted; rows of whole "
                                 "sentences take a context of 6");
    struct stream s;
    check(stream_open(&s, &o, -1, -1, 9, NULL) == LVM_OK, "5 tokens fit a context of 4");
    o.data = &b;
    stream_refused(o, -1, -1, 9, "sentence 2 is one token");
    check(stream_open(&s, &o, 1, -1, 9, NULL) == LVM_OK, "but two with bos");
    o.data = files;
    o.n_data = 2;
    check(stream_open(&s, &o, -1, -1, 9, NULL) == LVM_OK && s.n_sentences == 2, "an empty file");
    where("places");
    struct rows r = new_rows(4);
    static const struct data_position wrong[] = {{-1, 0, 0}, {0, -1, 0}, {0, 2, 0}, {0, 0, -1},
                                                 {0, 0, 9}, {3, 1, 5}, {0, INT64_MAX, 0}};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct data_position at = wrong[i];
        check(fill_rows(&s, &at, 1, &r, NULL) == LVM_FORMAT, "place %zu is taken", i);
        check(memcmp(&at, &wrong[i], sizeof at) == 0, "and is moved");
    }
    free_rows(&r);
    for (int i = 0; i < 3; i++)
        lvm_tokens_close((lvm_tokens *)(uintptr_t)(const lvm_tokens *[]){a, empty, b}[i]);
    where("opening");
    REFUSES(lvm_tokens_open(NULL, e));
    REFUSES(lvm_tokens_open_memory(NULL, 8, "x", e));
    lvm_tokens_close(NULL);
}

/* ---- Files and lines ---- */

static void write_text(const char *path, const char *text) {
    lvm_error e;
    check(write_file(path, text, strlen(text), &e) == LVM_OK, "%s", e.text);
}

static void test_files(const char *folder) {
    char path[600];
    lvm_error e;
    where("files");
    snprintf(path, sizeof path, "%s/none.tok", folder);
    check(lvm_tokens_open(path, &e) == NULL && e.code == LVM_IO, "a missing file: %s", e.text);
    check(lvm_tokens_open(folder, &e) == NULL && e.code == LVM_IO, "a folder: %s", e.text);
    snprintf(path, sizeof path, "%s/empty.tok", folder);
    write_text(path, "");
    check(lvm_tokens_open(path, &e) == NULL && e.code == LVM_FORMAT, "an empty file: %s", e.text);
    struct known s = random_set(30, 40, 8192, 1);
    size_t size;
    uint8_t *data = pack(&s, 0, &size);
    snprintf(path, sizeof path, "%s/some.tok", folder);
    struct outfile out;
    struct token_writer w;
    int code = outfile_open(&out, path, NULL);
    if (code == LVM_OK) code = token_writer_open(&w, &out, NULL);
    for (int i = 0; i < s.n; i++)
        token_writer_add(&w, s.ids[i], s.weights[i], (size_t)s.lengths[i], NULL);
    code = outfile_close(&out, token_writer_close(&w, code, NULL), NULL);
    uint8_t *read = NULL;
    size_t n = 0;
    check(code == LVM_OK && read_file(path, &read, &n, NULL) == LVM_OK && n == size &&
          memcmp(read, data, n) == 0, "the same bytes as in memory");
    lvm_tokens *t = lvm_tokens_open(path, &e), *m = lvm_tokens_open_memory(data, size, NULL, NULL);
    check(t != NULL && m != NULL && t->fingerprint == m->fingerprint && t->mapped != NULL &&
          strcmp(t->name, path) == 0, "mapped");
    lvm_tokens_close(t);
    lvm_tokens_close(m);
    mem_free(read);
    mem_free(data);
}

static void test_lines(const char *folder) {
    static const char text[] = "\xef\xbb\xbf{\"tokens\": [8192, 5, 6, 8193]}\n\n  \n"
                               "{\"input_tokens\": [[1, 2], [3]], \"output\": \"BwAAAA==\"}\r\n"
                               "{\"x\": [1], \"weights\": [0, 7, 255, 1], "
                               "\"tokens\": [8192, 9, 10, 8193]}";
    static const int32_t ids[] = {5, 6, 1, 2, 3, 7, 9, 10};
    static const uint8_t weights[2][8] = {{16, 16, 16, 16, 16, 16, 7, 255},
                                          {0, 0, 0, 0, 0, 16, 7, 255}};
    char path[600];
    lvm_error e = {0, ""};
    where("lines");
    snprintf(path, sizeof path, "%s/lines.jsonl", folder);
    write_text(path, text);
    lvm_tokens *t = must(read_token_lines(path, 0, &e));
    check(t->n_sentences == 3 && t->n_tokens == 8 && t->bound == 11 && t->image_tokens == 0 &&
          strcmp(t->name, path) == 0, "%lld sentences", (long long)t->n_sentences);
    for (int i = 0; i < 8; i++)
        check(token_at(t, i) == ids[i] && t->weights[i] == weights[0][i], "token %d", i);
    lvm_tokens_close(t);
    check(read_token_lines(path, 1, &e) == NULL && e.code == LVM_FORMAT &&
          strstr(e.text, "line 1: --loss answers") != NULL, "%s", e.text);
    write_text(path, strchr(text, '\n'));
    t = must(read_token_lines(path, 1, &e));
    check(t->n_sentences == 2 && t->n_tokens == 6, "%lld sentences", (long long)t->n_sentences);
    for (int i = 0; i < 6; i++) check(t->weights[i] == weights[1][i + 2], "weight %d", i);
    lvm_tokens_close(t);
    snprintf(path, sizeof path, "%s/nowhere.jsonl", folder);
    check(read_token_lines(path, 0, &e) == NULL && e.code == LVM_IO, "%s", e.text);
}

/* Memory that runs out at any call: an error, and nothing is lost. */
static void test_memory(const char *folder) {
    char path[600];
    int before = live, failed = 0;
    where("memory");
    for (int kind = 0; kind < 2; kind++) {
        snprintf(path, sizeof path, "%s/%s", folder, kind ? "lines.jsonl" : "some.tok");
        for (int at = 0;; at++) {
            lvm_error e = {0, ""};
            calls = 0;
            fail_at = at;
            lvm_tokens *t = kind ? read_token_lines(path, 1, &e) : lvm_tokens_open(path, &e);
            fail_at = -1;
            check(t != NULL || (e.code == LVM_MEMORY && e.text[0] != 0), "call %d: %d %s", at,
                  e.code, e.text);
            lvm_tokens_close(t);
            check(live == before, "call %d: %d blocks are left", at, live - before);
            if (t != NULL) break;
            failed++;
        }
    }
    check(failed > 10, "only %d calls were failed", failed);
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: test_data FOLDER\n");
        return 2;
    }
    os_make_folder(argv[1]);
    rng = rng_new(5, 0);
    test_layout();
    test_fields();
    test_changed_bytes();
    test_bad_ids();
    where("%s", "");
    test_permutations();
    test_uniform();
    test_rows();
    test_passes();
    test_refusals();
    test_files(argv[1]);
    test_lines(argv[1]);
    test_memory(argv[1]);
    check(live == 0, "%d blocks of memory are left", live);
    return checked("data");
}
