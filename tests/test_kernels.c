/* Tests of chapters 2, 3, 12 and 13: every kernel of every table that this machine can run against
   the plain C, against sums in double precision, and against itself (one row = many rows, bit for
   bit).

       test_kernels [--verbose | --quick]      non-zero when a check fails

   Quick, for emulators: fewer rounds, no long rows, no sweeps of exp's, log's and sine's arguments.

   Buffers come from malloc. In even rounds each stands between borders of 0xff bytes, which are
   NaNs as floats and halves: an input read beyond its end spoils a sum, an output written beyond
   its end shows. In odd rounds buffers end where malloc's do, for a build with -fsanitize=address.

   Bounds count roundings, each of at most u = 2^-24 of the magnitude it happens at: m roundings on
   the way of a sum of terms t cost at most m u sum |t| (first order; the bounds leave room for the
   rest). */
#define LVM_NO_MAIN
#include "../lvm.c"
#include "check.h"

enum { ROUNDS = 200, BORDER = 68, MAX_BOXES = 24, MAX_NOTES = 64 };
static const double U = 0x1p-24;

struct box {
    uint8_t *base;
    size_t bytes, border;
};

/* The largest error of a kernel, and what is allowed there, in units of u. */
struct note {
    const char *table, *what;
    double worst, allowed;
};

struct test {
    int verbose, rounds, round, n_boxes, n_notes;
    uint64_t seed;
    struct rng rng;
    const struct kernels *k;
    struct box box[MAX_BOXES];
    struct note note[MAX_NOTES];
};

static void start_round(struct test *t, int round) {
    t->round = round;
    t->rng = rng_new(t->seed, (uint64_t)round);
    where("%s, seed %llu, round %d", t->k != NULL ? t->k->name : "numbers",
          (unsigned long long)t->seed, round);
}

static int below(struct test *t, int n) { return (int)(rng_next(&t->rng) % (uint32_t)n); }
static float uniform(struct test *t) { return (float)(int32_t)rng_next(&t->rng) * 0x1p-31f; }

/* Values of many magnitudes around 1. */
static float wide(struct test *t) { return ldexpf(uniform(t), below(t, 9) - 4); }

/* ---- Buffers ---- */

static void *make(struct test *t, size_t bytes) {
    struct box *b = &t->box[t->n_boxes++];
    if (t->n_boxes > MAX_BOXES) abort();
    b->bytes = bytes;
    b->border = t->round % 2 == 0 ? BORDER : 0;
    b->base = must(malloc(bytes + 2 * b->border));
    memset(b->base, 0xff, bytes + 2 * b->border);
    return b->base + b->border;
}

static float *make_space(struct test *t, int64_t n) { return make(t, (size_t)n * sizeof(float)); }

static float *make_floats(struct test *t, int64_t n) {
    float *x = make_space(t, n);
    for (int64_t i = 0; i < n; i++) x[i] = wide(t);
    return x;
}

/* rows of k values, ld apart; what lies between two rows stays NaN. */
static float *make_rows(struct test *t, int rows, int64_t k, int64_t ld) {
    float *x = make_space(t, (rows - 1) * ld + k);
    for (int r = 0; r < rows; r++)
        for (int64_t i = 0; i < k; i++) x[r * ld + i] = wide(t);
    return x;
}

static int untouched(const void *p, size_t bytes) {
    const uint8_t *b = p;
    for (size_t i = 0; i < bytes; i++)
        if (b[i] != 0xff) return 0;
    return 1;
}

/* The gap between two rows of an output. */
static int gap_untouched(const float *c, int ldc, int rows, int cols) {
    for (int r = 0; r + 1 < rows; r++)
        if (!untouched(c + r * ldc + cols, (size_t)(ldc - cols) * sizeof *c)) return 0;
    return 1;
}

/* Looks at all borders, then frees everything that make() gave. */
static void release(struct test *t, const char *what) {
    int ok = 1;
    for (int i = 0; i < t->n_boxes; i++) {
        const struct box *b = &t->box[i];
        ok &= untouched(b->base, b->border);
        ok &= untouched(b->base + b->border + b->bytes, b->border);
        free(b->base);
    }
    t->n_boxes = 0;
    check(ok, "%s wrote outside its buffer", what);
}

/* ---- Comparisons ---- */

static int same_bits(const float *a, const float *b, int64_t n) {
    return memcmp(a, b, (size_t)n * sizeof *a) == 0;
}

/* NaNs count as equal, whatever they carry: processors quieten them. */
static int same_or_nan(const float *a, const float *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (f32_to_bits(a[i]) != f32_to_bits(b[i]) && !(isnan(a[i]) && isnan(b[i]))) return 0;
    return 1;
}

static void note(struct test *t, const char *what, double error, double allowed) {
    const char *table = t->k != NULL ? t->k->name : "";
    int i = 0;
    while (i < t->n_notes && (t->note[i].what != what || t->note[i].table != table)) i++;
    if (i == MAX_NOTES) abort();
    if (i == t->n_notes) t->note[t->n_notes++] = (struct note){table, what, -1, 0};
    if (error > t->note[i].worst) t->note[i].worst = error, t->note[i].allowed = allowed;
}

/* |got - want| <= allowed u magnitude + floor; floor is for what underflows. */
static int within(struct test *t, const char *what, double got, double want, double magnitude,
                  double allowed, double floor) {
    double error = fabs(got - want);
    if (error <= floor) return 1;
    note(t, what, error / (U * magnitude), allowed);
    return error <= allowed * U * magnitude;
}

/* sum a[i] b[i * step] in double; *magnitude = sum of |products|. */
static double dot_double(int k, const float *a, const float *b, int step, double *magnitude) {
    double sum = 0;
    *magnitude = 0;
    for (int i = 0; i < k; i++) {
        double p = (double)a[i] * b[(int64_t)i * step];
        sum += p;
        *magnitude += fabs(p);
    }
    return sum;
}

/* ---- Dot products ---- */

/* Of a row's k/8 products a lane, each takes one rounding for the product (plain C) and one for the
   sum; three or four more in the tree. */
static void test_dot_row(struct test *t) {
    int n = 1 + below(t, 40), k = 1 + below(t, 300);
    int64_t ld = k + below(t, 4);
    const float *a = make_floats(t, k), *b = make_rows(t, n, k, ld);
    float *c = make_space(t, n);
    int ok = 1;
    t->k->matmul.dot_row(k, a, b, ld, n, c);
    for (int j = 0; j < n; j++) {
        double magnitude, sum = dot_double(k, a, b + j * ld, 1, &magnitude);
        ok &= within(t, "dot_row", c[j], sum, magnitude, k / 8 + 6, 0);
    }
    check(ok, "dot_row of %d x %d differs from the sum in double", n, k);
    release(t, "dot_row");
}

static void test_dot_tile(struct test *t) {
    int rows = t->k->matmul.dot_rows, cols = t->k->matmul.dot_cols, k = 1 + below(t, 300),
        ldc = cols + below(t, 3);
    const float *a = make_rows(t, rows, k, k + 3), *b = make_rows(t, cols, k, k + 1);
    const float *pa[MAX_TILE], *pb[MAX_TILE];
    float *c = make_space(t, (rows - 1) * ldc + cols), alone[MAX_TILE];
    int ok = 1;
    for (int r = 0; r < rows; r++) pa[r] = a + below(t, rows) * (k + 3);
    for (int j = 0; j < cols; j++) pb[j] = b + j * (k + 1);
    t->k->matmul.dot_tile(k, pa, pb, c, ldc);
    for (int r = 0; r < rows; r++) {
        t->k->matmul.dot_row(k, pa[r], b, k + 1, cols, alone);
        ok &= same_bits(alone, c + r * ldc, cols);
    }
    check(ok, "dot_tile of length %d is not dot_row bit for bit", k);
    check(gap_untouched(c, ldc, rows, cols), "dot_tile wrote between its rows");
    release(t, "dot_tile");
}

/* ---- Outer products ---- */

/* k products and k sums, one after the other: k + 1 roundings for each term at most. */
static void test_outer_row(struct test *t) {
    int k = 1 + below(t, 200), panels = 1 + below(t, 18), accumulate = below(t, 2);
    int64_t ldp = k * PANEL + below(t, 5);
    const float *a = make_floats(t, k), *b = make_rows(t, panels, k * PANEL, ldp);
    float *c = make_floats(t, panels * PANEL), *split = make_space(t, panels * PANEL);
    float *before = make_space(t, panels * PANEL);
    int ok = 1, half = k / 2;
    memcpy(before, c, (size_t)panels * PANEL * sizeof *c);
    memcpy(split, c, (size_t)panels * PANEL * sizeof *c);
    t->k->matmul.outer_row(k, a, b, ldp, panels, c, accumulate);
    for (int j = 0; j < panels * PANEL; j++) {
        const float *column = b + j / PANEL * ldp + j % PANEL;
        double magnitude, sum = dot_double(k, a, column, PANEL, &magnitude);
        if (accumulate) sum += before[j], magnitude += fabsf(before[j]);
        ok &= within(t, "outer_row", c[j], sum, magnitude, k + 1, 0);
    }
    check(ok, "outer_row of %d panels x %d differs from the sum in double", panels, k);
    if (half > 0) t->k->matmul.outer_row(half, a, b, ldp, panels, split, accumulate);
    t->k->matmul.outer_row(k - half, a + half, b + half * PANEL, ldp, panels, split,
                    accumulate || half > 0);
    check(same_bits(c, split, panels * PANEL), "outer_row in two pieces of %d is not one", k);
    release(t, "outer_row");
}

