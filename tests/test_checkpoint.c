/* What is kept of training: checkpoints, weights files and adapters out of a trainer, adapters merged
   with a model. Trainers are tests/trainer.h's.

       test_checkpoint FOLDER     a folder that may be written into
           BASE ADAPTERS GOLDEN   and a model, adapters of it, and what PEFT computes with both */
#include <stddef.h>
void *counted_calloc(size_t count, size_t size);
void counted_free(void *p);
#define LVM_CALLOC counted_calloc
#define LVM_FREE counted_free
#define main lvm_main
#include "../lvm.c"
#undef main
#include "check.h"
#include "gguf.h"
#include "npy.h"
#include "trainer.h"
#ifndef _WIN32
#include <sys/resource.h>
#endif

/* Threads of a pool count too. alloc_fails: number of the one that fails; -1: none. */
static atomic_int alloc_calls, alloc_fails = -1, alloc_open;

void *counted_calloc(size_t count, size_t size) {
    if (alloc_calls++ == alloc_fails) return NULL;
    alloc_open++;
    return calloc(count, size);
}

void counted_free(void *p) {
    alloc_open -= p != NULL;
    free(p);
}

static const char *folder;

static const char *in_folder(const char *name) {
    static char paths[4][1024];
    static int next;
    char *path = paths[next++ % 4];
    snprintf(path, sizeof paths[0], "%s/%s", folder, name);
    return path;
}

static struct made_trainer *shaken(int type, int rank, uint64_t seed) {
    struct made_trainer *h = make_trainer(type, rank);
    shake(h, seed);
    return h;
}

/* Everything of a trainer that a checkpoint may change, as a hash. */
static uint64_t trainer_hash(const struct lvm_trainer *t) {
    const int64_t numbers[] = {t->step, t->tokens, t->skipped, t->in_a_row, t->at.epoch,
                               t->at.sentence, t->at.token};
    uint64_t h = hash_bytes(0, numbers, sizeof numbers);
    h = hash_bytes(h, &t->usual_norm, sizeof t->usual_norm);
    for (int i = 0; i < t->net.n_params; i++) {
        const struct param *p = &t->net.params[i];
        size_t n = (size_t)p->w.rows * (size_t)p->w.cols;
        if (p->m == NULL) continue;
        h = hash_bytes(h, p->w.data, n * 4);
        h = hash_bytes(h, p->m, n * 4);
        h = hash_bytes(h, p->v, n * 4);
    }
    return h;
}

/* A call failed with this code and these words. */
static void fails(int got, int code, const lvm_error *e, const char *words) {
    check(got == code && e->code == code && strstr(e->text, words) != NULL,
          "%d \"%s\" instead of %d \"%s\"", got, e->text, code, words);
}

/* ---- Checkpoints ---- */

static void test_round_trip(int rank) {
    lvm_error e;
    struct made_trainer *a = shaken(LVM_F16, rank, 1), *b = shaken(LVM_F16, rank, 2);
    const char *path = in_folder("run.ckpt"), *again = in_folder("again.ckpt");
    where("round trip, rank %d", rank);
    check(trainer_hash(a->t) != trainer_hash(b->t), "two trainers begin alike");
    b->t->step = 0, b->t->usual_norm = 9, b->t->at.epoch = 0;
    check(lvm_trainer_save(a->t, path, "the\nnote", &e) == LVM_OK, "%s", e.text);
    check(lvm_trainer_load(b->t, path, &e) == LVM_OK, "%s", e.text);
    check(trainer_hash(a->t) == trainer_hash(b->t), "what is read is not what was written");
    check(b->t->step == 7 && b->t->tokens == 12345 && b->t->at.token == 1 && b->t->usual_norm == 0.625,
          "step %lld", (long long)b->t->step);
    for (int i = 0; i < b->t->net.n_params; i++) {
        const struct param *p = &b->t->net.params[i];
        int64_t n = p->g != NULL ? (int64_t)p->w.rows * p->w.cols : 0, bad = 0;
        for (int64_t j = 0; j < n; j++) bad += p->g[j] != 0;
        check(bad == 0, "%s: %lld gradients are left", p->name, (long long)bad);
    }
    uint8_t *x = NULL, *y = NULL;
    size_t n = 0, m = 0;
    check(lvm_trainer_save(b->t, again, "the\nnote", &e) == LVM_OK, "%s", e.text);
    check(read_file(path, &x, &n, &e) == LVM_OK && read_file(again, &y, &m, &e) == LVM_OK &&
          n == m && memcmp(x, y, n) == 0, "written again it differs");
    mem_free(x);
    mem_free(y);
    char *note = lvm_checkpoint_note(path, &e);
    check(note != NULL && strcmp(note, "the\nnote") == 0, "note: %s", note != NULL ? note : e.text);
    lvm_memory_free(note);
    check(lvm_trainer_save(b->t, again, NULL, &e) == LVM_OK, "%s", e.text);
    note = lvm_checkpoint_note(again, &e);
    check(note != NULL && note[0] == 0, "an absent note is not empty");
    lvm_memory_free(note);
    free_trainer(a);
    free_trainer(b);
}

