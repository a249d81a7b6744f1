/* Fuzz targets: everything that reads bytes from others, and then the run of what was read.

       LVM_FUZZ=gguf build/fuzz tests/corpus/gguf           with libFuzzer, see tests/fuzz.sh
       build/test_fuzz tests/corpus                         every corpus once, with any compiler
       build/test_fuzz --cache FILE                         a first input for the cache
       build/test_fuzz --ckpt FILE                          and for checkpoints

   gguf   the head of a weights file, up to its tensors' data; the last byte chooses what the data are:
          zeros, small numbers, any bytes, NaNs. What opens is run: an image encoded, two tokens
          generated, a score, an image decoded, the file quantised
   cache  a context's saved state, taken as a fixed little model's and this machine's kernels'; what
          loads continues
   ckpt   a checkpoint, taken as a fixed little trainer's; what loads takes a step
   lora   a file of adapters; those that fit the little model are merged with it in memory and in a file
   png, jpeg, pnm   images in a row; what loads is resized and cropped
   jsonl  lines of a set
   tokens a file of token ids
   tok    a .tok file, whose ends are put right; what opens becomes rows of every kind, and lines
   lines  lines to learn from; what is packed opens, and is the same again by way of unpack's lines
   scores a palette, a line of a list of episodes, and an image of bytes with every metric

   Built with -DLVM_FUZZING checksums always pass, so that mutations reach what lies behind them. */

#define LVM_FUZZING
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"
#include "trainer.h"
#include <dirent.h>

static int accepted; /* inputs that were read as what they claim to be */

enum { DATA_ROOM = 1 << 20 }; /* more than the tensors of a model that is small enough to run */

/* What stands for the tensors: zeros, small f16 and quantised numbers, any bytes, NaNs. */
static const uint8_t *tensor_data(int kind) {
    static uint8_t data[4][DATA_ROOM];
    uint32_t state = 12345;
    for (int i = 0; data[3][0] == 0 && i < DATA_ROOM; i++) {
        state = state * 1664525 + 1013904223;
        data[1][i] = i % 2 == 0 ? (uint8_t)(state >> 24) : (uint8_t)(0x28 | (state >> 24 & 0x83));
        data[2][i] = (uint8_t)(state >> 24);
    }
    if (data[3][0] == 0) memset(data[3], 0xff, DATA_ROOM);
    return data[kind];
}

/* A head with such data behind it, as a whole file. */
static uint8_t *whole_file(const uint8_t *head, size_t n, size_t *size) {
    *size = n + DATA_ROOM;
    uint8_t *file = must(mem_alloc(*size, 1, NULL));
    memcpy(file, head, n);
    memcpy(file + n, tensor_data(n > 0 ? head[n - 1] % 4 : 0), DATA_ROOM);
    return file;
}

/* Shapes that run in milliseconds: the fuzzer should not learn to make large models. */
static int is_small(const lvm_model *m) {
    const struct llama *a = &m->llama;
    if (a->L > 0 &&
        (a->D > 256 || a->F > 1024 || a->V > 4096 || a->L > 8 || a->context > 4096))
        return 0;
    int64_t map = 0, attention = 0;
    int c = 0;
    if (m->vq == NULL) return 1;
    vq_largest(m->vq, &map, &attention, &c);
    return m->vq->R <= 64 && m->vq->hidden <= 64 && m->vq->codes <= 4096 && m->vq->z <= 256 &&
           m->vq->code_dim <= 256 && map <= 1 << 18;
}

/* 1 after a success; a model may fail for nothing but weights that give NaN or infinity. */
static int only_finite(int code, const lvm_error *error) {
    if (code != LVM_OK && (code != LVM_FORMAT || strstr(error->text, "finite") == NULL)) abort();
    return code == LVM_OK;
}

static void run_tokenizer(lvm_ctx *ctx) {
    lvm_info i = lvm_model_info(ctx->m);
    uint8_t rgb[12] = {0, 128, 255, 9, 8, 7, 255, 0, 3, 77, 66, 55};
    lvm_image in = {.width = 2, .height = 2, .rgb = rgb}, out = {.rgb = NULL};
    int32_t *ids = mem_alloc((size_t)i.tokens_per_image, sizeof *ids, NULL);
    lvm_error error;
    if (ids != NULL && only_finite(lvm_encode(ctx, &in, 1, ids, &error), &error)) {
        for (int t = 0; t < i.tokens_per_image; t++)
            if (ids[t] < 0 || ids[t] >= i.codes) abort();
        only_finite(lvm_decode(ctx, ids, 1, &out, &error), &error);
    }
    lvm_image_free(&out);
    mem_free(ids);
}

