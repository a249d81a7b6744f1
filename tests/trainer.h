/* A small trainer for tests of what is kept of one. Include behind lvm.c (without LVM_NO_MAIN, with
   main renamed), check.h and gguf.h. */
#ifndef TRAINER_H
#define TRAINER_H

struct made_trainer {
    struct model_file file;   /* what it begins from, */
    lvm_model *m;             /* opened */
    struct buffer bytes[2];   /* its data, one.tok and two.tok, */
    lvm_tokens *data[2];      /* opened */
    lvm_train_options o;
    lvm_trainer *t;
};

static const struct llama trainer_sizes = {.context = 40, .L = 2, .D = 32, .F = 64, .H = 2, .G = 1,
                                           .d = 16, .V = 40, .bos = 38, .eos = 39, .eps = 1e-5f,
                                           .theta = 10000};
static const struct vqgan trainer_vq = {.R = 4, .hidden = 32, .z = 4, .codes = 32, .code_dim = 4,
                                        .n_res_blocks = 1, .resample_conv = 1, .n_levels = 3,
                                        .mult = {1, 2, 1}};

/* A .tok file in memory: sentences of up to 9 random ids. */
static struct buffer make_tokens(int n, uint64_t seed) {
    struct rng rng = rng_new(seed, 2);
    struct token_writer w;
    int32_t ids[9];
    if (token_writer_open(&w, NULL, NULL) != LVM_OK) abort();
    for (int i = 0; i < n; i++) {
        int length = 1 + (int)(rng_next(&rng) % 9);
        for (int j = 0; j < length; j++) ids[j] = (int32_t)(rng_next(&rng) % 32);
        if (token_writer_add(&w, ids, NULL, (size_t)length, NULL) != LVM_OK) abort();
    }
    if (token_writer_close(&w, LVM_OK, NULL) != LVM_OK) abort();
    return w.memory;
}

/* From a model of matrices of `type`; rank > 0: with adapters on q and down instead of the weights. */
static struct made_trainer *make_trainer(int type, int rank) {
    struct made_trainer *h = must(calloc(1, sizeof *h));
    lvm_error e = {0, ""};
    h->file = make_model(&trainer_sizes, &trainer_vq, type, LVM_F16);
    h->m = must(lvm_open_memory(h->file.data, h->file.size, NULL));
    for (int i = 0; i < 2; i++) {
        h->bytes[i] = make_tokens(9 + i, (uint64_t)i);
        h->data[i] = must(lvm_tokens_open_memory(h->bytes[i].data, h->bytes[i].n,
                                                 i == 0 ? "one.tok" : "two.tok", NULL));
    }
    h->o = lvm_default_train_options();
    h->o.threads = 1;
    h->o.init = h->m;
    h->o.lora_rank = rank;
    h->o.lora_on = rank > 0 ? "q,down" : NULL;
    h->o.context = 24;
    h->o.batch = 2;
    h->o.data = (const lvm_tokens *const *)h->data;
    h->o.n_data = 2;
    h->t = lvm_trainer_new(&h->o, &e);
    if (h->t == NULL) fprintf(stderr, "%s\n", e.text);
    must(h->t);
    return h;
}

static inline void random_floats(float *x, int64_t n, struct rng *rng) {
    for (int64_t i = 0; i < n; i++) x[i] = uniform_of(rng);
}

/* Random values of all that learns, and a state as if in the midst of it. */
static inline void shake(struct made_trainer *h, uint64_t seed) {
    struct rng rng = rng_new(seed, 3);
    for (int i = 0; i < h->t->net.n_params; i++) {
        struct param *p = &h->t->net.params[i];
        int64_t n = (int64_t)p->w.rows * p->w.cols;
        float *all[] = {p->values, p->g, p->m, p->v};
        for (int k = 0; p->learns && k < 4; k++) random_floats(all[k], n, &rng);
    }
    h->t->step = 7, h->t->tokens = 12345, h->t->skipped = 2, h->t->in_a_row = 1;
    h->t->usual_norm = 0.625;
    h->t->at = (struct data_position){3, 4, 1};
}

static inline void free_trainer(struct made_trainer *h) {
    lvm_trainer_free(h->t);
    for (int i = 0; i < 2; i++) {
        lvm_tokens_close(h->data[i]);
        mem_free(h->bytes[i].data);
    }
    lvm_close(h->m);
    free(h->file.data);
    free(h);
}

#endif