/* Another byte anywhere, another length: an error, and the trainer is as it was. */
static void test_damage(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 0, 1);
    const char *path = in_folder("run.ckpt"), *bad = in_folder("bad.ckpt");
    uint8_t *data = NULL;
    size_t n = 0;
    where("damage");
    check(lvm_trainer_save(h->t, path, "note", &e) == LVM_OK, "%s", e.text);
    check(read_file(path, &data, &n, &e) == LVM_OK, "%s", e.text);
    h->t->step = 3;
    uint64_t before = trainer_hash(h->t);
    struct checkpoint k = {.path = path, .data = data, .size = n};
    check(parse_checkpoint(&k, &e) == LVM_OK, "%s", e.text);
    size_t head = k.arrays;
    /* in memory, as the parser sees it: every byte of the head, every 97th behind it */
    for (size_t at = 0; at < n; at += at < head + 8 || at + 9 > n ? 1 : min64(97, (int64_t)(n - 8 - at))) {
        data[at] ^= 0x41;
        k = (struct checkpoint){.path = path, .data = data, .size = n};
        int code = load_checkpoint(h->t, &k, &e);
        check(code != LVM_OK && trainer_hash(h->t) == before, "byte %zu gives %d: %s", at, code,
              e.text);
        check(at < 16 || strstr(e.text, "damaged") != NULL, "byte %zu: %s", at, e.text);
        data[at] ^= 0x41;
    }
    for (size_t cut = 0; cut < n; cut += cut < head + 9 || cut + 17 > n ? 1 : 997) {
        k = (struct checkpoint){.path = path, .data = data, .size = cut};
        int code = load_checkpoint(h->t, &k, &e);
        check(code == LVM_FORMAT && trainer_hash(h->t) == before, "%zu bytes give %d: %s", cut, code,
              e.text);
    }
    /* as files */
    check(write_file(bad, data, 0, &e) == LVM_OK, "%s", e.text);
    fails(lvm_trainer_load(h->t, bad, &e), LVM_FORMAT, &e, "is no checkpoint of lvm train");
    check(write_file(bad, data, n - 1, &e) == LVM_OK, "%s", e.text);
    fails(lvm_trainer_load(h->t, bad, &e), LVM_FORMAT, &e, "bad.ckpt: is damaged or was cut short");
    check(lvm_checkpoint_note(bad, &e) == NULL && e.code == LVM_FORMAT, "a note of a cut file");
    data[8] = 9;
    check(write_file(bad, data, n, &e) == LVM_OK, "%s", e.text);
    fails(lvm_trainer_load(h->t, bad, &e), LVM_UNSUPPORTED, &e, "is a checkpoint of version 9, not 1");
    fails(lvm_trainer_load(h->t, in_folder("nothing"), &e), LVM_IO, &e, "nothing: ");
    check(trainer_hash(h->t) == before, "a failed load changed the trainer");
    mem_free(data);
    free_trainer(h);
}

/* A file with right hashes whose numbers no run can have. */
static void test_hostile_state(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 0, 1);
    const char *path = in_folder("run.ckpt");
    where("hostile state");
    const struct lvm_trainer good = *h->t;
    for (int i = 0; i < 6; i++) {
        *h->t = good;
        if (i == 0) h->t->step = h->t->o.steps + 1;
        if (i == 1) h->t->at.sentence = 19;
        if (i == 2) h->t->at.token = -1;
        if (i == 3) h->t->usual_norm = NAN;
        if (i == 4) h->t->usual_norm = -1;
        if (i == 5) h->t->tokens = INT64_MIN;
        check(lvm_trainer_save(h->t, path, NULL, &e) == LVM_OK, "%s", e.text);
        *h->t = good;
        fails(lvm_trainer_load(h->t, path, &e), LVM_FORMAT, &e, "is damaged");
    }
    free_trainer(h);
}

/* Steps after a checkpoint are those that would have come, with other threads and less kept too. */
static void test_resume(int rank) {
    lvm_error e;
    struct made_trainer *h = make_trainer(LVM_F16, rank);
    const char *path = in_folder("run.ckpt"), *one = in_folder("one.bin"), *two = in_folder("two.bin");
    double losses[6];
    lvm_train_report r;
    where("resumed, rank %d", rank);
    for (int i = 0; i < 6; i++) {
        if (i == 3) check(lvm_trainer_save(h->t, path, NULL, &e) == LVM_OK, "%s", e.text);
        check(lvm_trainer_step(h->t, &r, &e) == LVM_OK, "%s", e.text);
        losses[i] = r.loss;
    }
    check(lvm_trainer_export(h->t, one, LVM_F32, NULL, &e) == LVM_OK, "%s", e.text);
    lvm_train_options o = h->o;
    o.threads = 3;
    o.recompute = LVM_RECOMPUTE_ALL;
    lvm_trainer *t = must(lvm_trainer_new(&o, &e));
    check(lvm_trainer_load(t, path, &e) == LVM_OK, "%s", e.text);
    for (int i = 3; i < 6; i++) {
        check(lvm_trainer_step(t, &r, &e) == LVM_OK, "%s", e.text);
        check(r.loss == losses[i] && r.step == i + 1, "step %d: loss %.17g, not %.17g", i, r.loss,
              losses[i]);
    }
    check(trainer_hash(t) == trainer_hash(h->t), "another trainer");
    remove(two);
    check(lvm_trainer_export(t, two, LVM_F32, NULL, &e) == LVM_OK, "%s", e.text);
    lvm_trainer_free(t);
    if (rank == 0) {
        lvm_model *x = must(lvm_open(one, 0, &e)), *y = must(lvm_open(two, 0, &e));
        for (int i = 0; i < x->n_specs; i++) {
            const struct tensor *a = x->specs[i].tensor, *b = y->specs[i].tensor;
            if (a->data == NULL) continue;
            check(memcmp(a->data, b->data, (size_t)(a->rows * a->row_bytes)) == 0, "%s differs",
                  x->specs[i].name);
        }
        lvm_close(x);
        lvm_close(y);
    }
    free_trainer(h);
}