static void run_transformer(lvm_ctx *ctx) {
    lvm_info i = lvm_model_info(ctx->m);
    int32_t ids[2] = {0, i.vocab_size - 1}, more[4];
    float nll[2];
    lvm_error error;
    int n = i.context_length < 2 ? 1 : 2;
    if (!only_finite(lvm_prompt(ctx, ids, n, NULL, &error), &error)) return;
    lvm_score(ctx, ids, 2, nll, &error);
    if (lvm_generate(ctx, NULL, 2, 2, more, &error) != LVM_OK) return;
    for (int t = 0; t < 4; t++)
        if (more[t] < 0 || more[t] >= i.codes) abort();
}

static void run_model(const lvm_model *m) {
    lvm_options o = lvm_default_options();
    lvm_error error;
    o.threads = 1;
    lvm_ctx *ctx = lvm_ctx_new(m, &o, &error);
    if (ctx == NULL) return;
    if (m->vq != NULL) run_tokenizer(ctx);
    if (m->llama.L > 0) run_transformer(ctx);
    lvm_ctx_free(ctx);
}

static void fuzz_gguf(const uint8_t *data, size_t n) {
    size_t size = 0;
    uint8_t *file = whole_file(data, n, &size);
    lvm_error error;
    lvm_model *m = lvm_open_memory(file, size, &error);
    accepted += m != NULL;
    if (m != NULL && is_small(m)) {
        const struct wanted_types types = {LVM_Q4_0, LVM_BF16, LVM_AUTO};
        char name[64];
        snprintf(name, sizeof name, "fuzz-%ld.bin", (long)getpid());
        run_model(m);
        if (rewrite_model(m, name, &types, NULL, &error) == LVM_OK)
            remove(name);
    }
    lvm_close(m);
    mem_free(file);
}

/* A context of the little model that the cache target has: one token an image. */
static lvm_ctx *cache_context(void) {
    static lvm_ctx *ctx;
    if (ctx != NULL) return ctx;
    struct llama a = {.context = 40, .L = 1, .D = 32, .F = 32, .H = 2, .G = 1, .d = 16, .V = 40,
                      .bos = 39, .eos = -1, .eps = 1e-5f, .theta = 10000};
    struct vqgan vq = {.R = 4, .hidden = 32, .z = 4, .codes = 32, .code_dim = 4, .n_res_blocks = 1,
                       .resample_conv = 1, .n_levels = 3, .mult = {1, 2, 1}};
    struct model_file f = make_model(&a, &vq, LVM_Q8_0, LVM_Q8_0);
    lvm_options o = lvm_default_options();
    o.threads = 1;
    return ctx = must(lvm_ctx_new(must(lvm_open_memory(f.data, f.size, NULL)), &o, NULL));
}

static void fuzz_cache(const uint8_t *data, size_t n) {
    lvm_ctx *ctx = cache_context();
    uint8_t *bytes = must(mem_alloc(n + 1, 1, NULL));
    char name[64];
    lvm_error error;
    memcpy(bytes, data, n);
    struct cache_head own = cache_head(ctx, 0), *head = (void *)bytes;
    if (n >= sizeof own) {
        memcpy(head->isa, own.isa, sizeof own.isa);
        head->weights = own.weights;
    }
    snprintf(name, sizeof name, "fuzz-%ld.cache", (long)getpid());
    FILE *f = fopen(name, "wb");
    if (f == NULL || fwrite(bytes, 1, n, f) != n || fclose(f) != 0) abort();
    mem_free(bytes);
    int32_t ids[2];
    int loaded = lvm_cache_load(ctx, name, &error) == LVM_OK;
    accepted += loaded;
    if (loaded && lvm_prompt(ctx, ctx->ids, ctx->n_ids, NULL, &error) == LVM_OK)
        lvm_generate(ctx, NULL, 1, 2, ids, &error);
    remove(name);
}

/* Of the trainer that checkpoints are taken for. */
static struct made_trainer *fuzzed_trainer(void) {
    static struct made_trainer *h;
    if (h == NULL) h = make_trainer(LVM_F16, 1);
    return h;
}