static void test_outer_tile(struct test *t) {
    int rows = t->k->matmul.outer_rows, k = 1 + below(t, 200), accumulate = below(t, 2), half = k / 2,
        ok = 1, panels = 1 + below(t, t->k->matmul.outer_panels), cols = panels * PANEL;
    int ldc = cols + below(t, 3), space = (rows - 1) * ldc + cols;
    int64_t ldp = k * PANEL + below(t, 5);
    const float *a = make_rows(t, rows, k, k + 2), *b = make_rows(t, panels, k * PANEL, ldp);
    const float *pa[MAX_TILE], *pb[MAX_TILE];
    float *c = make_rows(t, rows, cols, ldc), *split = make_space(t, space);
    float *before = make_space(t, space), alone[MAX_PANELS * PANEL];
    memcpy(before, c, (size_t)space * sizeof *c);
    memcpy(split, c, (size_t)space * sizeof *c);
    for (int r = 0; r < rows; r++) {
        pa[r] = a + r * (k + 2);
        pb[r] = pa[r] + half;
    }
    t->k->matmul.outer_tile(k, pa, b, ldp, panels, c, ldc, accumulate);
    for (int r = 0; r < rows; r++) {
        memcpy(alone, before + r * ldc, (size_t)cols * sizeof *alone);
        t->k->matmul.outer_row(k, pa[r], b, ldp, panels, alone, accumulate);
        ok &= same_bits(alone, c + r * ldc, cols);
    }
    check(ok, "outer_tile of length %d is not outer_row bit for bit", k);
    check(gap_untouched(c, ldc, rows, cols), "outer_tile wrote between its rows");
    if (half > 0) t->k->matmul.outer_tile(half, pa, b, ldp, panels, split, ldc, accumulate);
    t->k->matmul.outer_tile(k - half, pb, b + half * PANEL, ldp, panels, split, ldc,
                     accumulate || half > 0);
    check(memcmp(c, split, (size_t)space * sizeof *c) == 0, "outer_tile in two pieces is not one");
    release(t, "outer_tile");
}

/* ---- Quantised activations and weights ---- */

/* Blocks of all kinds: ordinary, zero, huge, tiny, and halves that must round to even. */
static void fill_block(struct test *t, float *x) {
    int kind = below(t, 6);
    float unit = kind == 1 ? 0 : kind == 2 ? 1e30f : kind == 3 ? 1e-30f : 1;
    for (int i = 0; i < QK; i++)
        x[i] = unit * (kind == 4 ? (float)(below(t, 255) - 127) / 2 : wide(t));
    if (kind == 4) x[below(t, QK)] = 127;
}

static void test_quantize_x(struct test *t) {
    int blocks = 1 + below(t, 12), ok = 1, near = 1;
    float *x = make_space(t, blocks * QK);
    struct act_block *y = make(t, (size_t)blocks * sizeof *y);
    struct act_block *plain = make(t, (size_t)blocks * sizeof *plain);
    for (int b = 0; b < blocks; b++) fill_block(t, x + b * QK);
    t->k->matmul.quantize_act(x, y, blocks * QK);
    kernels_plain.matmul.quantize_act(x, plain, blocks * QK);
    for (int b = 0; b < blocks; b++) {
        ok &= same_bits(&y[b].d, &plain[b].d, 1);
        for (int i = 0; i < QK; i++) {
            int q = y[b].q[i];
            ok &= q == plain[b].q[i];
            near &= q >= -127 && q <= 127;
            near &= fabs((double)q * y[b].d - x[b * QK + i]) <= y[b].d * 0.50001;
        }
    }
    check(ok, "quantize_act differs from plain C");
    check(near, "quantize_act is not the nearest integer");
    release(t, "quantize_act");
}

/* Magnitudes so small that 127 / amax is infinite: whole numbers still, and as good as 0. */
static void test_quantize_tiny(struct test *t) {
    int ok = 1;
    for (int e = -149; e < -110; e++) {
        float x[QK];
        struct act_block y;
        for (int i = 0; i < QK; i++) x[i] = ldexpf(uniform(t), e);
        t->k->matmul.quantize_act(x, &y, QK);
        for (int i = 0; i < QK; i++) {
            int q = y.q[i];
            ok &= q >= -127 && q <= 127 && fabs((double)q * y.d - x[i]) <= 0.51 * y.d + 1e-36;
        }
    }
    check(ok, "quantize_act of tiny numbers");
}

/* Rows of weights from random bytes: also values that no quantiser makes (-128 in q8_0). */
static uint8_t *make_weights(struct test *t, int type, int rows, int blocks) {
    int bytes = type_info(type)->bytes;
    uint8_t *w = make(t, (size_t)rows * (size_t)blocks * (size_t)bytes);
    for (int i = 0; i < rows * blocks * bytes; i++) w[i] = (uint8_t)below(t, 256);
    for (int b = 0; b < rows * blocks; b++) {
        uint16_t d = f32_to_f16(uniform(t) * 0.1f);
        memcpy(w + b * bytes, &d, sizeof d);
    }
    return w;
}

static void test_int(struct test *t, int type) {
    const struct kernels *k = t->k;
    int panels = 1 + below(t, k->matmul.int_panels), width = panels * PANEL;
    int blocks = 1 + below(t, 12), n = width + below(t, 25), rows = k->matmul.int_rows,
        ldc = width + below(t, 3), few = 1 + below(t, rows), gap = below(t, 3);
    int64_t row_bytes = (int64_t)blocks * type_info(type)->bytes;
    const uint8_t *w = make_weights(t, type, n, blocks), *pw[PANEL];
    const float *x = make_floats(t, rows * blocks * QK);
    struct act_block *xq = make(t, (size_t)(rows * blocks) * sizeof *xq);
    struct act_block *plain = make(t, (size_t)(rows * blocks) * sizeof *plain);
    const struct act_block *px[MAX_TILE];
    uint8_t *packed = make(t, (size_t)(blocks * panels * k->matmul.pack_bytes));
    float *c = make_space(t, rows * (n + gap)), *want = make_space(t, n);
    float *tile = make_space(t, (rows - 1) * ldc + width);
    int first = below(t, n - width + 1), row_ok = 1, tile_ok = 1;
    k->matmul.quantize_act(x, xq, rows * blocks * QK);
    kernels_plain.matmul.quantize_act(x, plain, rows * blocks * QK);
    for (int r = 0; r < rows; r++) px[r] = xq + r * blocks;
    for (int s = 0; s < panels; s++) {
        for (int j = 0; j < PANEL; j++) pw[j] = w + (first + s * PANEL + j) * row_bytes;
        k->matmul.int_pack(type, blocks, pw, packed + s * blocks * k->matmul.pack_bytes);
    }
    k->matmul.int_tile(blocks, px, packed, panels, tile, ldc);
    for (int r = 0; r < rows; r += few) /* by ones, twos, ... */
        k->matmul.int_row(type, blocks, px[r], rows - r < few ? rows - r : few, w, row_bytes, n,
                   c + r * (n + gap), n + gap);
    for (int r = 0; r < rows; r++) {
        kernels_plain.matmul.int_row(type, blocks, plain + r * blocks, 1, w, row_bytes, n, want, n);
        row_ok &= same_bits(c + r * (n + gap), want, n);
        tile_ok &= same_bits(c + r * (n + gap) + first, tile + r * ldc, width);
    }
    check(row_ok, "int_row of %s, %d rows of %d blocks, differs from plain C",
          type_info(type)->name, n, blocks);
    check(tile_ok, "int_tile of %s is not int_row bit for bit", type_info(type)->name);
    check(gap_untouched(tile, ldc, rows, width), "int_tile wrote between its rows");
    check(gap_untouched(c, n + gap, rows, n), "int_row wrote between its rows");
    release(t, "an integer kernel");
}

/* The plain integer dot against dequantised values in double: 32 exact products a block; for each
   block one rounding of the scales' product and one of the sum, so blocks + 2 u. */
static void test_int_plain(struct test *t, int type) {
    int blocks = 1 + below(t, 12), ok = 1;
    const uint8_t *w = make_weights(t, type, 1, blocks);
    const float *x = make_floats(t, blocks * QK);
    struct act_block *xq = make(t, (size_t)blocks * sizeof *xq);
    float got = 0;
    double sum = 0, magnitude = 0;
    kernels_plain.matmul.quantize_act(x, xq, blocks * QK);
    kernels_plain.matmul.int_row(type, blocks, xq, 1, w, 0, 1, &got, 1);
    for (int b = 0; b < blocks; b++) {
        float y[QK];
        double block = 0;
        row_to_f32(type, w + b * type_info(type)->bytes, y, QK);
        for (int i = 0; i < QK; i++) block += (double)y[i] * xq[b].q[i] * xq[b].d;
        sum += block;
        for (int i = 0; i < QK; i++) magnitude += fabs((double)y[i] * xq[b].q[i] * xq[b].d);
    }
    /* y[i] itself is rounded when d q needs more than 24 bits: one u more. */
    ok &= within(t, "int_row", got, sum, magnitude, blocks + 3, 0);
    check(ok, "int_row of %s differs from the sum in double", type_info(type)->name);
    release(t, "int_row");
}

