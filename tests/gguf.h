/* Small models in memory for the test drivers: sizes in, a GGUF file with random weights out, written
   by chapter 14's writer from chapter 4's description. Include behind lvm.c without LVM_NO_MAIN,
   with main renamed: the writer of whole models belongs to the program. What others read of that
   writer's files: tests/README.md. */
#ifndef GGUF_H
#define GGUF_H

struct model_file {
    uint8_t *data;
    size_t size, data_start;
};

static float uniform_of(struct rng *r) { return (float)(int32_t)rng_next(r) * 0x1p-31f; }

/* Norms' scales lie around 1, other vectors around 0, matrices so that a row's products keep their
   size. */
static void fill_tensor(const struct tensor_spec *s, int type, uint8_t *out, struct rng *rng) {
    int norm = strstr(s->name, "norm") != NULL && strstr(s->name, ".weight") != NULL;
    int64_t k = s->n_dims == 1 ? 1 : s->dims[s->n_dims - 1], rows = 1, cols = 1;
    for (int d = 0; d < s->n_dims; d++) rows *= s->dims[d];
    for (int d = 1; d < s->n_dims; d++) cols *= s->dims[d];
    float size = s->kind == T_VECTOR  ? 0.2f
                 : s->kind == T_EMBED || strstr(s->name, "quantize") != NULL ? 1
                 : s->kind == T_OUTPUT ? 0.5f
                                       : 2 / sqrtf((float)cols);
    float *row = must(calloc((size_t)k, sizeof *row));
    for (rows /= k; rows > 0; rows--, out += type_bytes(type, k)) {
        for (int64_t i = 0; i < k; i++)
            row[i] = (s->kind == T_VECTOR && norm ? 1.0f : 0.0f) + size * uniform_of(rng);
        row_from_f32(type, row, out, k);
    }
    free(row);
}

/* The sizes of a transformer (L 0: none) and of a tokenizer (NULL: none), the types of their
   matrices; rows that are no multiple of a block become F16. Biases: on q, k and v. data is
   free()d. Behind check.h. */
static struct model_file make_model(const struct llama *llama, const struct vqgan *vq, int type,
                                    int vq_type) {
    struct rng rng = rng_new(7, (uint64_t)type);
    struct gguf_writer w = {.alignment = 64};
    struct buffer head = {0};
    lvm_model *shape = must(model_new("(test)", NULL));
    shape->llama = *llama;
    if (vq != NULL) {
        shape->vq = must(mem_alloc(1, sizeof *vq, NULL));
        *shape->vq = *vq;
    }
    if (describe_model(shape, NULL) != LVM_OK) abort();
    put_model_keys(&w, shape);
    size_t *at = must(calloc((size_t)shape->n_specs + 1, sizeof *at));
    int *types = must(calloc((size_t)shape->n_specs + 1, sizeof *types));
    for (int i = 0; i < shape->n_specs; i++) {
        const struct tensor_spec *s = &shape->specs[i];
        int64_t ne[4];
        for (int d = 0; d < s->n_dims; d++) ne[d] = s->dims[s->n_dims - 1 - d];
        types[i] = s->kind == T_VECTOR ? LVM_F32 : strncmp(s->name, "vq.", 3) == 0 ? vq_type : type;
        if (ne[0] % type_info(types[i])->block != 0) types[i] = LVM_F16;
        if (strstr(s->name, "attn_output.bias") != NULL) types[i] = -1;
        else at[i] = put_tensor(&w, text_of(s->name), s->n_dims, ne, types[i]);
    }
    if (finish_head(&w, &head) != LVM_OK) abort();
    struct model_file f = {must(calloc(1, head.n + w.data_bytes)), head.n + w.data_bytes, head.n};
    memcpy(f.data, head.data, head.n);
    for (int i = 0; i < shape->n_specs; i++)
        if (types[i] >= 0) fill_tensor(&shape->specs[i], types[i], f.data + head.n + at[i], &rng);
    mem_free(head.data);
    free(at);
    free(types);
    lvm_close(shape);
    return f;
}

/* Puts two bytes into the first number of a tensor's middle row: a whole one of 16 bits, the upper
   half of an F32, a block's scale. Returns those that were there. 0x7fff is NaN in all of them. */
static inline uint16_t spoil(struct model_file *f, const struct tensor *t, uint16_t bits) {
    uint8_t *at = f->data + (tensor_row(t, t->rows / 2) - f->data) + (t->type == LVM_F32 ? 2 : 0);
    uint16_t old;
    memcpy(&old, at, sizeof old);
    memcpy(at, &bits, sizeof bits);
    return old;
}

#endif