/* Whose configuration and data it was is passed over: they are long texts and numbers to guess. */
static void fuzz_ckpt(const uint8_t *data, size_t n) {
    struct lvm_trainer *t = fuzzed_trainer()->t;
    uint8_t *bytes = must(mem_alloc(n + 1, 1, NULL));
    struct checkpoint k = {.path = "input", .data = bytes, .size = n};
    lvm_train_report report;
    lvm_error error;
    memcpy(bytes, data, n);
    int loaded = load_checkpoint(t, &k, &error) == LVM_OK;
    if (!loaded && parse_checkpoint(&k, &error) == LVM_OK &&
        check_params(t, &k, &error) == LVM_OK && check_state(t, &k, &error) == LVM_OK &&
        check_arrays(t, &k, &error) == LVM_OK) {
        loaded = 1;
        take_checkpoint(t, &k);
    }
    if (loaded) {
        accepted++;
        int code = lvm_trainer_step(t, &report, &error);
        if (code != LVM_OK && code != LVM_FORMAT && code != LVM_INVALID) abort();
    }
    mem_free(bytes);
}

static void fuzz_lora(const uint8_t *data, size_t n) {
    const lvm_model *m = fuzzed_trainer()->m;
    uint8_t *bytes = must(mem_alloc(n + 1, 1, NULL));
    struct adapters ad = {.n = 0};
    lvm_error error;
    memcpy(bytes, data, n);
    if (adapters_parse(&ad, "input", bytes, n, &error) == LVM_OK &&
        adapters_match(&ad, m, &error) == LVM_OK) {
        struct pool *pool = must(pool_new(1, NULL));
        const struct wanted_types types = {LVM_Q4_0, LVM_AUTO, LVM_AUTO};
        char name[64];
        accepted++;
        for (int i = 0; i < ad.n; i++) {
            struct tensor out;
            int code = merge_matrix(pool, ad.list[i].spec->tensor, &ad.list[i], ad.alpha, &out, &error);
            if (code == LVM_OK) mem_free((uint8_t *)(uintptr_t)out.data);
        }
        pool_free(pool);
        snprintf(name, sizeof name, "fuzz-%ld.merged", (long)getpid());
        if (rewrite_model(m, name, &types, &ad, &error) == LVM_OK) remove(name);
    }
    adapters_close(&ad);
    mem_free(bytes);
}

/* Images in a row, and each resized. */
static void fuzz_image(const uint8_t *data, size_t n) {
    lvm_image image = {.rgb = NULL}, small = {.rgb = NULL};
    lvm_error error;
    size_t used = 0;
    while (image_load_next(data, n, "input", &used, &image, &error) == LVM_OK) {
        accepted++;
        if (used == 0 || used > n) abort();
        if ((int64_t)image.width * image.height < 1 << 20) {
            if (lvm_image_resize(&image, 5, 3, &small, &error) == LVM_OK) lvm_image_free(&small);
            if (fit_image(&image, 7, LVM_CROP, &small, &error) != LVM_OK) abort();
            lvm_image_free(&small);
        }
        lvm_image_free(&image);
        data += used;
        n -= used;
    }
    if (image.rgb != NULL || used > n) abort();
}

static void fuzz_jsonl(const uint8_t *data, size_t n) {
    while (n > 0) {
        const uint8_t *end = memchr(data, '\n', n);
        size_t here = end != NULL ? (size_t)(end - data) : n;
        lvm_error error;
        struct sentence s;
        struct json j = {.s = (const char *)data, .n = here, .T = 2, .codes = 64, .error = &error};
        if (parse_sentence(&j, &s) == LVM_OK) {
            accepted++;
            for (int i = 0; i < s.input.n; i++)
                if ((s.input.list[i].path == NULL) == (s.input.list[i].ids == NULL)) abort();
            for (int i = 0; i < N_KEYS; i++)
                if (s.stray[i][0] != 0 && find_near_key(key_table, N_KEYS, s.stray[i]) != i) abort();
        }
        sentence_free(&s);
        here += end != NULL;
        data += here;
        n -= here;
    }
}

static void fuzz_tokens(const uint8_t *data, size_t n) {
    int32_t *ids = NULL;
    int count = 0;
    lvm_error error;
    char *text = must(mem_alloc(n + 1, 1, NULL));
    memcpy(text, data, n);
    accepted += parse_tokens("tokens", text, n, &ids, &count, &error) == LVM_OK;
    mem_free(ids);
    mem_free(text);
}