/* ---- Conversions ---- */

static void test_to_f32(struct test *t, int type) {
    const struct type_entry *info = type_info(type);
    int64_t k = (1 + below(t, 300 / info->block)) * (int64_t)info->block;
    size_t bytes = (size_t)type_bytes(type, k);
    uint8_t *in = make(t, bytes);
    float *got = make_space(t, k), *want = make_space(t, k);
    for (size_t i = 0; i < bytes; i++) in[i] = (uint8_t)below(t, 256);
    t->k->elementwise.to_f32(type, in, got, k);
    row_to_f32(type, in, want, k);
    check(same_or_nan(got, want, k), "to_f32 of %d values of %s differs", (int)k, info->name);
    release(t, "to_f32");
}

static void test_all_halves(struct test *t, int type) {
    uint16_t *in = make(t, 65536 * sizeof *in);
    float *got = make_space(t, 65536), *want = make_space(t, 65536);
    for (int i = 0; i < 65536; i++) in[i] = (uint16_t)i;
    t->k->elementwise.to_f32(type, in, got, 65536);
    row_to_f32(type, in, want, 65536);
    check(same_or_nan(got, want, 65536), "to_f32 of all values of %s differs",
          type_info(type)->name);
    release(t, "to_f32");
}

/* A page of one head: keys and values of d dimensions, quantised into their places. */
struct test_page {
    int d, keys, panels;
    uint8_t *k8, *v8;
    float *k, *v; /* what the bytes stand for, [keys][d] */
};

/* A key and a value of random sizes at position `at`. */
static void fill_page(struct test *t, const struct test_page *p, int at) {
    struct kv_cache kv = {.type = LVM_Q8_0, .dp = p->d,
                          .head_bytes = (intptr_t)p->v8 - (intptr_t)p->k8};
    float row[2][8 * QK];
    for (int i = 0; i < 2; i++) {
        struct q8_0 block[8];
        float size = ldexpf(1, below(t, 20) - 10);
        for (int j = 0; j < p->d; j++) row[i][j] = size * uniform(t);
        quantize_q8_0(row[i], block, p->d);
        row_to_f32(LVM_Q8_0, block, (i == 0 ? p->k : p->v) + at * p->d, p->d);
    }
    store_kv8(t->k, &kv, p->k8, at, row[0], row[1]);
}

static void make_page(struct test *t, struct test_page *p) {
    p->d = QK * (1 + below(t, 5));
    p->keys = 1 + below(t, KV_BLOCK);
    p->panels = (p->keys + PANEL - 1) / PANEL;
    size_t k8 = (size_t)(p->panels * p->d / QK * KV8_PANEL),
           v8 = (size_t)((p->d / QK - 1) * KV_BLOCK / PANEL + p->panels) * KV8_PANEL;
    p->k8 = make(t, k8);
    p->v8 = make(t, v8);
    p->k = make_space(t, p->keys * p->d);
    p->v = make_space(t, p->keys * p->d);
    memset(p->k8, 0, k8);
    memset(p->v8, 0, v8);
    for (int at = 0; at < p->keys; at++) fill_page(t, p, at);
}

static int query_number(const struct test *t, const struct query_block *x, int i) {
    if (strncmp(t->k->name, "avx512", 6) != 0) return x->x.s16[i];
    return 256 * x->x.s8[i / 4][0][i % 4] + x->x.s8[i / 4][1][i % 4];
}

static void test_quantize_query(struct test *t) {
    int blocks = 1 + below(t, 5), ok = 1;
    float *q = make_floats(t, blocks * QK), size = ldexpf(1, below(t, 100) - 80);
    struct query_block *got = make(t, (size_t)blocks * sizeof *got),
                       *want = make(t, (size_t)blocks * sizeof *want);
    for (int i = 0; i < blocks * QK; i++) q[i] *= size;
    if (below(t, 4) == 0) memset(q, 0, QK * sizeof *q);
    t->k->attention.quantize_query(q, got, blocks * QK);
    quantize_query_plain(q, want, blocks * QK);
    for (int b = 0; b < blocks; b++) {
        ok &= same_bits(&got[b].d, &want[b].d, 1) && got[b].zero_point == want[b].zero_point;
        for (int i = 0; i < QK; i++) ok &= query_number(t, &got[b], i) == want[b].x.s16[i];
    }
    check(ok, "quantize_query of %d blocks differs", blocks);
    release(t, "quantize_query");
}

/* Scores and sums in double from what the page's bytes stand for; what was rounded on the way: q
   and p dv by half a unit each (and an ulp or two of them), then each addition. */
static int scores_near(const struct test_page *p, const float *q, const float *s) {
    for (int key = 0; key < p->keys; key++) {
        double want = 0, allowed = 0;
        for (int i = 0; i < p->d; i++) {
            const float *block = q + i / QK * QK;
            double most = 0, k = (double)p->k[key * p->d + i];
            for (int j = 0; j < QK; j++) most = fmax(most, fabs((double)block[j]));
            want += k * (double)q[i];
            allowed += fabs(k) * most * (0.51 / 32512 + 16 * U);
        }
        if (!(fabs((double)s[key] - want) <= allowed)) return 0;
    }
    return 1;
}

static int sums_near(const struct test_page *p, const float *weights, const float *o) {
    for (int i = 0; i < p->d; i++) {
        double want = 0, allowed = 0, most = 0;
        for (int key = 0; key < p->keys; key++) {
            double largest = 0;
            for (int j = i / QK * QK; j < (i / QK + 1) * QK; j++)
                largest = fmax(largest, fabs((double)p->v[key * p->d + j]));
            most = fmax(most, (double)weights[key] * largest / 127);
        }
        for (int key = 0; key < p->keys; key++) {
            want += (double)weights[key] * (double)p->v[key * p->d + i];
            allowed += 127 * most * (0.51 / 32767 + 16 * U);
        }
        if (!(fabs((double)o[i] - want) <= allowed)) return 0;
    }
    return 1;
}

/* Attention of many rows on a quantised page: as in plain C and as each row alone, bit for bit, and
   near to what it is in double. */
static void test_cache_rows(struct test *t) {
    struct test_page page;
    make_page(t, &page);
    int rows = 1 + below(t, 9), d = page.d, groups = d / QK, width = page.panels * PANEL, ok = 1;
    float *q = make_floats(t, rows * d), *p = make_space(t, rows * width);
    float *s = make_space(t, rows * width), *o = make_space(t, rows * d);
    float *want = make_space(t, rows * width), *want_o = make_space(t, rows * d);
    struct query_block *x = make(t, (size_t)(rows * groups) * sizeof *x),
                       *plain = make(t, (size_t)(rows * groups) * sizeof *plain);
    const float *at[16];
    t->k->attention.quantize_query(q, x, rows * d);
    quantize_query_plain(q, plain, rows * d);
    for (int r = 0; r < rows; r++) {
        at[r] = p + r * width;
        for (int i = 0; i < width; i++)
            p[r * width + i] = i < page.keys && below(t, 5) > 0 ? fabsf(uniform(t)) : 0;
    }
    t->k->attention.k8_scores(page.k8, groups, page.panels, x, rows, s, width);
    k8_scores_plain(page.k8, groups, page.panels, plain, rows, want, width);
    ok &= same_bits(s, want, rows * width);
    t->k->attention.v8_sums(page.v8, groups, page.panels, at, rows, page.k8, o, d);
    v8_sums_plain(page.v8, groups, page.panels, at, rows, page.k8, want_o, d);
    ok &= same_bits(o, want_o, rows * d);
    check(ok, "%d rows, %d keys of %d: scores or sums are not the plain ones", rows, page.keys, d);
    for (int r = ok = 0; r < rows; r++) {
        t->k->attention.k8_scores(page.k8, groups, page.panels, x + r * groups, 1, want, width);
        t->k->attention.v8_sums(page.v8, groups, page.panels, at + r, 1, page.k8, want_o, d);
        ok += same_bits(s + r * width, want, width) && same_bits(o + r * d, want_o, d);
    }
    check(ok == rows, "%d rows, %d keys of %d: not as each row alone", rows, page.keys, d);
    for (int r = ok = 0; r < rows; r++) ok += scores_near(&page, q + r * d, s + r * width);
    check(ok == rows, "%d rows, %d keys of %d: scores differ from double", rows, page.keys, d);
    for (int r = ok = 0; r < rows; r++) ok += sums_near(&page, at[r], o + r * d);
    check(ok == rows, "%d rows, %d keys of %d: sums differ from double", rows, page.keys, d);
    for (int r = 0; r < rows; r++) p[r * width + below(t, page.keys)] = nanf("");
    t->k->attention.v8_sums(page.v8, groups, page.panels, at, rows, page.k8, o, d);
    v8_sums_plain(page.v8, groups, page.panels, at, rows, page.k8, want_o, d);
    check(same_bits(o, want_o, rows * d), "a NaN among the probabilities does not count as 0");
    release(t, "attention on a quantised page");
}