/* What must be as it was, and what may differ. */
static void test_configuration(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F16, 0, 1), *lora = shaken(LVM_F16, 4, 1),
                     *other = shaken(LVM_Q8_0, 0, 1);
    const char *path = in_folder("run.ckpt");
    const lvm_train_options good = h->t->o;
    lvm_train_options *o = &h->t->o;
    where("configuration");
    check(lvm_trainer_save(h->t, path, NULL, &e) == LVM_OK, "%s", e.text);
    uint64_t before = trainer_hash(h->t);
#define DIFFERS(change, words) do { \
        *o = good; \
        change; \
        fails(lvm_trainer_load(h->t, path, &e), LVM_INVALID, &e, words); \
        check(trainer_hash(h->t) == before, "a refused load changed the trainer"); \
    } while (0)
    DIFFERS(o->context = 1024, "run.ckpt: was trained with context 24, not 1024");
    DIFFERS(o->batch = 3, "was trained with batch 2, not 3");
    DIFFERS(o->packing = LVM_WHOLE, "was trained with packing cut, not whole");
    DIFFERS(o->isolate = 1, "was trained with isolate off, not on");
    DIFFERS(o->steps = 2000, "was trained with steps 1000, not 2000");
    DIFFERS(o->warmup = 7, "was trained with warm-up 100, not 7");
    DIFFERS(o->schedule = LVM_WSD, "was trained with schedule cosine, not wsd");
    DIFFERS(o->lr = 1, "was trained with learning rate 0.0003");
    DIFFERS(o->min_lr = 1, "was trained with least learning rate");
    DIFFERS(o->beta1 = 0.5f, "was trained with beta1");
    DIFFERS(o->beta2 = 0.5f, "was trained with beta2");
    DIFFERS(o->epsilon = 1, "was trained with epsilon");
    DIFFERS(o->weight_decay = 0, "was trained with weight decay");
    DIFFERS(o->clip = 2, "was trained with clipping at 1, not 2");
    DIFFERS(o->seed = 9, "was trained with seed 1, not 9");
    DIFFERS(o->lora_rank = 4, "was trained with adapters of rank 0, not 4");
    DIFFERS(o->lora_alpha = 4, "was trained with adapters' alpha 16, not 4");
    DIFFERS(o->lora_on = "q", "was trained with adapters on \"\", not \"q\"");
    DIFFERS(o->freeze = "blk.*", "was trained with frozen \"\", not \"blk.*\"");
    DIFFERS(o->init = NULL, "began from a weights file, not from random weights");
    DIFFERS(o->init = other->m, "began from other weights than those of (memory)");
    DIFFERS(o->n_data = 1, "was trained on 2 files, not on 1");
    h->data[1]->fingerprint++;
    DIFFERS((void)0, "two.tok when it was trained");
    h->data[1]->fingerprint--;
#undef DIFFERS
    *o = good;
    struct llama wider = *h->t->net.a;
    wider.D = 64;
    h->t->net.a = &wider;
    fails(lvm_trainer_load(h->t, path, &e), LVM_INVALID, &e, "was trained with width 32, not 64");
    h->t->net.a = &h->m->llama;
    o->threads = 3, o->recompute = LVM_RECOMPUTE_ALL, o->memory = 1 << 20;
    check(lvm_trainer_load(h->t, path, &e) == LVM_OK, "%s", e.text);
    h->t->net.n_params--;
    fails(lvm_trainer_load(h->t, path, &e), LVM_INVALID, &e, "has 1 more tensors that learn");
    h->t->net.n_params++;
    const lvm_train_options of_lora = lora->t->o;
    lora->t->o = *o;
    fails(lvm_trainer_load(lora->t, path, &e), LVM_INVALID, &e,
          "holds tensor token_embd.weight of 40 x 32 instead of blk.0.attn_q.weight.lora_a of 4 x 32");
    lora->t->o = of_lora;
    struct lvm_trainer none = *h->t;
    none.net.n_params = 0;
    check(lvm_trainer_save(&none, path, NULL, &e) == LVM_OK, "%s", e.text);
    fails(lvm_trainer_load(h->t, path, &e), LVM_INVALID, &e, "lacks tensor token_embd.weight, which learns");
    free_trainer(h);
    free_trainer(lora);
    free_trainer(other);
}

/* A full disk leaves the checkpoint before, and nothing beside it. */
static void test_full_disk(void) {
#ifndef _WIN32
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F16, 0, 1);
    const char *path = in_folder("full.ckpt");
    where("full disk");
    check(lvm_trainer_save(h->t, path, "before", &e) == LVM_OK, "%s", e.text);
    h->t->step = 8;
    struct rlimit old, small;
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 10000;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    fails(lvm_trainer_save(h->t, path, "after", &e), LVM_IO, &e, "full.ckpt: cannot be written");
    fails(lvm_trainer_export(h->t, path, LVM_F32, NULL, &e), LVM_IO, &e, "cannot be written");
    setrlimit(RLIMIT_FSIZE, &old);
    char *note = lvm_checkpoint_note(path, &e);
    check(note != NULL && strcmp(note, "before") == 0, "the checkpoint before is gone: %s", e.text);
    lvm_memory_free(note);
    check(lvm_trainer_load(h->t, path, &e) == LVM_OK && h->t->step == 7, "%s", e.text);
    fails(lvm_trainer_save(h->t, in_folder("no/where"), NULL, &e), LVM_IO, &e, "cannot be written");
    free_trainer(h);
