/* embed.c - lvm inside a C program: a prompt made of files and of pixels in memory.

       cc -O2 -ffp-contract=off -DLVM_NO_MAIN -o embed examples/embed.c lvm.c -lm -lpthread
       ./embed weights.bin prompt/colorize/08.png prompt/colorize/09.png

   Colours the last image. The others are examples: of each the prompt holds a grey copy, which
   this program computes, and the image itself. Several examples are better than one. */
#define LVM_API_ONLY
#include "../lvm.c"
#include <stdio.h>
#include <stdlib.h>

/* Any width * height * 3 bytes are an image, rows from the top; these are ours to free. */
static int grey_copy(const lvm_image *colour, lvm_image *grey, lvm_error *error) {
    size_t pixels = (size_t)colour->width * (size_t)colour->height;
    uint8_t *to = malloc(3 * pixels);
    if (to == NULL) {
        *error = (lvm_error){LVM_MEMORY, "out of memory"};
        return LVM_MEMORY;
    }
    *grey = (lvm_image){.width = colour->width, .height = colour->height, .rgb = to};
    for (const uint8_t *c = colour->rgb; pixels > 0; pixels--, c += 3, to += 3)
        to[0] = to[1] = to[2] = (uint8_t)((299 * c[0] + 587 * c[1] + 114 * c[2] + 500) / 1000);
    return LVM_OK;
}

/* prompt[2 i] is the grey copy of file i, prompt[2 i + 1] the image that was loaded from it. */
static int make_prompt(char **files, int n, lvm_image *prompt, lvm_error *error) {
    int code = LVM_OK;
    for (int i = 0; code == LVM_OK && i < n; i++) {
        code = lvm_image_load(files[i], &prompt[2 * i + 1], error);
        if (code == LVM_OK) code = grey_copy(&prompt[2 * i + 1], &prompt[2 * i], error);
    }
    return code;
}

static void free_prompt(lvm_image *prompt, int n) {
    for (int i = 0; prompt != NULL && i < n; i++) {
        free(prompt[2 * i].rgb);            /* ours */
        lvm_image_free(&prompt[2 * i + 1]); /* lvm's */
    }
    free(prompt);
}

/* What follows grey, colour, grey, colour, ..., grey? */
static int predict(lvm_ctx *ctx, char **files, int n, lvm_image *answer, lvm_error *error) {
    lvm_image *prompt = calloc((size_t)n, 2 * sizeof *prompt);
    lvm_sampling sampling = lvm_default_sampling();
    int code = LVM_MEMORY;
    *error = (lvm_error){LVM_MEMORY, "out of memory"};
    sampling.seed = 1;
    if (prompt != NULL) code = make_prompt(files, n, prompt, error);
    if (code == LVM_OK)
        code = lvm_predict(ctx, prompt, 2 * n - 1, &sampling, 1, 1, answer, error);
    free_prompt(prompt, n);
    return code;
}

int main(int argc, char **argv) {
    lvm_error error = {LVM_OK, ""};
    lvm_image answer = {0};
    if (argc < 3) return fprintf(stderr, "usage: embed WEIGHTS IMAGE...\n"), 2;
    lvm_model *model = lvm_open(argv[1], 0, &error);
    lvm_ctx *ctx = model != NULL ? lvm_ctx_new(model, NULL, &error) : NULL;
    int done = ctx != NULL && predict(ctx, argv + 2, argc - 2, &answer, &error) == LVM_OK &&
               lvm_image_save("out.png", &answer, &error) == LVM_OK;
    if (done) printf("out.png: %d x %d\n", answer.width, answer.height);
    else fprintf(stderr, "embed: %s\n", error.text);
    lvm_image_free(&answer);
    lvm_ctx_free(ctx);
    lvm_close(model);
    return !done;
}