static void test_to_q8_0(struct test *t) {
    int blocks = 1 + below(t, 9);
    float *x = make_floats(t, blocks * QK), size = ldexpf(1, below(t, 60) - 40);
    struct q8_0 *got = make(t, (size_t)blocks * sizeof *got),
                *want = make(t, (size_t)blocks * sizeof *want);
    for (int i = 0; i < blocks * QK; i++) x[i] *= size;
    if (below(t, 4) == 0) /* halves, which must go away from zero */
        for (int i = 0; i < blocks * QK; i++)
            x[i] = i % QK == 0 ? 127 : (float)(below(t, 509) - 254) / 2;
    if (below(t, 4) == 0) x[below(t, blocks * QK)] = below(t, 2) ? NAN : -HUGE_VALF;
    if (below(t, 4) == 0) memset(x, 0, QK * sizeof *x);
    t->k->attention.to_q8_0(x, got, blocks * QK);
    quantize_q8_0(x, want, blocks * QK);
    check(memcmp(got, want, (size_t)blocks * sizeof *got) == 0,
          "to_q8_0 of %d blocks is not quantize_q8_0", blocks);
    release(t, "to_q8_0");
}

/* ---- Norms, softmax, SiLU ---- */

/* The sum of squares has k/8 + 6 roundings, all terms positive; the root halves them; division,
   root, reciprocal, eps and two products add six at most. */
static void test_rmsnorm(struct test *t) {
    int n = 1 + below(t, 300), ok = 1;
    const float *x = make_floats(t, n), *weight = make_floats(t, n), eps = 1e-6f;
    float *y = make_space(t, n);
    double square, magnitude;
    t->k->elementwise.rmsnorm(x, weight, eps, n, y);
    square = dot_double(n, x, x, 1, &magnitude);
    double scale = 1 / sqrt(square / n + (double)eps);
    for (int i = 0; i < n; i++) {
        double want = weight[i] * (x[i] * scale);
        ok &= within(t, "rmsnorm", y[i], want, fabs(want), (n / 8 + 6) / 2 + 6, 0);
    }
    check(ok, "rmsnorm of %d differs", n);
    release(t, "rmsnorm");
}

/* exp_f32 is right to 3 ulp, each at most 2 u: 6 u; below e^-87 it gives 0. The argument is
   computed in float here too, so that its rounding does not count. The sum: n/8 + 4 roundings of
   positive terms. */
/* Where e^x is 0, it is 0 and no more: far below the largest, and infinitely far. */
static void test_softmax(struct test *t) {
    static const float far[] = {-3000, -1e30f, -HUGE_VALF};
    int n = PANEL * (1 + below(t, 16)), valid = 1 + below(t, n), ok = 1, zeros = 1;
    float size = ldexpf(1, below(t, 14) - 3), scale = 0.03f + fabsf(uniform(t)), max = -HUGE_VALF;
    float *s = make_space(t, n), *x = make_space(t, n), got_max = 0;
    double total = 0;
    for (int i = 0; i < valid; i++) {
        s[i] = x[i] = i > 0 && below(t, 16) == 0 ? far[below(t, 3)] : uniform(t) * size;
        max = x[i] * scale > max ? x[i] * scale : max;
    }
    for (int i = valid; i < n; i++) s[i] = below(t, 2) ? HUGE_VALF : nanf("");
    float sum = t->k->attention.softmax(s, n, valid, scale, &got_max);
    for (int i = 0; i < valid; i++) {
        float argument = x[i] * scale - max;
        double want = exp((double)argument);
        ok &= s[i] >= 0 && s[i] <= 1 && within(t, "softmax", s[i], want, want, 6, 2e-38);
        ok &= argument > -87 || s[i] == 0;
        total += s[i];
    }
    for (int i = valid; i < n; i++) zeros &= f32_to_bits(s[i]) == 0;
    check(ok, "softmax of %d of %d differs", valid, n);
    check(zeros, "softmax leaves something in the masked tail");
    check(got_max == max, "softmax gives another maximum");
    check(within(t, "softmax sum", sum, total, total, n / 8 + 4, 0), "the sum of softmax differs");
    release(t, "softmax");
}

/* x / (1 + e^-x): 6 u of exp, three roundings. exp_f32 stops at e^88, so silu(-1000) is
   -1000 / e^88 instead of 0: below 1e-34 nothing counts. */
static double silu_double(double x) { return x / (1 + exp(-x)); }
enum { SILU_U = 10, CONV_U = 40 };
static const double SILU_FLOOR = 1e-34;

static void test_silu_mul(struct test *t) {
    int n = 1 + below(t, 300), ok = 1;
    float size = ldexpf(1, below(t, 12) - 3);
    float *gate = make_space(t, n), *x = make_space(t, n);
    const float *up = make_floats(t, n);
    for (int i = 0; i < n; i++) gate[i] = x[i] = uniform(t) * size;
    t->k->elementwise.silu_mul(gate, up, n);
    for (int i = 0; i < n; i++) {
        double want = silu_double(x[i]) * up[i];
        ok &= within(t, "silu_mul", gate[i], want, fabs(want), SILU_U + 1, SILU_FLOOR);
    }
    check(ok, "silu_mul of %d differs", n);
    release(t, "silu_mul");
}

/* v = x scale + shift is off by 2 u of the larger of its parts, and SiLU's slope is at most 1.1. */
static void test_norm_rows(struct test *t) {
    int c = 32 * (1 + below(t, 4)), pixels = 1 + below(t, 9), use_silu = below(t, 2), ok = 1;
    const float *x = make_floats(t, pixels * c), *scale = make_floats(t, c),
                *shift = make_floats(t, c);
    float *y = make_space(t, pixels * c);
    t->k->conv.scale_shift(x, scale, shift, use_silu, pixels, c, y);
    for (int i = 0; i < pixels * c; i++) {
        double product = (double)x[i] * scale[i % c], v = product + shift[i % c];
        double want = use_silu ? silu_double(v) : v, parts = fabs(product) + fabsf(shift[i % c]);
        double magnitude = parts + fabs(want);
        ok &= within(t, "scale_shift", y[i], want, magnitude, use_silu ? SILU_U : 2, SILU_FLOOR);
    }
    check(ok, "scale_shift of %d x %d differs", pixels, c);
    release(t, "scale_shift");
}

static void test_channel_sums(struct test *t) {
    int c = 32 * (1 + below(t, 4)), pixels = 1 + below(t, 64), ok = 1;
    const float *x = make_floats(t, pixels * c);
    float *sum = make_space(t, c), *square = make_space(t, c);
    t->k->conv.channel_sums(x, pixels, c, sum, square);
    for (int i = 0; i < c; i++) {
        double s = 0, m = 0, q = 0;
        for (int p = 0; p < pixels; p++) {
            double v = x[p * c + i];
            s += v, m += fabs(v), q += v * v;
        }
        ok &= within(t, "channel_sums", sum[i], s, m, pixels, 0);
        ok &= within(t, "channel_sums", square[i], q, q, pixels + 1, 0);
    }
    check(ok, "channel_sums of %d x %d differs", pixels, c);
    release(t, "channel_sums");
}

/* ---- Winograd's transforms ---- */

/* For the points 0, +-5/8, +-3/2 and infinity. */
static const double matrix_bt[6][6] = {
    {225 / 256., 0, -169 / 64., 0, 1, 0},       {0, -45 / 32., -9 / 4., 5 / 8., 1, 0},
    {0, 45 / 32., -9 / 4., -5 / 8., 1, 0},      {0, -75 / 128., -25 / 64., 3 / 2., 1, 0},
    {0, 75 / 128., -25 / 64., -3 / 2., 1, 0}, {0, 225 / 256., 0, -169 / 64., 0, 1}};
static const double matrix_g[6][3] = {{256 / 225., 0, 0},
                                      {-2048 / 2975., -256 / 595., -32 / 119.},
                                      {-2048 / 2975., 256 / 595., -32 / 119.},
                                      {128 / 1071., 64 / 357., 32 / 119.},
                                      {128 / 1071., -64 / 357., 32 / 119.},
                                      {0, 0, 1}};
static const double matrix_at[4][6] = {
    {1, 1, 1, 1, 1, 0},
    {0, 5 / 8., -5 / 8., 3 / 2., -3 / 2., 0},
    {0, 25 / 64., 25 / 64., 9 / 4., 9 / 4., 0},
    {0, 125 / 512., -125 / 512., 27 / 8., -27 / 8., 1}};

/* Element (y, x) of L d L^T, L having n columns; d(i, j) is element i * n + j of values. */
static double both_sides(const double *left, const double *right, int n, const double *values,
                         double *magnitude) {
    double sum = 0;
    *magnitude = 0;
    for (int i = 0; i < n; i++)
        for (int j = 0; j < n; j++) {
            double p = left[i] * values[i * n + j] * right[j];
            sum += p;
            *magnitude += fabs(p);
        }
    return sum;
}

enum { WINO_ROUNDINGS = 16 }; /* of a sum of at most 36 products, in two passes */