#endif
}

/* ---- Weights files out of a trainer ---- */

/* The model at a path, logits of a short prompt, and how its tensors differ from the trainer's. */
static float *logits_of(const lvm_model *m, const int32_t *ids, int n) {
    lvm_error e;
    lvm_options o = lvm_default_options();
    o.threads = 1;
    o.kv_type = LVM_F32;
    o.exact = 1;
    lvm_ctx *ctx = must(lvm_ctx_new(m, &o, &e));
    float *logits = must(calloc((size_t)m->llama.V, sizeof *logits));
    int code = lvm_prompt(ctx, ids, n, logits, &e);
    check(code == LVM_OK, "%s", e.text);
    lvm_ctx_free(ctx);
    return logits;
}

static const int32_t prompt_ids[] = {38, 3, 1, 4, 1, 5, 9, 2, 6};
enum { PROMPT = sizeof prompt_ids / sizeof *prompt_ids };

/* Row by row in floats. */
static float largest_difference(const struct tensor *a, const struct tensor *b) {
    float most = a->rows == b->rows && a->cols == b->cols ? 0 : HUGE_VALF;
    for (int r = 0; most < HUGE_VALF && r < a->rows; r++) {
        float x[256], y[256];
        row_to_f32(a->type, tensor_row(a, r), x, a->cols);
        row_to_f32(b->type, tensor_row(b, r), y, b->cols);
        for (int c = 0; c < a->cols; c++) most = fmaxf(most, fabsf(x[c] - y[c]));
    }
    return most;
}

/* F32: the trainer's own bits; other types: what row_from_f32 makes of them. AUTO: init's types. */
static void test_export(int init_type, int type) {
    lvm_error e;
    struct made_trainer *h = shaken(init_type, 0, 1);
    const char *path = in_folder("some.name.bin");
    where("export %d from %d", type, init_type);
    check(lvm_trainer_export(h->t, path, type, NULL, &e) == LVM_OK, "%s", e.text);
    lvm_model *m = lvm_open(path, 0, &e);
    check(m != NULL, "%s", e.text);
    for (int i = 0; m != NULL && i < m->n_specs; i++) {
        const struct tensor_spec *s = &m->specs[i];
        const struct param *p = NULL;
        for (int j = 0; j < h->t->net.n_params; j++)
            if (strcmp(h->t->net.params[j].name, s->name) == 0) p = &h->t->net.params[j];
        if (s->tensor->data == NULL) continue;
        if (p == NULL) {
            const struct tensor *own = h->m->specs[i].tensor;
            check(strncmp(s->name, "vq.", 3) == 0 && own->type == s->tensor->type &&
                  memcmp(own->data, s->tensor->data, (size_t)(own->rows * own->row_bytes)) == 0,
                  "%s of the tokenizer is another", s->name);
            continue;
        }
        int wanted = type == LVM_AUTO ? init_type : type;
        if (wanted == LVM_Q4_0 && type != LVM_AUTO && s->kind == T_OUTPUT) wanted = LVM_Q8_0;
        if (s->kind == T_VECTOR) wanted = LVM_F32;
        check(s->tensor->type == wanted, "%s has type %d, not %d", s->name, s->tensor->type, wanted);
        float bound = wanted == LVM_F32 ? 0 : wanted == LVM_F16 ? 0x1p-11f : wanted == LVM_BF16 ? 0x1p-8f
                      : wanted == LVM_Q8_0 ? 0.0045f : 0.13f;
        struct tensor learnt = p->w; /* [1][n] of a vector, of which the file's is [n][1] */
        if (s->kind == T_VECTOR) learnt.rows = learnt.cols, learnt.cols = 1, learnt.row_bytes = 4;
        float off = largest_difference(&learnt, s->tensor);
        check(off <= bound, "%s is off by %g", s->name, (double)off);
    }
    if (m != NULL) {
        check(m->llama.bos == 38 && m->llama.eos == 39 && m->llama.context == 40, "its keys differ");
        check(strcmp(m->name, "some.name") == 0, "its name is %s", m->name);
    }
    lvm_close(m);
    free_trainer(h);
}

/* The trainer's F32 tensors in a model in memory, and the exported file: the same logits. */
static void test_export_logits(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 0, 1);
    const char *path = in_folder("logits.bin");
    where("export, logits");
    for (int i = 0; i < h->m->n_specs; i++)
        for (int j = 0; j < h->t->net.n_params; j++) {
            const struct param *p = &h->t->net.params[j];
            struct tensor *own = h->m->specs[i].tensor;
            if (strcmp(h->m->specs[i].name, p->name) == 0)
                memcpy((uint8_t *)(uintptr_t)own->data, p->w.data,
                       (size_t)(own->rows * own->row_bytes));
        }
    check(lvm_trainer_export(h->t, path, LVM_F32, h->m, &e) == LVM_OK, "%s", e.text);
    lvm_model *m = must(lvm_open(path, LVM_NO_MMAP, &e));
    float *x = logits_of(h->m, prompt_ids, PROMPT), *y = logits_of(m, prompt_ids, PROMPT);
    check(memcmp(x, y, sizeof *x * (size_t)m->llama.V) == 0, "other logits");
    free(x);
    free(y);
    lvm_close(m);
    free_trainer(h);
}

