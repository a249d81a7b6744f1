/* A trainer whose tensors are random numbers, for tests of what is kept of one: checkpoints, exports.
   It is made by hand from a small model, so that nothing of training itself takes part. Include
   behind lvm.c (without LVM_NO_MAIN, with main renamed), check.h and gguf.h. */
#ifndef TRAINER_H
#define TRAINER_H

struct hand_made {
    struct model_file file;
    lvm_model *m;
    lvm_tokens tokens[2];
    char names[2][16];
    const lvm_tokens *data[2];
    struct lvm_trainer t;
};

static void random_floats(float *x, int64_t n, struct rng *rng) {
    for (int64_t i = 0; i < n; i++) x[i] = uniform_of(rng);
}

/* A tensor that learns where `learns`, else in the model's type. */
static void hand_make_param(struct param *p, const char *name, struct tensor w, int learning,
                            struct rng *rng) {
    int64_t n = (int64_t)w.rows * w.cols;
    *p = (struct param){.name = name, .w = w, .decays = w.cols > 1};
    if (!learning) return;
    float *x = must(mem_alloc((size_t)n, 4 * sizeof *x, NULL));
    random_floats(x, 4 * n, rng);
    p->w = (struct tensor){(uint8_t *)x, 4 * (int64_t)w.cols, LVM_F32, w.rows, w.cols};
    p->g = x + n, p->m = x + 2 * n, p->v = x + 3 * n;
}

static const struct llama hand_made_sizes = {.context = 40, .L = 2, .D = 32, .F = 64, .H = 2, .G = 1,
                                             .d = 16, .V = 40, .bos = 38, .eos = 39, .eps = 1e-5f,
                                             .theta = 10000};
static const struct vqgan hand_made_vq = {.R = 4, .hidden = 32, .z = 4, .codes = 32, .code_dim = 4,
                                          .n_res_blocks = 1, .resample_conv = 1, .n_levels = 3,
                                          .mult = {1, 2, 1}};

/* As if begun from a model of matrices of `type`; rank > 0: with adapters on q and down of each
   layer, of F32, instead of the weights. */
static struct hand_made *hand_make(int type, int rank, uint64_t seed) {
    struct rng rng = rng_new(seed, 1);
    struct hand_made *h = must(calloc(1, sizeof *h));
    struct lvm_trainer *t = &h->t;
    h->file = make_model(&hand_made_sizes, &hand_made_vq, type, LVM_F16);
    h->m = must(lvm_open_memory(h->file.data, h->file.size, NULL));
    const struct llama *a = &h->m->llama;
    for (int i = 0; i < 2; i++) {
        h->tokens[i].name = h->names[i];
        snprintf(h->names[i], sizeof h->names[i], "%s.tok", i == 0 ? "one" : "two");
        h->tokens[i].fingerprint = 0x123456789abcdefu + (uint64_t)i;
        h->data[i] = &h->tokens[i];
    }
    t->o = lvm_default_train_options();
    t->o.init = h->m;
    t->o.lora_rank = rank;
    t->o.data = h->data;
    t->o.n_data = 2;
    t->m = h->m;
    t->stream.n_sentences = 9;
    t->net.a = a;
    t->net.params = must(calloc((size_t)h->m->n_specs + 4 * (size_t)a->L, sizeof *t->net.params));
    t->net.lora_scale = rank > 0 ? t->o.lora_alpha / (float)rank : 0;
    for (int i = 0; i < h->m->n_specs; i++) {
        const struct tensor_spec *s = &h->m->specs[i];
        struct param *p = &t->net.params[t->net.n_params];
        if (strncmp(s->name, "vq.", 3) == 0 || gguf_tensor(&h->m->file, s->name) == NULL) continue;
        hand_make_param(p, s->name, *s->tensor, rank == 0, &rng);
        if (strcmp(s->name, "output.weight") == 0) t->net.output.w = p;
        t->net.n_params++;
    }
    static const char *const names[] = {"attn_q.weight.lora_a", "attn_q.weight.lora_b",
                                        "ffn_down.weight.lora_a", "ffn_down.weight.lora_b"};
    for (int i = 0; rank > 0 && i < 4 * a->L; i++) {
        char *name = must(calloc(1, 64));
        const struct tensor *w = i % 4 < 2 ? &a->layers[i / 4].q : &a->layers[i / 4].down;
        snprintf(name, 64, "blk.%d.%s", i / 4, names[i % 4]);
        struct tensor half = {NULL, 0, LVM_F32, i % 2 == 0 ? rank : w->rows,
                              i % 2 == 0 ? w->cols : rank};
        hand_make_param(&t->net.params[t->net.n_params++], name, half, 1, &rng);
    }
    t->step = 7, t->tokens = 12345, t->skipped = 2, t->in_a_row = 1, t->usual_norm = 0.625;
    t->at = (struct data_position){3, 4, 5};
    return h;
}

static void hand_free(struct hand_made *h) {
    for (int i = 0; i < h->t.net.n_params; i++) {
        struct param *p = &h->t.net.params[i];
        if (p->g != NULL) mem_free((void *)(uintptr_t)p->w.data);
        if (strstr(p->name, ".lora_") != NULL) free((void *)(uintptr_t)p->name);
    }
    free(h->t.net.params);
    lvm_close(h->m);
    free(h->file.data);
    free(h);
}

#endif