static void test_winograd_filter(struct test *t) {
    int n = 8 * (1 + below(t, 9)), tap = n + below(t, 20), ok = 1;
    const float *w = make_rows(t, 9, n, tap);
    float *u = make_space(t, 35 * tap + n), *plain = make_space(t, 35 * tap + n);
    t->k->conv.winograd_filter(w, n, tap, u);
    kernels_plain.conv.winograd_filter(w, n, tap, plain);
    for (int i = 0; i < 36 * n; i++) {
        double g[9], magnitude, want;
        for (int p = 0; p < 9; p++) g[p] = w[p * tap + i % n];
        want = both_sides(matrix_g[i / n / 6], matrix_g[i / n % 6], 3, g, &magnitude);
        ok &= within(t, "winograd_filter", u[i / n * tap + i % n], want, magnitude, WINO_ROUNDINGS,
                     0);
    }
    check(ok, "winograd_filter of %d differs from G g G^T", n);
    check(memcmp(u, plain, (size_t)(35 * tap + n) * sizeof *u) == 0,
          "winograd_filter is not plain C's bit for bit");
    check(gap_untouched(u, tap, 36, n), "winograd_filter wrote between its elements");
    release(t, "winograd_filter");
}

static void test_winograd_input(struct test *t) {
    int c = 8 * (1 + below(t, 9)), line = 6 * c + below(t, 40), tap = c + below(t, 20), ok = 1;
    const float *patch = make_rows(t, 6, 6 * c, line);
    float *v = make_space(t, 35 * tap + c), *plain = make_space(t, 35 * tap + c);
    t->k->conv.winograd_input(patch, line, c, v, tap);
    kernels_plain.conv.winograd_input(patch, line, c, plain, tap);
    for (int p = 0; p < 36; p++)
        for (int i = 0; i < c; i++) {
            double d[36], magnitude, want;
            for (int q = 0; q < 36; q++) d[q] = patch[q / 6 * line + q % 6 * c + i];
            want = both_sides(matrix_bt[p / 6], matrix_bt[p % 6], 6, d, &magnitude);
            ok &= within(t, "winograd_input", v[p * tap + i], want, magnitude, WINO_ROUNDINGS, 0);
        }
    check(ok, "winograd_input of %d channels differs from B^T d B", c);
    check(memcmp(v, plain, (size_t)(35 * tap + c) * sizeof *v) == 0,
          "winograd_input is not plain C's bit for bit");
    check(gap_untouched(v, tap, 36, c), "winograd_input wrote between its elements");
    release(t, "winograd_input");
}

static void test_winograd_output(struct test *t) {
    int tap = PANEL + below(t, 20), ld = PANEL + below(t, 9), with = below(t, 2), ok = 1;
    const float *m = make_rows(t, 36, PANEL, tap), *bias = make_floats(t, PANEL);
    const float *old = make_rows(t, 16, PANEL, ld), *residual[16];
    float *y = make_space(t, 15 * ld + PANEL), *plain = make_space(t, 15 * ld + PANEL), *out[16],
          *out_plain[16];
    for (int p = 0; p < 16; p++)
        residual[p] = old + p * ld, out[p] = y + p * ld, out_plain[p] = plain + p * ld;
    t->k->conv.winograd_output(m, tap, bias, with ? residual : NULL, out);
    kernels_plain.conv.winograd_output(m, tap, bias, with ? residual : NULL, out_plain);
    for (int p = 0; p < 16; p++)
        for (int j = 0; j < PANEL; j++) {
            double d[36], magnitude, want;
            for (int q = 0; q < 36; q++) d[q] = m[q * tap + j];
            want = both_sides(matrix_at[p / 4], matrix_at[p % 4], 6, d, &magnitude) + bias[j];
            magnitude += fabsf(bias[j]);
            if (with) want += residual[p][j], magnitude += fabsf(residual[p][j]);
            ok &= within(t, "winograd_output", out[p][j], want, magnitude, WINO_ROUNDINGS, 0);
        }
    check(ok, "winograd_output differs from A^T M A");
    check(memcmp(y, plain, (size_t)(15 * ld + PANEL) * sizeof *y) == 0,
          "winograd_output is not plain C's bit for bit");
    check(gap_untouched(y, ld, 16, PANEL), "winograd_output wrote between its pixels");
    if (with) { /* a layer's output takes its residual's place */
        memcpy(y, old, (size_t)(15 * ld + PANEL) * sizeof *y);
        for (int p = 0; p < 16; p++) residual[p] = out[p];
        t->k->conv.winograd_output(m, tap, bias, residual, out);
        check(memcmp(y, plain, (size_t)(15 * ld + PANEL) * sizeof *y) == 0,
              "winograd_output in place of its residual gives something else");
    }
    release(t, "winograd_output");
}

static void test_pack_strip(struct test *t) {
    int k = 1 + below(t, 70), ld = k + below(t, 5), ok = 1;
    const float *rows = make_rows(t, PANEL, k, ld);
    float *panel = make_space(t, k * PANEL);
    t->k->conv.pack_panel(rows, ld, k, panel);
    for (int i = 0; i < k * PANEL; i++) ok &= panel[i] == rows[i % PANEL * ld + i / PANEL];
    check(ok, "pack_panel of %d: an element is not where it belongs", k);
    release(t, "pack_panel");
}

/* ---- AVX2 and NEON ---- */

static uint64_t digest(uint64_t h, const void *p, size_t bytes) {
    for (const uint8_t *b = p; bytes > 0; b++, bytes--) h = (h ^ *b) * 0x100000001b3u;
    return h;
}

/* SiLU and softmax have one order of roundings in all fast versions, AVX-512's too. */
static void test_same_elements(struct test *t) {
    enum { K = 203, C = 96, N = 2000 };
    if (t->k == &kernels_plain) return;
    start_round(t, 0);
    float *x = make_space(t, N), *y = make_space(t, N);
    for (int i = 0; i < N; i++) x[i] = y[i] = uniform(t) * 20;
    y[400] = t->k->attention.softmax(y + 512, 208, K, 0.3f, y + 401);
    t->k->elementwise.silu_mul(y, x + K, K);
    t->k->conv.scale_shift(x, x + 1000, x + 1100, 1, 9, C, y + 1000);
    uint64_t h = digest(0xcbf29ce484222325u, y, N * sizeof *y);
    check(h == 0x63e0395debeb9c0bu, "the digest of SiLU and softmax is %016llx",
          (unsigned long long)h);
    release(t, "SiLU");
}

/* Both keep the same order of the same roundings, so the outputs of either are these, on every
   machine. (Integer products are compared with plain C above.) */
static void test_same_everywhere(struct test *t) {
    enum { K = 203, C = 96, N = 10000 };
    if (strcmp(t->k->name, "avx2") != 0 && strncmp(t->k->name, "neon", 4) != 0) return;
    start_round(t, 0);
    float *x = make_space(t, N), *y = make_space(t, N), tail[2];
    for (int i = 0; i < N; i++) x[i] = uniform(t) * 4;
    memset(y, 0, N * sizeof *y);
    t->k->matmul.dot_row(K, x, x + K, K + 1, 7, y);
    t->k->matmul.outer_row(K, x, x + K, K * PANEL, 2, y + 7, 0);
    t->k->elementwise.rmsnorm(x, x + K, 1e-6f, K, y + 100);
    memcpy(y + 400, x, 208 * sizeof *y);
    tail[0] = t->k->attention.softmax(y + 400, 208, K, 0.3f, &tail[1]);
    memcpy(y + 700, x, K * sizeof *y);
    t->k->elementwise.silu_mul(y + 700, x + K, K);
    t->k->conv.scale_shift(x, x + 1000, x + 2000, 1, 9, C, y + 1000);
    t->k->conv.channel_sums(x, 9, C, y + 2000, y + 2000 + C);
    uint64_t h = digest(digest(0xcbf29ce484222325u, y, N * sizeof *y), tail, sizeof tail);
    check(h == 0xffb9bd7f9a860f9cu, "AVX2 and NEON no longer agree: digest %016llx",
          (unsigned long long)h);
    release(t, "one of all kernels");
}

/* ---- Drivers ---- */

struct matrix {
    struct tensor w;
    uint8_t *data;
    float *bias;
};

static struct matrix make_matrix(struct test *t, int type, int rows, int cols) {
    struct matrix m = {{NULL, type_bytes(type, cols), type, rows, cols}, NULL, NULL};
    float *row = must(malloc((size_t)cols * sizeof *row));
    m.data = must(malloc((size_t)m.w.row_bytes * (size_t)rows));
    m.bias = must(malloc((size_t)rows * sizeof *m.bias));
    m.w.data = m.data;
    for (int r = 0; r < rows; r++) {
        for (int i = 0; i < cols; i++) row[i] = uniform(t);
        row_from_f32(type, row, m.data + r * m.w.row_bytes, cols);
        m.bias[r] = uniform(t);
    }
    free(row);
    return m;
}

static struct exec make_exec(struct test *t, int threads, const struct tensor *w, int rows,
                             int exact) {
    struct exec e = {.kern = t->k, .exact = exact};
    e.pool = must(pool_new(threads, NULL));
    e.scratch_floats = matmul_scratch(t->k, w->cols);
    e.scratch = must(malloc((size_t)(threads * e.scratch_floats) * sizeof *e.scratch));
    e.act = must(malloc((size_t)(rows * (w->cols / QK) + 1) * sizeof *e.act));
    return e;
}