/* A new model, tied or not, without a tokenizer. */
static void test_export_new(int tied) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 0, 1);
    lvm_train_options o = h->o;
    const char *path = in_folder("new.bin");
    where("export of a new model, tied %d", tied);
    o.init = NULL;
    o.tied = tied;
    o.layers = 2, o.width = 64, o.heads = 2, o.feed_forward = 96, o.vocab = 34, o.bos = 32, o.eos = 33;
    lvm_trainer *t = lvm_trainer_new(&o, &e);
    check(t != NULL, "%s", e.text);
    must(t);
    check(lvm_trainer_export(t, path, LVM_AUTO, NULL, &e) == LVM_OK, "%s", e.text);
    lvm_model *m = must(lvm_open(path, 0, &e));
    check(m->vq == NULL && (m->llama.output.data == m->llama.embed.data) == tied, "tied, or not");
    check(m->llama.embed.type == LVM_F16 && m->llama.layers[1].down.type == LVM_F16, "it is not F16");
    lvm_close(m);
    check(lvm_trainer_export(t, path, LVM_Q4_0, h->m, &e) == LVM_OK, "%s", e.text);
    m = must(lvm_open(path, 0, &e));
    check(m->llama.output.type == LVM_Q8_0 && m->llama.layers[1].down.type == LVM_Q4_0 &&
          m->llama.embed.type == (tied ? LVM_Q8_0 : LVM_Q4_0), "the matrix of the logits is not Q8_0");
    check(m->vq != NULL && m->vq->codes == 32, "it has no tokenizer");
    lvm_close(m);
    check(lvm_trainer_export(t, path, LVM_F32, NULL, &e) == LVM_OK, "%s", e.text);
    m = must(lvm_open(path, 0, &e));
    fails(lvm_trainer_export(t, in_folder("x.bin"), LVM_AUTO, m, &e), LVM_INVALID, &e,
          "new.bin: holds no tokenizer");
    lvm_close(m);
    struct llama small = *t->net.a;
    small.V = 31;
    const struct llama *a = t->net.a;
    t->net.a = &small;
    fails(lvm_trainer_export(t, in_folder("x.bin"), LVM_AUTO, h->m, &e), LVM_INVALID, &e,
          "has 32 codes, the transformer a vocabulary of 31");
    t->net.a = a;
    lvm_trainer_free(t);
    free_trainer(h);
}

/* ---- Adapters ---- */

/* W + scale B A in double, of one matrix. */
static float merged_error(const struct made_trainer *h, const char *name, const struct tensor *w,
                          const struct tensor *merged) {
    const struct param *a = NULL, *b = NULL;
    size_t n = strlen(name);
    float most = 0;
    for (int j = 0; j < h->t->net.n_params; j++) {
        const struct param *p = &h->t->net.params[j];
        if (strncmp(p->name, name, n) == 0 && strcmp(p->name + n, ".lora_a") == 0) a = p;
        if (strncmp(p->name, name, n) == 0 && strcmp(p->name + n, ".lora_b") == 0) b = p;
    }
    for (int r = 0; r < w->rows; r++) {
        float x[256], y[256];
        row_to_f32(w->type, tensor_row(w, r), x, w->cols);
        row_to_f32(merged->type, tensor_row(merged, r), y, w->cols);
        for (int c = 0; c < w->cols; c++) {
            double sum = 0;
            for (int k = 0; a != NULL && k < a->w.rows; k++)
                sum += (double)floats(&b->w)[r * b->w.cols + k] *
                       (double)floats(&a->w)[k * a->w.cols + c];
            most = fmaxf(most, fabsf((float)(x[c] + (double)h->t->net.lora_scale * sum) - y[c]));
        }
    }
    return most;
}

/* An adapter file, merged in memory, merged into a file, and the two have the same logits. */
static void test_adapters(int type, int adapter_type) {
    lvm_error e;
    struct made_trainer *h = shaken(type, 4, 5);
    const char *path = in_folder("style.bin"), *base = in_folder("base.bin"),
               *out = in_folder("merged.bin");
    where("adapters of %d on %d", adapter_type, type);
    check(write_file(base, h->file.data, h->file.size, &e) == LVM_OK, "%s", e.text);
    check(lvm_trainer_export(h->t, path, adapter_type, NULL, &e) == LVM_OK, "%s", e.text);
    check(lvm_open(path, 0, &e) == NULL && e.code == LVM_FORMAT &&
          strstr(e.text, "holds adapters, no model") != NULL, "%s", e.text);
    lvm_model *m = must(lvm_open(base, 0, &e));
    uint64_t plain = model_hash(m);
    check(lvm_apply_lora(m, path, &e) == LVM_OK, "%s", e.text);
    check(model_hash(m) != plain, "a cache of the model without them would be taken");
    float float_bound = type == LVM_BF16 ? 0.032f : type == LVM_F16 ? 0.004f : 2e-6f,
          bound = (type_is_quantised(type) ? 0.06f : float_bound) +
                  (adapter_type == LVM_F32 ? 0 : 0.05f);
    for (int i = 0; i < m->n_specs; i++) {
        const struct tensor_spec *s = &m->specs[i];
        int merged = strstr(s->name, "attn_q.weight") != NULL || strstr(s->name, "ffn_down") != NULL;
        if (s->tensor->data == NULL) continue;
        check((s->merged != NULL) == merged, "%s is merged, or is not", s->name);
        if (s->tensor->cols > 256 || s->n_dims != 2 || strncmp(s->name, "vq.", 3) == 0) continue;
        int wanted = !merged ? type : type_is_quantised(type) ? LVM_Q8_0 : type;
        check(s->tensor->type == wanted, "%s has type %d", s->name, s->tensor->type);
        float off = merged_error(h, s->name, h->m->specs[i].tensor, s->tensor);
        check(off <= bound, "%s is off by %g", s->name, (double)off);
    }
    int as = type_is_quantised(type) ? LVM_Q8_0 : LVM_AUTO;
    if (type != LVM_Q4_0) { /* of which the rest would change too */
        check(lvm_merge(base, path, out, as, 1, &e) == LVM_OK, "%s", e.text);
        lvm_model *n = must(lvm_open(out, 0, &e));
        float *x = logits_of(m, prompt_ids, PROMPT), *y = logits_of(n, prompt_ids, PROMPT);
        check(memcmp(x, y, sizeof *x * (size_t)m->llama.V) == 0, "other logits out of the file");
        check(strcmp(n->name, "lvm + style") == 0, "its name is %s", n->name);
        free(x);
        free(y);
        lvm_close(n);
    } else {
        check(lvm_merge(base, path, out, LVM_AUTO, 1, &e) == LVM_OK, "%s", e.text);
        lvm_model *n = must(lvm_open(out, 0, &e));
        check(n->llama.layers[0].q.type == LVM_Q4_0, "merged it is of type %d", n->llama.layers[0].q.type);
        lvm_close(n);
        lvm_ctx_free(must(lvm_ctx_new(m, NULL, &e)));
    }
    fails(lvm_apply_lora(m, path, &e), LVM_INVALID, &e, "has contexts already");
    lvm_close(m);
    free_trainer(h);
}