/* A folder with two images, a.png and b.png. */
static void small_folder(struct listing *l) {
    static const char text[] = "\0a\0png\0b\0png";
    *l = (struct listing){.root = must(copy_string("folder", NULL)), .n_folders = 1, .n = 2};
    if (buffer_add(&l->text, text, sizeof text, NULL) != LVM_OK) abort();
    l->folders = must(mem_alloc(1, sizeof *l->folders, NULL));
    l->first = must(mem_alloc(2, sizeof *l->first, NULL));
    l->stems = must(mem_alloc(2, sizeof *l->stems, NULL));
    l->first[1] = 2;
    l->stems[0] = 1;
    l->stems[1] = 7;
}

/* All that is drawn of an image of 9 x 6, cropped and mirrored. */
static void draw_all(const struct annotations *a, const struct drawn_image *drawn) {
    struct recipe r = {.crop = {40000, 30000, 20000}, .flip = 1};
    int cut[4];
    lvm_image image;
    lvm_error error;
    if (image_new(&image, 8, 8, NULL) != LVM_OK) abort();
    cut_of(&r, 9, 6, cut);
    struct placement p = placement_of(&r, cut, 8, LVM_CROP);
    draw_boxes(a, drawn, &p, &image);
    for (int k = 0; k < 2; k++)
        if (draw_skeletons(a, drawn, &p, &skeletons[k], &image, &error) == LVM_OK) accepted++;
    if (draw_areas(a, drawn, &p, 9, 6, &image, &error) == LVM_OK) accepted++;
    lvm_image_free(&image);
}

static void fuzz_coco(const uint8_t *data, size_t n) {
    struct listing l;
    struct fault_log log = {.path = NULL};
    struct annotations *a = must(mem_alloc(1, sizeof *a, NULL));
    lvm_error error;
    small_folder(&l);
    *a = (struct annotations){.path = "coco", .log = &log, .list = &l};
    if (parse_annotations(a, data, n, &error) == LVM_OK) {
        a->data = (void *)(uintptr_t)data;
        a->size = n;
        for (size_t i = 0; i < a->n_images && i < 9; i++) {
            if (a->images[i].first + a->images[i].n > a->n_shapes) abort();
            if (a->images[i].file > 1) abort();
            draw_all(a, &a->images[i]);
        }
    }
    a->data = NULL; /* it is not mapped */
    annotations_free(a);
    listing_close(&l);
}

/* A layout: lines of names. */
static void fuzz_layout(const uint8_t *data, size_t n) {
    struct listing l;
    struct layout *y = must(mem_alloc(1, sizeof *y, NULL));
    struct plan plan = {.seed = 1};
    small_folder(&l);
    for (int number = 1; n > 0; number++) {
        const uint8_t *end = memchr(data, '\n', n);
        size_t here = end != NULL ? (size_t)(end - data) : n;
        char *line = must(mem_alloc(here + 1, 1, NULL));
        memcpy(line, data, here);
        if (layout_line(&plan, &l, y, "layout", number, line, NULL) != LVM_OK) abort();
        mem_free(line);
        here += end != NULL;
        data += here;
        n -= here;
    }
    for (size_t i = 0; i < y->n; i++)
        if (y->rows[i].n < y->rows[i].answers ||
            (y->rows[i].first + y->rows[i].n) * sizeof *y->files > y->kept[0].n)
            abort();
    accepted += y->n > 0;
    layout_free(y);
    listing_close(&l);
}

/* Rows of a file, until one fails; then each sentence as a line. */
static void read_tok(const lvm_tokens *t) {
    enum { C = 13, ROWS = 3 };
    int32_t ids[ROWS * C], targets[ROWS * C];
    float weights[ROWS * C];
    struct piece pieces[ROWS * C];
    struct rows r = {0, ids, targets, weights, pieces, 0};
    struct buffer text = {0};
    for (int kind = 0; kind < 16; kind++) {
        lvm_train_options o = {.data = &t, .n_data = 1, .context = C, .packing = kind & 1,
                               .isolate = kind >> 1 & 1, .seed = 1};
        struct data_position at = {0, 0, 0};
        struct stream s;
        int code = stream_open(&s, &o, kind & 4 ? 7 : -1, kind & 4 ? 65535 : -1, MAX_IDS, NULL);
        s.shuffle = kind >> 3;
        for (int i = 0; code == LVM_OK && i < 20; i++) {
            code = fill_rows(&s, &at, ROWS, &r, NULL);
            if (code != LVM_OK) continue;
            for (int k = 0; k < r.n_pieces; k++) {
                int end = k > 0 ? pieces[k - 1].first + pieces[k - 1].n : 0;
                if (pieces[k].first < end || pieces[k].n < 1 || pieces[k].n > C) abort();
            }
            if (r.n_pieces > 0 && pieces[r.n_pieces - 1].first + pieces[r.n_pieces - 1].n > r.n)
                abort();
        }
    }
    for (int64_t i = 0; i < t->n_sentences && i < 50; i++) sentence_text(t, i, i & 1, &text, NULL);
    mem_free(text.data);
}