static void free_exec(struct exec *e) {
    pool_free(e->pool);
    free(e->scratch);
    free(e->act);
}

/* Against double: with integer products an activation is off by at most d/2 = max |x| / 254, and
   |w| <= 1; with floats see test_dot_row, and one rounding for the bias. */
static int matmul_near(struct test *t, const struct matrix *m, const float *bias, const float *x,
                       const float *y, int integer) {
    int k = m->w.cols, ok = 1;
    float *row = must(malloc((size_t)k * sizeof *row));
    for (int j = 0; j < m->w.rows; j++) {
        double magnitude, sum;
        row_to_f32(m->w.type, m->data + j * m->w.row_bytes, row, k);
        sum = dot_double(k, x, row, 1, &magnitude);
        if (bias != NULL) sum += bias[j], magnitude += fabsf(bias[j]);
        if (integer) ok &= fabs(y[j] - sum) <= k * 1.01 / 254 + 1e-4;
        else ok &= within(t, "matmul", y[j], sum, magnitude, k / 8 + 7, 0);
    }
    free(row);
    return ok;
}

/* All counts of rows and threads against each row alone. */
static void test_matmul(struct test *t, int type, int rows_of_w, int cols, int exact,
                        int with_bias) {
    enum { MOST = 17 };
    struct matrix m = make_matrix(t, type, rows_of_w, cols);
    const float *bias = with_bias ? m.bias : NULL;
    float *x = must(malloc((size_t)(MOST * cols) * sizeof *x));
    float *alone = must(malloc((size_t)(MOST * rows_of_w) * sizeof *alone));
    int near = 1, integer = type_is_quantised(type) && !exact;
    for (int i = 0; i < MOST * cols; i++) x[i] = uniform(t);
    for (int threads = 1; threads <= 3; threads++) {
        struct exec e = make_exec(t, threads, &m.w, MOST, exact);
        for (int r = 0; r < MOST && threads == 1; r++) {
            matmul(&e, &m.w, bias, x + r * cols, 1, alone + r * rows_of_w);
            near &= matmul_near(t, &m, bias, x + r * cols, alone + r * rows_of_w, integer);
        }
        for (int rows = 1; rows <= MOST; rows++) {
            float *y = must(malloc((size_t)(rows * rows_of_w) * sizeof *y));
            matmul(&e, &m.w, bias, x, rows, y);
            check(same_bits(y, alone, rows * rows_of_w),
                  "matmul, %s, %d x %d, %d rows, %d threads, exact %d: not as each row alone",
                  type_info(type)->name, rows_of_w, cols, rows, threads, exact);
            free(y);
        }
        free_exec(&e);
    }
    check(near, "matmul, %s, %d x %d, exact %d: differs from the sum in double",
          type_info(type)->name, rows_of_w, cols, exact);
    free(x), free(alone), free(m.data), free(m.bias);
}

/* Three matmuls at once, of different types and sizes, against each alone. */
static void test_matmul_all(struct test *t) {
    enum { COLS = 96, ROWS_OF_X = 9 };
    int types[] = {LVM_Q8_0, LVM_F16, LVM_Q4_0}, sizes[] = {70, 37, 100};
    struct matrix m[3];
    struct matmul_output outputs[3];
    float x[ROWS_OF_X * COLS], y[3][ROWS_OF_X * 100], alone[ROWS_OF_X * 100];
    for (int i = 0; i < ROWS_OF_X * COLS; i++) x[i] = uniform(t);
    for (int i = 0; i < 3; i++) {
        m[i] = make_matrix(t, types[i], sizes[i], COLS);
        outputs[i] = (struct matmul_output){&m[i].w, i == 1 ? NULL : m[i].bias, y[i]};
    }
    for (int rows = 1; rows <= ROWS_OF_X; rows++)
        for (int threads = 1; threads <= 3; threads++) {
            struct exec e = make_exec(t, threads, &m[0].w, ROWS_OF_X, 0);
            matmul_all(&e, outputs, 3, x, rows);
            for (int i = 0; i < 3; i++) {
                matmul(&e, &m[i].w, outputs[i].bias, x, rows, alone);
                check(same_bits(y[i], alone, rows * sizes[i]),
                      "matmul_all, output %d, %d rows, %d threads: not as alone", i, rows,
                      threads);
            }
            free_exec(&e);
        }
    for (int i = 0; i < 3; i++) free(m[i].data), free(m[i].bias);
}

/* Products that underflow to -0 must do so in a row alone and among many. */
static void test_matmul_zero(struct test *t) {
    struct matrix m = make_matrix(t, LVM_F32, 5, 8);
    float x[2 * 8], y[2 * 5], alone[5];
    for (int i = 0; i < 5 * 8; i++) ((float *)(void *)m.data)[i] = 1e-30f;
    for (int i = 0; i < 2 * 8; i++) x[i] = -1e-30f;
    struct exec e = make_exec(t, 1, &m.w, 2, 0);
    matmul(&e, &m.w, NULL, x, 1, alone);
    matmul(&e, &m.w, NULL, x, 2, y);
    check(same_bits(y, alone, 5) && same_bits(y + 5, alone, 5),
          "matmul without bias: the sign of a zero depends on the number of rows");
    free_exec(&e);
    free(m.data), free(m.bias);
}

static void test_matmuls(struct test *t) {
    start_round(t, ROUNDS);
    for (int i = 0; i < N_TYPES; i++)
        for (int exact = 0; exact < 2; exact++)
            for (int bias = 0; bias < 2; bias++) {
                int type = type_table[i].type;
                test_matmul(t, type, 37, 96, exact, bias);
                test_matmul(t, type, 16, 160, exact, bias);
                if (!type_is_quantised(type)) test_matmul(t, type, 70, 43, exact, bias);
                if (bias && t->rounds == ROUNDS) test_matmul(t, type, 29, 4128, exact, bias);
            }
    test_matmul_zero(t);
    test_matmul_all(t);
}

static void test_matmul_panels(struct test *t) {
    for (int rows = 1; rows <= 50; rows++) {
        start_round(t, rows);
        int k = 1 + below(t, 60), panels = 1 + below(t, 6), accumulate = rows % 2, ok = 1;
        int ldc = panels * PANEL + below(t, 4), width = panels * PANEL;
        int64_t ldp = k * PANEL + below(t, 4);
        const float *a = make_rows(t, rows, k, k + 1), *b = make_rows(t, panels, k * PANEL, ldp);
        const float *pa[50];
        float *c = make_rows(t, rows, width, ldc), alone[6 * PANEL];
        float *before = make_space(t, (rows - 1) * ldc + width);
        memcpy(before, c, (size_t)((rows - 1) * ldc + width) * sizeof *c);
        for (int r = 0; r < rows; r++) pa[r] = a + r * (k + 1);
        matmul_panels(t->k, rows, k, pa, b, ldp, panels, c, ldc, accumulate);
        for (int r = 0; r < rows; r++) {
            memcpy(alone, before + r * ldc, (size_t)width * sizeof *alone);
            t->k->matmul.outer_row(k, pa[r], b, ldp, panels, alone, accumulate);
            ok &= same_bits(alone, c + r * ldc, width);
        }
        check(ok, "matmul_panels of %d rows: not as each row alone", rows);
        check(gap_untouched(c, ldc, rows, width), "matmul_panels wrote between its rows");
        release(t, "matmul_panels");
    }
}

/* ---- Convolutions ---- */

struct shape {
    int c_in, c_out, size, side, stride, up, normed, residual;
};

/* What a pixel outside is to the sum, inside its value after normalisation. */
static double input_double(const struct vq_state *vs, const struct shape *s, const float *in, int y,
                           int x, int i) {
    if (y < 0 || x < 0 || y >= s->side << s->up || x >= s->side << s->up) return 0;
    double v = in[((y >> s->up) * s->side + (x >> s->up)) * s->c_in + i];
    return s->normed ? silu_double(v * vs->scale[i] + vs->shift[i]) : v;
}

/* One output in double; inputs and weights lie within one, so errors are relative to the number of
   products. */
static double conv_double(const struct vq_state *vs, const struct shape *s, const float *in,
                          const float *w, int y, int x, int o) {
    double sum = 0;
    int pad = s->stride == 2 ? 0 : s->size / 2;
    for (int t = 0; t < s->size * s->size; t++)
        for (int i = 0; i < s->c_in; i++)
            sum += input_double(vs, s, in, y * s->stride + t / s->size - pad,
                                x * s->stride + t % s->size - pad, i) *
                   w[(o * s->size * s->size + t) * s->c_in + i];
    return sum;
}

static float *unit_floats(struct test *t, int64_t n) {
    float *x = make_space(t, n);
    for (int64_t i = 0; i < n; i++) x[i] = uniform(t);
    return x;
}

/* Convolutions by every way, against sums in double, with any number of threads the same; the plain
   definition and packed panels of plain C give the same bits. */