/* Two adapters one after the other: both are in it, and the first one's memory is freed. */
static void test_two_adapters(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 4, 5), *other = shaken(LVM_F32, 2, 6);
    const char *one = in_folder("one.bin"), *two = in_folder("two.bin");
    where("two adapters");
    check(lvm_trainer_export(h->t, one, LVM_AUTO, NULL, &e) == LVM_OK, "%s", e.text);
    check(lvm_trainer_export(other->t, two, LVM_AUTO, NULL, &e) == LVM_OK, "%s", e.text);
    int open = alloc_open;
    lvm_model *m = must(lvm_open_memory(h->file.data, h->file.size, &e));
    check(lvm_apply_lora(m, one, &e) == LVM_OK, "%s", e.text);
    struct tensor first = m->llama.layers[1].down;
    float *copy = tensor_floats(&first, &e);
    uint64_t hash = model_hash(m);
    check(lvm_apply_lora(m, two, &e) == LVM_OK && hash != model_hash(m), "%s", e.text);
    first.data = (const uint8_t *)copy;
    float off = merged_error(other, "blk.1.ffn_down.weight", &first, &m->llama.layers[1].down);
    check(off < 2e-6f, "off by %g", (double)off);
    mem_free(copy);
    lvm_ctx *ctx = must(lvm_ctx_new(m, NULL, &e));
    int64_t more = 2 * (32 * 32 + 32 * 64) * 4;
    check(lvm_ctx_usage(ctx).weights == (int64_t)h->file.size + more, "the memory is not counted");
    lvm_ctx_free(ctx);
    lvm_close(m);
    check(alloc_open == open, "%d allocations are left", alloc_open - open);
    free_trainer(h);
    free_trainer(other);
}

/* A file of adapters written by hand: name, dims of a, dims of b. */
static void write_adapters(const char *path, const char *type, const char *architecture, float alpha,
                           const char *a_name, const char *b_name, const int64_t *a,
                           const int64_t *b, float value) {
    lvm_error e;
    struct gguf_writer w = {.alignment = 64, .error = &e};
    float x[512];
    struct written list[2];
    int n = 0;
    for (int i = 0; i < 512; i++) x[i] = i == 300 ? value : 0.5f;
    put_text_key(&w, "general.architecture", architecture);
    if (type != NULL) put_text_key(&w, "general.type", type);
    put_int_key(&w, "lvm.format_version", 1);
    put_text_key(&w, "adapter.type", "lora");
    put_float_key(&w, "adapter.lora.alpha", alpha);
    const uint8_t *data = (const uint8_t *)x;
    list[n++] = (struct written){text_of(a_name), 2, LVM_F32, LVM_F32, {a[1], a[0], 1, 1}, data, NULL};
    if (b_name != NULL)
        list[n++] = (struct written){text_of(b_name), 2, LVM_F32, LVM_F32, {b[1], b[0], 1, 1}, data,
                                     NULL};
    check(write_weights(path, &w, list, n, 0, &e) == LVM_OK, "%s", e.text);
}

/* Each fault of a file of adapters has its message, and the model stays as it is. */
static void test_bad_adapters(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F32, 0, 1);
    const char *path = in_folder("bad.bin"), *out = in_folder("never.bin");
    const char *q = "blk.0.attn_q.weight.lora_a", *qb = "blk.0.attn_q.weight.lora_b";
    const int64_t a[] = {4, 32}, b[] = {32, 4}, tall[] = {64, 4}, wide[] = {4, 64}, thin[] = {32, 2};
    where("bad adapters");
    uint64_t plain = model_hash(h->m);