static void fuzz_tok(const uint8_t *data, size_t n) {
    uint8_t *copy = must(mem_alloc(n + 1, 1, NULL));
    memcpy(copy, data, n);
    if (n >= 128) {
        memcpy(copy, "LVM.tok\n\1\0\0\0", 12);
        memcpy(copy + n - 8, "LVM.tok\n", 8);
    }
    lvm_error error;
    lvm_tokens *t = lvm_tokens_open_memory(copy, n, "tok", &error);
    accepted += t != NULL;
    if (t != NULL) read_tok(t);
    else if (error.code != LVM_FORMAT && error.code != LVM_UNSUPPORTED) abort();
    lvm_tokens_close(t);
    mem_free(copy);
}

/* Packs every line that is one; bytes in *file, which are mem_freed, or NULL. */
static lvm_tokens *pack_text(const char *text, size_t n, int answers, uint8_t **file) {
    struct packing p = {.bos = 5, .eos = 6, .answers = answers, .image_tokens = -1};
    if (token_writer_open(&p.w, NULL, NULL) != LVM_OK) abort();
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        size_t here = end != NULL ? (size_t)(end - text) - at : n - at;
        struct lines l = {.name = "lines", .text = {.n = here}};
        l.text.data = must(malloc(here + 1)); /* of its own, so that a sanitizer sees its end */
        memcpy(l.text.data, text + at, here);
        pack_line(&p, &l, NULL);
        free(l.text.data);
        at += here + (end != NULL);
    }
    int code = pack_close(&p, LVM_OK, NULL);
    *file = (uint8_t *)p.w.memory.data;
    if (code != LVM_OK) return NULL;
    return must(lvm_tokens_open_memory(p.w.memory.data, p.w.memory.n, "packed", NULL));
}

static void fuzz_lines(const uint8_t *data, size_t n) {
    uint8_t *file = NULL, *again = NULL;
    struct buffer all = {0}, text = {0};
    lvm_tokens *t = pack_text((const char *)data, n, n & 1, &file);
    for (int64_t i = 0; t != NULL && i < t->n_sentences; i++)
        if (sentence_text(t, i, i & 1, &text, NULL) != LVM_OK ||
            buffer_add(&all, text.data, text.n, NULL) != LVM_OK)
            abort();
    if (t != NULL) {
        accepted++;
        read_tok(t);
        lvm_tokens *back = must(pack_text(all.data, all.n, 0, &again));
        if (back->size != t->size || memcmp(back->data, t->data, t->size) != 0) abort();
        lvm_tokens_close(back);
    }
    lvm_tokens_close(t);
    mem_free(file);
    mem_free(again);
    mem_free(text.data);
    mem_free(all.data);
}

/* The bytes as lines of a palette and as episodes; then as two images of 16 columns, measured by
   everything that reads drawings back. */
static void fuzz_scores(const uint8_t *data, size_t n) {
    lvm_error error;
    struct scoring s = {.columns = 3, .rows = 2, .skeleton = &skeletons[n & 1]};
    char *text = must(mem_alloc(n + 1, 1, NULL));
    memcpy(text, data, n);
    text[n] = 0;
    for (char *line = text, *end; line != NULL; line = end != NULL ? end + 1 : NULL) {
        end = strchr(line, '\n');
        if (end != NULL) *end = 0;
        accepted += palette_add(&s.palette, line) == NULL;
        for (int protocol = VP_SEGMENTATION; protocol <= VP_COLORIZATION; protocol++) {
            struct episode e;
            accepted += parse_episode(line, (enum protocol)protocol, &e) == NULL;
        }
    }
    mem_free(text);
    if (s.palette.n > 0 && nearest_color(&s.palette, s.palette.color[0]) != 0) abort();
    int height = (int)(n / (2 * 3 * 16));
    uint8_t *rgb = must(mem_alloc(n + 1, 1, NULL));
    memcpy(rgb, data, n);
    lvm_image a = {16, height, rgb, 0}, b = {16, height, rgb + n_pixels(&a) * 3, 0};
    s.palette.n = 0;
    for (int i = 0; height > 0 && i < N_METRICS; i++) {
        double value[MAX_VALUES] = {0};
        if (metric_table[i].measure(&s, &a, &b, value, &error) != LVM_OK) continue;
        for (int k = 0; k < MAX_VALUES; k++)
            if (value[k] < 0 && i > 1) abort(); /* but psnr and ssim nothing falls below 0 */
        if (metric_table[i].total != NULL) metric_table[i].total(&s, value);
    }
    mem_free(rgb);
    scoring_free(&s);
}