static void test_conv(struct test *t, struct shape s) {
    int cols = s.size * s.size * s.c_in, ok = 1, side = (s.side << s.up) / s.stride,
        pad = s.stride == 2 ? 0 : s.size / 2, outputs = side * side * s.c_out;
    const float *in = unit_floats(t, s.side * s.side * s.c_in),
                *weights = unit_floats(t, s.c_out * cols), *bias = unit_floats(t, s.c_out),
                *old = unit_floats(t, outputs);
    float *out = make_space(t, outputs), *first = make_space(t, outputs);
    struct vq_state vs = {.scale = unit_floats(t, s.c_in), .shift = unit_floats(t, s.c_in)};
    struct conv conv = {.size = s.size};
    struct conv_geometry g = {s.side, side, s.stride, s.up, pad};
    struct kernels tiled = *t->k;
    int most = s.c_in > s.c_out ? s.c_in : s.c_out;
    tiled.conv.tiled = 1;
    conv.w = (struct tensor){(const uint8_t *)weights, cols * 4, LVM_F32, s.c_out, cols};
    conv.bias = (struct tensor){(const uint8_t *)bias, 4, LVM_F32, s.c_out, 1};
    vs.packed = must(malloc((size_t)conv2d_packed(most) * sizeof(float)));
    vs.zeros = must(calloc((size_t)s.c_in, sizeof(float)));
    for (int run = 0; run < 4; run++) {
        int threads = run % 3 + 1;
        struct exec e = make_exec(t, threads, &conv.w, 1, 0);
        free(e.scratch);
        e.scratch_floats = conv2d_scratch(most);
        e.scratch = must(malloc((size_t)(threads * e.scratch_floats) * sizeof(float)));
        if (run == 3) e.kern = &tiled;
        memcpy(out, old, (size_t)outputs * sizeof *out);
        conv2d(&e, &vs, &conv, g, s.normed, in, s.residual ? out : NULL, out);
        if (run == 0) memcpy(first, out, (size_t)outputs * sizeof *out);
        check(same_bits(first, out, outputs), run < 3 ? "a convolution depends on the threads"
                                                 : "the plain convolution is not the panels'");
        free_exec(&e);
    }
    for (int n = 0; n < 200; n++) {
        int p = below(t, side * side), o = below(t, s.c_out);
        double want = conv_double(&vs, &s, in, weights, p / side, p % side, o) + bias[o];
        if (s.residual) want += old[p * s.c_out + o];
        ok &= within(t, "conv", out[p * s.c_out + o], want, sqrt(cols + 2.0), CONV_U, 0);
    }
    check(ok, "convolution %d x %d to %d, size %d, stride %d, up %d, normed %d: differs", s.side,
          s.c_in, s.c_out, s.size, s.stride, s.up, s.normed);
    free(vs.packed), free(vs.zeros);
    release(t, "conv2d");
}

static void test_convs(struct test *t) {
    static const struct shape shapes[] = {
        {3, 32, 3, 13, 1, 0, 0, 0},   {32, 5, 1, 9, 1, 0, 0, 1},    {32, 48, 1, 11, 1, 0, 0, 0},
        {32, 40, 3, 14, 2, 0, 0, 0},  {12, 16, 3, 6, 1, 0, 0, 1},   {32, 32, 3, 16, 1, 0, 1, 1},
        {64, 3, 3, 17, 1, 0, 1, 0},   {32, 48, 3, 41, 1, 0, 1, 1},  {8, 16, 3, 43, 1, 0, 0, 0},
        {64, 64, 3, 10, 1, 1, 0, 0},  {32, 16, 3, 19, 1, 1, 0, 0},  {288, 272, 3, 35, 1, 0, 1, 1},
        {256, 40, 3, 36, 1, 0, 1, 0}, {1, 1, 3, 1, 1, 0, 0, 0},     {32, 1, 3, 2, 1, 0, 1, 0},
        {32, 16, 3, 1, 1, 0, 1, 0},   {64, 96, 3, 64, 2, 0, 0, 0},  {12, 8, 3, 7, 1, 1, 0, 0}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        start_round(t, (int)i);
        test_conv(t, shapes[i]);
    }
}

/* softmax(q K^T scale) V of one row in double, from the packed forms. */
static void attend_double(int keys, int d, const float *q, const float *k, const float *v,
                          double scale, double *o) {
    double s[KV_BLOCK], max = -HUGE_VAL, sum = 0;
    for (int key = 0; key < keys; key++) {
        s[key] = 0;
        for (int i = 0; i < d; i++)
            s[key] += (double)q[i] * k[(key / PANEL * d + i) * PANEL + key % PANEL] * scale;
        max = s[key] > max ? s[key] : max;
    }
    for (int i = 0; i < d; i++) o[i] = 0;
    for (int key = 0; key < keys; key++) {
        double p = exp(s[key] - max);
        sum += p;
        for (int i = 0; i < d; i++) o[i] += p * v[(i / PANEL * KV_BLOCK + key) * PANEL + i % PANEL];
    }
    for (int i = 0; i < d; i++) o[i] /= sum;
}

/* A block of keys seen by many rows of different reach: each row as alone, and as in double. Values
   are below 1, scores below d scale: 1e-5 is generous for either. */
static void test_attend(struct test *t) {
    int d = 32 * (1 + below(t, 3)), n = 1 + below(t, QUERY_ROWS), ok = 1, near = 1;
    float scale = 1 / sqrtf((float)d), *q = make_space(t, n * d), *o = make_space(t, 2 * n * d);
    float *k = make_space(t, KV_BLOCK * d), *v = make_space(t, KV_BLOCK * d);
    float *scratch = make_space(t, attend_scratch(d));
    struct query row[QUERY_ROWS], one;
    for (int i = 0; i < n * d; i++) q[i] = uniform(t);
    for (int i = 0; i < KV_BLOCK * d; i++) k[i] = uniform(t), v[i] = uniform(t);
    for (int i = 0; i < 2 * n * d; i++) o[i] = 0;
    for (int r = 0; r < n; r++)
        row[r] = (struct query){q + r * d, o + r * d, -HUGE_VALF, 0, 1 + below(t, KV_BLOCK), NULL};
    attend_block(t->k, row, n, d, k, v, scale, scratch);
    for (int r = 0; r < n; r++) {
        double want[96];
        one = (struct query){q + r * d, o + (n + r) * d, -HUGE_VALF, 0, row[r].keys, NULL};
        attend_block(t->k, &one, 1, d, k, v, scale, scratch);
        ok &= same_bits(row[r].o, one.o, d) && same_bits(&row[r].l, &one.l, 1);
        attend_double(row[r].keys, d, row[r].q, k, v, (double)scale, want);
        for (int i = 0; i < d; i++) near &= fabs((double)row[r].o[i] / row[r].l - want[i]) <= 1e-5;
    }
    check(ok, "attend_block of %d rows: not as each row alone", n);
    check(near, "attend_block of %d rows differs from attention in double", n);
    release(t, "attend_block");
}

/* ---- Chapter 2: numbers ---- */

/* Distance of a float from a real value, in ulps of the float format at that value. */
static double ulps_f32(float got, double want) {
    int e;
    frexp(want, &e);
    return fabs(got - want) / ldexp(1, (e < -125 ? -125 : e) - 24);
}

static double ulps_f64(double got, long double want) {
    int e;
    frexpl(want, &e);
    return (double)(fabsl(got - want) / ldexpl(1, (e < -1021 ? -1021 : e) - 53));
}

/* p = (2^-12 + 2^-30)(2^-12 - 2^-30) is a little less than half a last bit of 1: rounding twice
   makes it the half. The other lines are what the instruction gives at the format's ends. */
static void test_fma_f32(void) {
    float a = 0x1p-12f + 0x1p-30f, b = 0x1p-12f - 0x1p-30f, odd = 1 + 0x1p-23f;
    check(fma_f32(a, b, odd) == odd, "fma: a little less than half a bit was added");
    check(fma_f32(-a, b, odd) == odd, "fma: a little less than half a bit was taken");
    check(fma_f32(a, b, -odd) == -odd && fma_f32(a, -b, -odd) == -odd, "fma: of negative c");
    check(fma_f32(3, 5, -15) == 0 && fma_f32(-1, 4, 0) == -4, "fma: exact sums");
    check(fma_f32(0x1p-100f, 0x1p-49f, 0) == 0x1p-149f, "fma: the least float");
    check(fma_f32(0x1p100f, 0x1p100f, 1) == HUGE_VALF, "fma: overflow is infinite");
    check(fma_f32(HUGE_VALF, -1, 1) == -HUGE_VALF, "fma: infinite stays so");
    check(isnan(fma_f32(HUGE_VALF, 0, 1)) && isnan(fma_f32(1, 1, NAN)), "fma: NaN");
}