#define BAD(code, words) fails(lvm_apply_lora(h->m, path, &e), code, &e, words)
    write_adapters(path, "adapter", "lvm", 8, q, qb, a, b, 1);
    write_adapters(path, "adapter", "llama", 8, q, qb, a, b, 1);
    BAD(LVM_FORMAT, "another architecture than lvm");
    write_adapters(path, NULL, "lvm", 8, q, qb, a, b, 1);
    BAD(LVM_FORMAT, "holds no adapters");
    write_adapters(path, "adapter", "lvm", 0, q, qb, a, b, 1);
    BAD(LVM_FORMAT, "adapter.lora.alpha is 0");
    write_adapters(path, "adapter", "lvm", NAN, q, qb, a, b, 1);
    BAD(LVM_FORMAT, "adapter.lora.alpha is");
    write_adapters(path, "adapter", "lvm", 8, q, NULL, a, b, 1);
    BAD(LVM_FORMAT, "tensor blk.0.attn_q.weight.lora_b is missing");
    write_adapters(path, "adapter", "lvm", 8, qb, NULL, b, b, 1);
    BAD(LVM_FORMAT, "holds 0 adapters in 1 tensors");
    write_adapters(path, "adapter", "lvm", 8, "blk.0.attn_q.weight", NULL, b, b, 1);
    BAD(LVM_FORMAT, "tensor blk.0.attn_q.weight is no half of an adapter");
    write_adapters(path, "adapter", "lvm", 8, q, qb, a, thin, 1);
    BAD(LVM_FORMAT, "are no two matrices of floats and one rank");
    write_adapters(path, "adapter", "lvm", 8, q, qb, a, tall, 1);
    BAD(LVM_INVALID, "is for blk.0.attn_q.weight of 64 x 32; in (memory) it is 32 x 32");
    write_adapters(path, "adapter", "lvm", 8, q, qb, wide, b, 1);
    BAD(LVM_INVALID, "is for blk.0.attn_q.weight of 32 x 64; in (memory) it is 32 x 32");
    write_adapters(path, "adapter", "lvm", 8, "token_embd.weight.lora_a", "token_embd.weight.lora_b",
                   a, b, 1);
    BAD(LVM_INVALID, "has an adapter for token_embd.weight, which is no matrix of (memory)");
    write_adapters(path, "adapter", "lvm", 8, "blk.2.attn_q.weight.lora_a",
                   "blk.2.attn_q.weight.lora_b", a, b, 1);
    BAD(LVM_INVALID, "has an adapter for blk.2.attn_q.weight");
    const int64_t ten[] = {10, 32}, by_ten[] = {32, 10};
    write_adapters(path, "adapter", "lvm", 8, q, qb, ten, by_ten, NAN);
    BAD(LVM_FORMAT, "the adapter of blk.0.attn_q.weight holds NaN or infinity");
    write_adapters(path, "adapter", "lvm", 8, q, qb, ten, by_ten, HUGE_VALF);
    BAD(LVM_FORMAT, "the adapter of blk.0.attn_q.weight holds NaN or infinity");
    check(write_file(path, h->file.data, h->file.size, &e) == LVM_OK, "%s", e.text);
    BAD(LVM_FORMAT, "holds no adapters");
    check(write_file(path, h->file.data, 0, &e) == LVM_OK, "%s", e.text);
    BAD(LVM_FORMAT, "is empty");
#undef BAD
    check(model_hash(h->m) == plain, "a failure changed the model");
    const char *base = in_folder("base.bin");
    write_adapters(path, "adapter", "lvm", 8, q, qb, a, b, 1);
    check(write_file(base, h->file.data, h->file.size, &e) == LVM_OK, "%s", e.text);
    fails(lvm_merge(base, path, base, LVM_AUTO, 1, &e), LVM_INVALID, &e, "is the input too");
    fails(lvm_merge(base, path, path, LVM_AUTO, 1, &e), LVM_INVALID, &e, "is the input too");
    fails(lvm_merge(base, path, out, 7, 1, &e), LVM_INVALID, &e, "unknown type 7");
    fails(lvm_merge(path, base, out, LVM_AUTO, 1, &e), LVM_FORMAT, &e, "holds adapters, no model");
    fails(lvm_merge(base, base, out, LVM_AUTO, 1, &e), LVM_FORMAT, &e, "holds no adapters");
    check(os_stat(out).kind == OS_NOTHING, "a failed merge left a file");
    check(lvm_merge(base, path, out, LVM_AUTO, 0, &e) == LVM_OK, "%s", e.text);
    fails(lvm_merge(base, path, out, LVM_AUTO, 0, &e), LVM_INVALID, &e, "exists; --force replaces it");
    remove(out);
    free_trainer(h);
}

/* PEFT's logits, with the adapters beside the model; here merged with it in memory and in a file. */
static void test_peft(const char *base, const char *lora, const char *golden) {
    lvm_error e;
    struct npy ids = npy_load(golden, "ids"), wanted = npy_load(golden, "logits");
    const char *out = in_folder("peft.bin");
    lvm_options o = lvm_default_options();
    o.threads = 2;
    check(lvm_merge(base, lora, out, LVM_AUTO, 1, &e) == LVM_OK, "%s", e.text);
    for (int i = 0; i < 2; i++) {
        where("PEFT's logits, merged in %s", i == 0 ? "memory" : "a file");
        lvm_model *m = must(lvm_open(i == 0 ? base : out, 0, &e));
        if (i == 0) check(lvm_apply_lora(m, lora, &e) == LVM_OK, "%s", e.text);
        int n = (int)ids.n, V = m->llama.V;
        float *logits = must(calloc((size_t)n * (size_t)V, sizeof *logits)), most = 0;
        lvm_ctx *ctx = must(lvm_ctx_new(m, &o, &e));
        check(lvm_prompt(ctx, npy_i32(&ids), 1, logits, &e) == LVM_OK, "%s", e.text);
        check(lvm_logits(ctx, npy_i32(&ids) + 1, n - 1, logits + V, &e) == LVM_OK, "%s", e.text);
        check(wanted.n == (int64_t)n * V, "%lld logits", (long long)wanted.n);
        for (int64_t j = 0; j < wanted.n; j++)
            most = fmaxf(most, fabsf(logits[j] - npy_f32(&wanted)[j]));
        check(most < 1e-4f, "off by %g", (double)most);
        printf("largest difference from PEFT's logits: %g\n", (double)most);
        free(logits);
        lvm_ctx_free(ctx);
        lvm_close(m);
    }
    npy_free(&ids);
    npy_free(&wanted);
}