static const struct target {
    const char *name;
    void (*run)(const uint8_t *data, size_t n);
} targets[] = {{"gguf", fuzz_gguf}, {"cache", fuzz_cache}, {"ckpt", fuzz_ckpt},
               {"lora", fuzz_lora}, {"png", fuzz_image},
               {"jpeg", fuzz_image}, {"pnm", fuzz_image},   {"jsonl", fuzz_jsonl},
               {"tokens", fuzz_tokens}, {"tok", fuzz_tok},  {"lines", fuzz_lines},
               {"coco", fuzz_coco},     {"layout", fuzz_layout},
               {"scores", fuzz_scores}};
enum { N_TARGETS = sizeof targets / sizeof *targets };

#ifdef LIBFUZZER
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n) {
    const char *name = getenv("LVM_FUZZ");
    for (int i = 0; i < N_TARGETS; i++)
        if (name != NULL && strcmp(targets[i].name, name) == 0) {
            targets[i].run(data, n);
            return 0;
        }
    fprintf(stderr, "LVM_FUZZ names the target: gguf, cache, ckpt, lora, png, jpeg, pnm, jsonl, "
                    "tokens, tok, lines, coco, layout, scores\n");
    exit(2);
}
#else
/* Writes a first input for that target: two images and their tokens. */
static int write_cache_seed(const char *path) {
    lvm_ctx *ctx = cache_context();
    uint8_t rgb[2][3] = {{9, 8, 7}, {200, 100, 0}};
    lvm_image images[2] = {{.width = 1, .height = 1, .rgb = rgb[0]},
                           {.width = 1, .height = 1, .rgb = rgb[1]}};
    lvm_error error;
    if (lvm_prompt_images(ctx, images, 2, &error) != LVM_OK ||
        lvm_cache_save(ctx, path, ctx->n_ids, &error) != LVM_OK) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    return 0;
}

/* A checkpoint of the little trainer after a step. */
static int write_ckpt_seed(const char *path) {
    struct lvm_trainer *t = fuzzed_trainer()->t;
    lvm_train_report report;
    lvm_error error;
    if (lvm_trainer_step(t, &report, &error) != LVM_OK ||
        lvm_trainer_save(t, path, "a note", &error) != LVM_OK) {
        fprintf(stderr, "%s\n", error.text);
        return 1;
    }
    return 0;
}

/* Every input of a corpus; of its own inputs each target must take some. Images lie elsewhere. */
static void run_corpus(const struct target *target, const char *corpora) {
    char folder[512], path[1024];
    int files = 0;
    snprintf(folder, sizeof folder, "%s/%s", corpora, target->name);
    DIR *dir = opendir(folder);
    accepted = 0;
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        uint8_t *data = NULL;
        size_t n = 0;
        snprintf(path, sizeof path, "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] == '.' || read_file(path, &data, &n, NULL) != LVM_OK) continue;
        target->run(data, n);
        check(1, "%s did not crash", path);
        mem_free(data);
        files++;
    }
    if (dir != NULL) closedir(dir);
    check(accepted > 0 || (files == 0 && target->run == fuzz_image), "%s: of %d inputs none is read",
          folder, files);
    printf("%s: %d inputs, %d read\n", folder, files, accepted);
}

int main(int argc, char **argv) {
    if (argc > 2 && strcmp(argv[1], "--cache") == 0) return write_cache_seed(argv[2]);
    if (argc > 2 && strcmp(argv[1], "--ckpt") == 0) return write_ckpt_seed(argv[2]);
    for (int i = 0; i < N_TARGETS; i++)
        run_corpus(&targets[i], argc > 1 ? argv[1] : "tests/corpus");
    return checked("fuzz");
}
#endif