/* Taylor's first neglected term, r^7/5040 at r = ln 2 / 2, costs 2 ulp; roundings one. */
static void test_exp_f32(struct test *t) {
    double worst = 0;
    for (uint32_t u = 0; u < 0x42b00000; u += 331) { /* 0 .. 88, all exponents */
        float x = bits_to_f32(u);
        double up = ulps_f32(exp_f32(x), exp((double)x));
        double down = x < 87 ? ulps_f32(exp_f32(-x), exp(-(double)x)) : 0;
        worst = up > worst ? up : worst;
        worst = down > worst ? down : worst;
    }
    note(t, "exp_f32", worst, 3);
    check(worst <= 3, "exp_f32 is off by %g ulp", worst);
    check(exp_f32(0) == 1 && exp_f32(-0.0f) == 1, "exp_f32(0) is not 1");
    check(exp_f32(-87) == 0 && exp_f32(-1e30f) == 0 && exp_f32(-HUGE_VALF) == 0,
          "exp_f32 of very negative numbers is not 0");
    check(exp_f32(1000) == exp_f32(88) && exp_f32(HUGE_VALF) == exp_f32(88) && isnan(exp_f32(NAN)),
          "exp_f32 beyond 88");
}

static void test_exp_log_f64(struct test *t) {
    double worst_exp = 0, worst_log = 0;
    for (int i = 0; i < 400000; i++) {
        double x = (double)uniform(t) * (i % 3 == 0 ? 1 : i % 3 == 1 ? 30 : 699), error;
        double y = ldexp(1 + fabs((double)uniform(t)),
                         below(t, i % 2 ? 3 : 2000) - (i % 2 ? 1 : 1000));
        error = ulps_f64(exp_f64(x), expl((long double)x));
        worst_exp = error > worst_exp ? error : worst_exp;
        /* near 1 the logarithm cancels: errors there count in ulps of 1 */
        error = fabs(log(y)) > 0.25 ? ulps_f64(log_f64(y), logl((long double)y))
                                    : (double)fabsl(log_f64(y) - logl((long double)y)) * 0x1p53;
        worst_log = error > worst_log ? error : worst_log;
    }
    note(t, "exp_f64", worst_exp, 3);
    note(t, "log_f64", worst_log, 4);
    check(worst_exp <= 3, "exp_f64 is off by %g ulp", worst_exp);
    check(worst_log <= 4, "log_f64 is off by %g ulp", worst_log);
    check(log_f64(1) == 0 && log_f64(0) == -HUGE_VAL && isnan(log_f64(-1)) && isnan(log_f64(NAN)),
          "log_f64 at its edges");
    check(exp_f64(0) == 1 && exp_f64(-1e9) == 0 && isnan(exp_f64(NAN)), "exp_f64 at its edges");
}

/* Angles as RoPE makes them, floats up to 1e6. pi/2 is known to 86 bits here: n times 2e-21 is
   left, besides two ulps of 1. */
static void test_sincos(struct test *t) {
    double worst = 0;
    for (int i = 0; i < 400000; i++) {
        double range = i % 4 == 0 ? 1 : i % 4 == 1 ? 100 : i % 4 == 2 ? 4096 : 1e6, s, c;
        double x = (double)(float)(fabs((double)uniform(t)) * range);
        sincos_f64(x, &s, &c);
        double allowed = 2 * 0x1p-53 + x * 3e-21;
        double error = (double)fmaxl(fabsl(s - sinl((long double)x)),
                                     fabsl(c - cosl((long double)x)));
        worst = error / allowed > worst ? error / allowed : worst;
    }
    note(t, "sincos_f64", 2 * worst, 2);
    check(worst <= 1, "sincos_f64 is off by %g times what is allowed", worst);
}

/* The value of a positive half from its three fields, and of one step beyond the last,
   as if they went on. */
static double half_value(int h) {
    int exponent = h >> 10, mantissa = h & 0x3ff;
    return exponent == 0 ? ldexp(mantissa, -24) : ldexp(1024 + mantissa, exponent - 25);
}

static double bf16_value(int h) {
    int exponent = h >> 7, mantissa = h & 0x7f;
    return exponent == 0 ? ldexp(mantissa, -133) : ldexp(128 + mantissa, exponent - 134);
}

/* The nearest of the values 0 .. infinity (which counts as one step more), ties to even: by
   search. */
static int nearest(double x, double (*value)(int), int infinity) {
    int low = 0, high = infinity;
    if (x >= value(infinity)) return infinity;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (value(middle) <= x) low = middle;
        else high = middle;
    }
    double below_x = x - value(low), above = value(high) - x;
    if (below_x == above) return low % 2 == 0 ? low : high;
    return below_x < above ? low : high;
}

static int halves_right(float x) {
    double magnitude = fabs((double)x);
    int sign = signbit(x) ? 0x8000 : 0;
    return f32_to_f16(x) == (nearest(magnitude, half_value, 0x7c00) | sign) &&
           f32_to_bf16(x) == (nearest(magnitude, bf16_value, 0x7f80) | sign);
}

static void test_halves(struct test *t) {
    int exact = 1, back = 1, edges = 1, random = 1;
    for (int h = 0; h < 0x8000; h++) {
        float f = f16_to_f32((uint16_t)h), b = bf16_to_f32((uint16_t)h);
        exact &= h < 0x7c00 ? f == half_value(h) : h == 0x7c00 ? f == HUGE_VALF : isnan(f);
        exact &= h < 0x7f80 ? b == bf16_value(h) : h == 0x7f80 ? b == HUGE_VALF : isnan(b);
        exact &= f32_to_bits(f16_to_f32((uint16_t)(h | 0x8000))) == (f32_to_bits(f) | 0x80000000u);
        exact &= f32_to_bits(bf16_to_f32((uint16_t)(h | 0x8000))) == (f32_to_bits(b) | 0x80000000u);
        back &= isnan(f) ? isnan(f16_to_f32(f32_to_f16(f))) : f32_to_f16(f) == h;
        back &= isnan(b) ? isnan(bf16_to_f32(f32_to_bf16(b))) : f32_to_bf16(b) == h;
        for (int side = -1; side <= 1; side++) { /* midpoints of neighbours and beside them */
            int finite = h < 0x7c00 ? h : 0;
            float f_mid = (float)((half_value(finite) + half_value(finite + 1)) / 2);
            uint32_t b_mid = (uint32_t)(h < 0x7f80 ? h : 0) << 16 | 0x8000;
            edges &= halves_right(bits_to_f32(f32_to_bits(f_mid) + (uint32_t)side));
            edges &= halves_right(-bits_to_f32(b_mid + (uint32_t)side));
        }
    }
    for (int i = 0; i < 300000; i++) {
        float x = bits_to_f32(rng_next(&t->rng)), small = ldexpf(uniform(t), below(t, 45) - 26);
        random &= (isnan(x) || halves_right(x)) && halves_right(small);
    }
    check(exact, "a half or bf16 does not convert to its value");
    check(back, "a half or bf16 does not survive the way to f32 and back");
    check(edges, "rounding to halves or bf16 is wrong at a midpoint");
    check(random, "rounding to halves or bf16 is not to the nearest");
}

/* ---- All ---- */

static void test_table(struct test *t) {
    for (int round = 0; round < t->rounds; round++) {
        start_round(t, round);
        test_dot_row(t);
        test_dot_tile(t);
        test_outer_row(t);
        test_outer_tile(t);
        test_quantize_x(t);
        test_int(t, LVM_Q8_0);
        test_int(t, LVM_Q4_0);
        for (int i = 0; i < N_TYPES; i++) test_to_f32(t, type_table[i].type);
        test_quantize_query(t);
        test_cache_rows(t);
        test_to_q8_0(t);
        test_rmsnorm(t);
        test_softmax(t);
        test_silu_mul(t);
        test_norm_rows(t);
        test_channel_sums(t);
        test_pack_strip(t);
        test_winograd_filter(t);
        test_winograd_input(t);
        test_winograd_output(t);
        if (round % 10 == 0) test_attend(t);
    }
    test_quantize_tiny(t);
    test_same_elements(t);
    test_same_everywhere(t);
    test_all_halves(t, LVM_F16);
    test_all_halves(t, LVM_BF16);
    test_matmul_panels(t);
    test_convs(t);
    test_matmuls(t);
}

static void test_numbers(struct test *t) {
    t->k = NULL;
    start_round(t, 0);
    test_fma_f32();
    if (t->rounds == ROUNDS) {
        test_exp_f32(t);
        test_exp_log_f64(t);
        test_sincos(t);
    }
    test_halves(t);
    t->k = &kernels_plain;
    for (int round = 0; round < t->rounds; round++) {
        start_round(t, round);
        test_int_plain(t, LVM_Q8_0);
        test_int_plain(t, LVM_Q4_0);
    }
}

int main(int argc, char **argv) {
    struct test t = {.seed = 20240607, .verbose = argc > 1 && strcmp(argv[1], "--verbose") == 0};
    t.rounds = argc > 1 && strcmp(argv[1], "--quick") == 0 ? ROUNDS / 10 : ROUNDS;
    int tables = (int)(sizeof simd_kernels / sizeof *simd_kernels);
    test_numbers(&t);
    for (int i = 0; i < tables; i++) {
        t.k = simd_kernels[i];
        if (i <= simd_level()) test_table(&t);
        else printf("skipped: %s (not on this machine)\n", t.k->name);
    }
    for (int i = 0; i < t.n_notes && t.verbose; i++)
        printf("%-8s %-14s largest error %8.3f of %6.1f allowed (ulps, kernels in 2^-24)\n",
               t.note[i].table, t.note[i].what, t.note[i].worst, t.note[i].allowed);
    return checked("kernels");
}
