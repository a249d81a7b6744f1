/* stream.c - an image that can be seen while it is generated.

       cc -O2 -ffp-contract=off -DLVM_NO_MAIN -o stream examples/stream.c lvm.c -lm -lpthread
       ./stream weights.bin prompt/01.png prompt/02.png prompt/03.png

   Tokens come row by row from the top. After every fourth row out.png is written anew; what is not
   there yet repeats the last row. */
#define LVM_API_ONLY
#include "../lvm.c"
#include <stdio.h>
#include <stdlib.h>

struct stream {
    lvm_ctx *decoder; /* a second context of the model: the first is at work */
    int side;         /* tokens of a row, and rows */
    int32_t *ids;     /* [side][side] */
    lvm_error error;
};

/* The image as far as it is known. */
static int show(struct stream *s, int rows) {
    lvm_image image;
    for (int i = rows * s->side; i < s->side * s->side; i++) s->ids[i] = s->ids[i - s->side];
    int code = lvm_decode(s->decoder, s->ids, 1, &image, &s->error);
    if (code == LVM_OK) code = lvm_image_save("out.png", &image, &s->error);
    if (code == LVM_OK) printf("out.png: %d of %d rows\n", rows, s->side);
    fflush(stdout);
    lvm_image_free(&image);
    return code;
}

/* lvm calls this for each token that it has drawn. With logits (the scores of all tokens) a program
   could put another one into *id; this one only looks on. */
static int on_token(void *user, int candidate, int index, const float *logits, int32_t *id) {
    struct stream *s = user;
    int rows = (index + 1) / s->side;
    (void)candidate, (void)logits;
    s->ids[index] = *id;
    if ((index + 1) % (4 * s->side) != 0 || rows == s->side) return 0;
    return show(s, rows) != LVM_OK; /* not 0: generating stops */
}

/* Reads the prompt, image by image from its file. */
static int read_prompt(lvm_ctx *ctx, char **files, int n, lvm_error *error) {
    lvm_image *images = calloc((size_t)n, sizeof *images);
    int code = images != NULL ? LVM_OK : LVM_MEMORY;
    for (int i = 0; code == LVM_OK && i < n; i++)
        code = lvm_image_load(files[i], &images[i], error);
    if (code == LVM_OK) code = lvm_prompt_images(ctx, images, n, error);
    for (int i = 0; images != NULL && i < n; i++) lvm_image_free(&images[i]);
    free(images);
    return code;
}

static int predict(lvm_ctx *ctx, struct stream *s) {
    lvm_sampling sampling = lvm_default_sampling();
    lvm_error error;
    sampling.user = s;
    sampling.choose = on_token;
    int n = s->side * s->side, code = lvm_generate(ctx, &sampling, 1, n, s->ids, &error);
    if (code == LVM_OK) return show(s, s->side);
    if (s->error.code == LVM_OK) s->error = error; /* or it says why show stopped it */
    return code;
}

int main(int argc, char **argv) {
    struct stream s = {.side = 1, .error = {LVM_OK, ""}};
    if (argc < 3) return fprintf(stderr, "usage: stream WEIGHTS IMAGE...\n"), 2;
    lvm_model *model = lvm_open(argv[1], 0, &s.error);
    lvm_ctx *ctx = model != NULL ? lvm_ctx_new(model, NULL, &s.error) : NULL;
    if (ctx != NULL) s.decoder = lvm_ctx_new(model, NULL, &s.error);
    int tokens = lvm_model_info(model).tokens_per_image;
    while (s.side * s.side < tokens) s.side++;
    s.ids = calloc((size_t)s.side * (size_t)s.side, sizeof *s.ids);
    int done = s.decoder != NULL && s.ids != NULL &&
               read_prompt(ctx, argv + 2, argc - 2, &s.error) == LVM_OK &&
               predict(ctx, &s) == LVM_OK;
    if (!done) fprintf(stderr, "stream: %s\n", s.error.text);
    free(s.ids);
    lvm_ctx_free(s.decoder);
    lvm_ctx_free(ctx);
    lvm_close(model);
    return !done;
}