/* ---- Arguments and memory ---- */

static void test_arguments(void) {
    struct made_trainer *h = shaken(LVM_F32, 0, 1), *lora = shaken(LVM_F32, 4, 1);
    where("arguments");
    INVALID(lvm_trainer_save(NULL, "x", NULL, e));
    INVALID(lvm_trainer_save(h->t, NULL, NULL, e));
    INVALID(lvm_trainer_load(NULL, "x", e));
    INVALID(lvm_trainer_load(h->t, NULL, e));
    REFUSES(lvm_checkpoint_note(NULL, e));
    INVALID(lvm_trainer_export(NULL, "x", LVM_AUTO, NULL, e));
    INVALID(lvm_trainer_export(h->t, NULL, LVM_AUTO, NULL, e));
    INVALID(lvm_trainer_export(h->t, "x", 7, NULL, e));
    INVALID(lvm_trainer_export(lora->t, "x", LVM_Q8_0, NULL, e));
    INVALID(lvm_apply_lora(NULL, "x", e));
    INVALID(lvm_apply_lora(h->m, NULL, e));
    INVALID(lvm_merge(NULL, "x", "y", LVM_AUTO, 0, e));
    INVALID(lvm_merge("x", NULL, "y", LVM_AUTO, 0, e));
    INVALID(lvm_merge("x", "y", NULL, LVM_AUTO, 0, e));
    free_trainer(h);
    free_trainer(lora);
}

/* Every allocation of every call fails once: an error, nothing changed, no leak. */
static void test_memory(void) {
    lvm_error e;
    struct made_trainer *h = shaken(LVM_F16, 4, 1);
    const char *base = in_folder("base.bin"), *lora = in_folder("lora.bin"),
               *ckpt = in_folder("run.ckpt"), *out = in_folder("memory.bin");
    check(write_file(base, h->file.data, h->file.size, &e) == LVM_OK, "%s", e.text);
    check(lvm_trainer_export(h->t, lora, LVM_AUTO, NULL, &e) == LVM_OK, "%s", e.text);
    check(lvm_trainer_save(h->t, ckpt, "note", &e) == LVM_OK, "%s", e.text);
    uint64_t before = trainer_hash(h->t);
    for (int call = 0; call < 6; call++)
        for (int at = 0, code = LVM_MEMORY; code != LVM_OK; at++) {
            where("call %d, allocation %d", call, at);
            lvm_model *m = must(lvm_open(base, 0, &e));
            uint64_t plain = model_hash(m);
            int open = alloc_open;
            char *note = NULL;
            alloc_calls = 0;
            alloc_fails = at;
            if (call == 0) code = lvm_trainer_save(h->t, ckpt, "note", &e);
            if (call == 1) code = lvm_trainer_load(h->t, ckpt, &e);
            if (call == 2) code = (note = lvm_checkpoint_note(ckpt, &e)) != NULL ? LVM_OK : e.code;
            if (call == 3) code = lvm_trainer_export(h->t, out, LVM_AUTO, NULL, &e);
            if (call == 4) code = lvm_apply_lora(m, lora, &e);
            if (call == 5) code = lvm_merge(base, lora, out, LVM_AUTO, 1, &e);
            alloc_fails = -1;
            check(code == LVM_OK || (code == LVM_MEMORY && e.text[0] != 0), "%d: %s", code, e.text);
            check(code == LVM_OK || model_hash(m) == plain, "the model has changed");
            check(trainer_hash(h->t) == before, "the trainer has changed");
            lvm_memory_free(note);
            check(call == 4 || alloc_open == open, "%d allocations are left", alloc_open - open);
            lvm_close(m);
            if (at > 1000) abort();
        }
    remove(out);
    free_trainer(h);
}

int main(int argc, char **argv) {
    if (argc != 2 && argc != 5) return 2;
    folder = argv[1];
#ifdef _WIN32
    mkdir(folder);
#else
    mkdir(folder, 0777);
#endif
    int open = alloc_open;
    test_round_trip(0);
    test_round_trip(4);
    test_damage();
    test_hostile_state();
    test_configuration();
    test_resume(0);
    test_resume(4);
    test_full_disk();
    static const int types[] = {LVM_F32, LVM_F16, LVM_BF16, LVM_Q8_0, LVM_Q4_0};
    for (int i = 0; i < 5; i++) {
        test_export(LVM_F32, types[i]);
        test_export(types[i], LVM_AUTO);
        test_adapters(types[i], LVM_F32);
    }
    test_adapters(LVM_F32, LVM_F16);
    test_adapters(LVM_F16, LVM_BF16);
    test_export_logits();
    test_export_new(0);
    test_export_new(1);
    test_two_adapters();
    test_bad_adapters();
    if (argc == 5) test_peft(argv[2], argv[3], argv[4]);
    test_arguments();
    test_memory();
    where("end");
    check(alloc_open == open, "%d allocations are left", alloc_open - open);
    return checked("checkpoint");
}
