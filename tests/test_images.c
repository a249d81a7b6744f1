/* Tests of chapter 11: reading, writing and resizing images against the vectors of
   make_image_vectors.py, and properties: saved = loaded, cut files and flipped bits are errors or
   images but never crashes, bytes behind an image do not matter, images in a row come out one by
   one, a crop is a part of the whole and costs only that, a full disk leaves the old file.

       test_images tests/images                     everything above; non-zero when a check fails
       test_images tests/images --fuzz SECONDS      mutates the vectors for that long; meant for a
                                                    build with -DLVM_FUZZING and sanitizers */
#include <stddef.h>
void *measured_calloc(size_t count, size_t size);
void measured_free(void *p);
#define LVM_NO_MAIN
#define LVM_CALLOC measured_calloc
#define LVM_FREE measured_free
#include "../lvm.c"
#include "check.h"
#include <signal.h>
#include <stdio.h>
#include <time.h>
#ifdef _WIN32
#define TEMPORARY "test_images.XXXXXX"
static char *mkdtemp(char *name) { return _mktemp(name) && _mkdir(name) == 0 ? name : NULL; }
#else
#include <sys/resource.h>
#define TEMPORARY "/tmp/test_images.XXXXXX"
#endif

/* Memory of lvm in use, and the most since somebody set peak to it. */
static size_t in_use, peak;

void *measured_calloc(size_t count, size_t size) {
    size_t *p = calloc(1, count * size + 2 * sizeof *p);
    if (p == NULL) return NULL;
    p[0] = count * size;
    in_use += p[0];
    if (in_use > peak) peak = in_use;
    return p + 2;
}

void measured_free(void *p) {
    if (p == NULL) return;
    in_use -= ((size_t *)p)[-2];
    free((size_t *)p - 2);
}

struct source {
    const char *folder; /* of the vectors */
    uint32_t random;
};

static uint32_t lcg(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return *state >> 24;
}

static uint32_t random_below(struct source *t, uint32_t n) {
    uint32_t r = lcg(&t->random) << 16;
    r |= lcg(&t->random) << 8;
    return (r | lcg(&t->random)) % n;
}

static uint64_t fnv(const uint8_t *data, size_t size) {
    uint64_t h = 0xCBF29CE484222325u;
    for (size_t i = 0; i < size; i++) h = (h ^ data[i]) * 0x100000001B3u;
    return h;
}

static size_t pixel_bytes(const lvm_image *image) {
    return (size_t)image->width * (size_t)image->height * 3;
}

static int same_image(const lvm_image *a, const lvm_image *b) {
    return a->width == b->width && a->height == b->height && a->rgb && b->rgb &&
           memcmp(a->rgb, b->rgb, pixel_bytes(a)) == 0;
}

/* ---- Formula images: the same as in make_image_vectors.py ---- */

static void formula_pixel(const char *kind, int x, int y, int w, int h, uint32_t *state,
                          uint8_t *p) {
    int sum = w + h - 2 > 1 ? w + h - 2 : 1;
    int smooth[3] = {255 * x / (w > 1 ? w - 1 : 1), 255 * y / (h > 1 ? h - 1 : 1),
                     255 * (x + y) / sum};
    uint32_t v = ((uint32_t)(x / 16) * 73856093u ^ (uint32_t)(y / 16) * 19349663u) * 2654435761u;
    for (int c = 0; c < 3; c++) {
        uint32_t noise = lcg(state), grain = (uint32_t)smooth[c] + (noise & 7);
        if (strcmp(kind, "noise") == 0) p[c] = (uint8_t)noise;
        else if (strcmp(kind, "gradient") == 0) p[c] = (uint8_t)smooth[c];
        else if (strcmp(kind, "grain") == 0) p[c] = (uint8_t)(grain < 255 ? grain : 255);
        else if (strcmp(kind, "blocks") == 0) p[c] = (uint8_t)(v >> (24 - 8 * c));
        else p[c] = (uint8_t)(200 >> c);   /* flat: 200, 100, 50 */
    }
}

static lvm_image formula(const char *kind, int w, int h) {
    lvm_image image = {w, h, must(mem_alloc((size_t)w * (size_t)h, 3, NULL)), 0};
    uint32_t state = 65537u * (uint32_t)w + (uint32_t)h;
    for (int y = 0; y < h; y++)
        for (int x = 0; x < w; x++)
            formula_pixel(kind, x, y, w, h, &state,
                          image.rgb + 3 * ((size_t)y * (size_t)w + (size_t)x));
    return image;
}

/* ---- The lines of index.txt ---- */

static void path_of(const struct source *t, const char *name, char *path, size_t size) {
    snprintf(path, size, "%s/%s", t->folder, name);
}

static void test_load(struct source *t, const char *line) {
    char name[128], path[1024];
    int w, h;
    unsigned long long hash;
    lvm_image image;
    lvm_error error = {0, ""};
    if (sscanf(line, "load %127s %d %d %llx", name, &w, &h, &hash) != 4) {
        check(0, "line not understood: %s", line);
        return;
    }
    path_of(t, name, path, sizeof path);
    int code = lvm_image_load(path, &image, &error);
    check(code == LVM_OK && image.width == w && image.height == h &&
             fnv(image.rgb, pixel_bytes(&image)) == hash, "%s: %s", name,
          code ? error.text : "other pixels than the reference's");
    lvm_image_free(&image);
}

static void test_upright(struct source *t, const char *line) {
    char name[128], path[1024];
    int n, w, h;
    unsigned long long hash;
    lvm_image image;
    lvm_error error = {0, ""};
    if (sscanf(line, "upright %127s %d %d %d %llx", name, &n, &w, &h, &hash) != 5) {
        check(0, "line not understood: %s", line);
        return;
    }
    path_of(t, name, path, sizeof path);
    int code = lvm_image_load(path, &image, &error);
    check(code == LVM_OK && image.orientation == n, "%s: orientation %d instead of %d: %s", name,
          image.orientation, n, error.text);
    for (int again = 0; code == LVM_OK && again < 2; again++) {   /* the second time does nothing */
        code = lvm_image_upright(&image, &error);
        check(code == LVM_OK && image.orientation == 1 && image.width == w &&
                 image.height == h && fnv(image.rgb, pixel_bytes(&image)) == hash, "%s: %s", name,
              code ? error.text : "turned another way than the reference");
    }
    lvm_image_free(&image);
}

/* Loads a copy that ends where its memory ends, so that a sanitizer sees any step too far. */
static int load_copy(const uint8_t *data, size_t size, lvm_image *image, lvm_error *error) {
    uint8_t *copy = must(malloc(size ? size : 1));
    memcpy(copy, data, size);
    int code = lvm_image_load_memory(copy, size, "copy", image, error);
    free(copy);
    return code;
}

/* A JPEG's orientation, and each of its beginnings, which must not be read beyond. */
static void test_turn(struct source *t, const char *line) {
    char name[128], path[1024];
    int want, wrong = 0;
    uint8_t *data = NULL;
    size_t size = 0;
    if (sscanf(line, "turn %127s %d", name, &want) != 2) {
        check(0, "line not understood: %s", line);
        return;
    }
    path_of(t, name, path, sizeof path);
    check(read_file(path, &data, &size, NULL) == LVM_OK, "%s cannot be read", path);
    for (size_t n = 3; n <= size; n++) {
        lvm_image image;
        load_copy(data, n, &image, NULL);
        wrong += image.orientation != want && (n == size || image.orientation != 0);
        lvm_image_free(&image);
    }
    check(wrong == 0, "%s: orientation %d is not what %d of its beginnings tell", name, want,
          wrong);
    mem_free(data);
}

static void test_bad(struct source *t, const char *line) {
    char name[128], code_name[32], path[1024];
    int skip = 0;
    lvm_image image;
    lvm_error error = {0, ""};
    if (sscanf(line, "bad %127s %31s %n", name, code_name, &skip) != 2 || !skip) {
        check(0, "line not understood: %s", line);
        return;
    }
    path_of(t, name, path, sizeof path);
    int want = strcmp(code_name, "UNSUPPORTED") == 0 ? LVM_UNSUPPORTED : LVM_FORMAT;
    int code = lvm_image_load(path, &image, &error);
    check(code == want && error.code == want, "%s: code %d instead of %d: %s", name, code, want,
          error.text);
    check(strstr(error.text, line + skip) != NULL, "%s: message \"%s\" lacks \"%s\"", name,
          error.text, line + skip);
    check(strstr(error.text, name) != NULL, "%s: message \"%s\" lacks the name", name, error.text);
    check(image.rgb == NULL, "%s: an image in spite of an error", name);
    lvm_image_free(&image);
}

static void test_resize(const char *line) {
    char kind[32];
    int w, h, new_w, new_h;
    unsigned long long hash;
    lvm_image out = {0, 0, NULL, 0};
    if (sscanf(line, "resize %31s %d %d %d %d %llx", kind, &w, &h, &new_w, &new_h, &hash) != 6) {
        check(0, "line not understood: %s", line);
        return;
    }
    lvm_image in = formula(kind, w, h);
    int code = lvm_image_resize(&in, new_w, new_h, &out, NULL);
    check(code == LVM_OK && out.width == new_w && out.height == new_h &&
             fnv(out.rgb, pixel_bytes(&out)) == hash,
          "other pixels than the reference's: %s", line);
    lvm_image_free(&out);
    lvm_image_free(&in);
}

static void test_crop(const char *line) {
    char kind[32];
    int w, h, R;
    unsigned long long hash;
    lvm_image out = {0, 0, NULL, 0};
    if (sscanf(line, "crop %31s %d %d %d %llx", kind, &w, &h, &R, &hash) != 5) {
        check(0, "line not understood: %s", line);
        return;
    }
    lvm_image in = formula(kind, w, h);
    int code = fit_image(&in, R, LVM_CROP, &out, NULL);
    check(code == LVM_OK && out.width == R && out.height == R &&
             fnv(out.rgb, pixel_bytes(&out)) == hash,
          "another crop than the reference's: %s", line);
    lvm_image_free(&out);
    lvm_image_free(&in);
}

static void test_size(const char *line) {
    char kind[32];
    int w, h;
    unsigned long reference;
    uint8_t *png = NULL;
    size_t size = 0;
    lvm_image again = {0, 0, NULL, 0};
    lvm_error error = {0, ""};
    if (sscanf(line, "size %31s %d %d %lu", kind, &w, &h, &reference) != 4) {
        check(0, "line not understood: %s", line);
        return;
    }
    lvm_image image = formula(kind, w, h);
    int code = png_encode(&image, NULL, &png, &size, &error);
    check(code == LVM_OK && size * 10 <= reference * 13, "%zu bytes written: %s", size, line);
    if (code == LVM_OK) code = lvm_image_load_memory(png, size, "saved", &again, &error);
    check(code == LVM_OK && same_image(&image, &again), "written, not read back: %s %s", line,
          error.text);
    mem_free(png);
    lvm_image_free(&again);
    lvm_image_free(&image);
}

/* ---- Properties ---- */

/* No beginning of a file is an image, but that of a PNG or JPEG which lacks only what follows its
   pixels. */
static void test_cuts(const char *name, const uint8_t *data, size_t size) {
    size_t end = size, accepted = 0, silent = 0;
    int is_pnm_file = data[0] == 'P';
    lvm_image whole;
    int unread = load_copy(data, size, &whole, NULL);
    check(!unread, "%s: not read, so nothing is known of its beginnings", name);
    while (data[0] == png_signature[0] && end >= 8 && memcmp(data + end - 8, "IEND", 4) != 0)
        end--;   /* bytes behind may go */
    for (size_t n = 0; n < end && !unread; n++) {
        lvm_image image;
        lvm_error error = {0, ""};
        int code = load_copy(data, n, &image, &error);
        accepted += code == LVM_OK && (is_pnm_file || !same_image(&image, &whole));
        silent += code != LVM_OK && (error.code != code || !error.text[0]);
        lvm_image_free(&image);
    }
    lvm_image_free(&whole);
    check(accepted == 0, "%s: %zu of its beginnings were accepted", name, accepted);
    check(silent == 0, "%s: %zu of its beginnings failed without a message", name, silent);
}

/* Bytes behind an image change nothing, unless they stand where a checksum is missing. */
static void test_tail(const char *name, const uint8_t *data, size_t size) {
    lvm_image image = {0, 0, NULL, 0}, longer = {0, 0, NULL, 0};
    uint8_t *copy = must(malloc(size + 4));
    memcpy(copy, data, size);
    memcpy(copy + size, "\n9x#", 4);
    int code = load_copy(data, size, &image, NULL);
    if (code == LVM_OK) code = load_copy(copy, size + 4, &longer, NULL);
    check(code == LVM_OK && same_image(&image, &longer), "%s: bytes behind it matter", name);
    lvm_image_free(&image);
    lvm_image_free(&longer);
    free(copy);
}

/* What an image took of the data is an image by itself. */
static void test_used(const char *name, const uint8_t *data, size_t size) {
    lvm_image image, part = {0, 0, NULL, 0};
    size_t used = 0;
    int code = image_load_next(data, size, name, &used, &image, NULL);
    check(code == LVM_OK && used > 0 && used <= size &&
              load_copy(data, used, &part, NULL) == LVM_OK && same_image(&image, &part),
          "%s: not in the first %zu of its %zu bytes", name, used, size);
    lvm_image_free(&image);
    lvm_image_free(&part);
}

/* Images one behind the other, also without their ends. */
static void test_row(const struct source *t) {
    static const char *const names[] = {
        "rgb8_adam7.png", "sent_no_eoi.jpg", "s420.jpg", "raw_255.ppm", "tail_no_iend.png",
        "raw.pbm", "no_eoi.jpg", "cmyk_prog.jpg", "tail_text_crc.png", "tail_more.png",
        "plain_comments.pbm", "raw_510.pgm", "restart_row.jpg", "exif_6.png"};
    enum { N = sizeof names / sizeof *names };
    struct buffer all = {0};
    lvm_image one[N], image;
    size_t used = 0, at = 0;
    lvm_error error = {0, ""};
    for (int i = 0; i < N; i++) {
        char path[1024];
        uint8_t *data = NULL;
        size_t size = 0;
        path_of(t, names[i], path, sizeof path);
        check(read_file(path, &data, &size, &error) == LVM_OK &&
                  buffer_add(&all, data, size, &error) == LVM_OK &&
                  lvm_image_load_memory(data, size, NULL, &one[i], &error) == LVM_OK,
              "%s: %s", names[i], error.text);
        if (strstr(names[i], "plain")) buffer_add(&all, "\r\n", 2, NULL);
        mem_free(data);
    }
    for (int i = 0; i < N; i++, at += used) {
        int code = image_load_next((uint8_t *)all.data + at, all.n - at, "row", &used, &image,
                                   &error);
        check(code == LVM_OK && same_image(&image, &one[i]), "%s in a row: %s", names[i],
              code ? error.text : "another image");
        lvm_image_free(&image);
        lvm_image_free(&one[i]);
    }
    check(at == all.n, "%zu bytes of a row of images, %zu used", all.n, at);
    check(image_load_next((uint8_t *)all.data, 0, "row", &used, &image, NULL) == LVM_FORMAT &&
              used == 0, "an image in nothing");
    check(image_load_next((const uint8_t *)"nothing", 7, "row", &used, &image, NULL) ==
              LVM_FORMAT && used == 0, "an image in text");
    mem_free(all.data);
}

static void mutate(struct source *t, uint8_t *data, size_t size) {
    for (uint32_t n = 1 + random_below(t, 4); n > 0 && size > 0; n--) {
        size_t at = random_below(t, (uint32_t)size);
        if (random_below(t, 3)) data[at] ^= (uint8_t)(1u << random_below(t, 8));
        else data[at] = (uint8_t)random_below(t, 256);
    }
}

static void load_mutated(struct source *t, const uint8_t *data, size_t size) {
    uint8_t *copy = must(malloc(size ? size : 1));
    lvm_image image;
    lvm_error error = {0, ""};
    memcpy(copy, data, size);
    mutate(t, copy, size);
    size_t n = random_below(t, 8) ? size : random_below(t, (uint32_t)size + 1);
    clock_t start = clock();
    int code = load_copy(copy, n, &image, &error);
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    check(seconds < 1, "a damaged file of %zu bytes took %.1f s", n, seconds);
    if (n > 2) check(image.orientation >= 0 && image.orientation <= 8, "a wrong orientation");
    if (code == LVM_OK) code = lvm_image_upright(&image, &error);
    check(code == error.code && (code != LVM_OK) == (image.rgb == NULL) &&
             (code == LVM_OK || error.text[0]), "a damaged file: code %d, message \"%s\"", code,
          error.text);
    lvm_image_free(&image);
    free(copy);
}

static void test_round_trips(struct source *t, const char *path) {
    static const char *const kinds[] = {"noise", "gradient", "grain", "blocks", "flat"};
    for (int i = 0; i < 60; i++) {
        int most = i % 3 ? 40 : 300;
        int w = 1 + (int)random_below(t, (uint32_t)most), h = 1 + (int)random_below(t, 90);
        lvm_image image = formula(kinds[i % 5], w, h), again = {0, 0, NULL, 0};
        lvm_error error = {0, ""};
        int code = lvm_image_save(path, &image, &error);
        if (code == LVM_OK) code = lvm_image_load(path, &again, &error);
        check(code == LVM_OK && same_image(&image, &again),
              "%s %d x %d: saved, not read back: %s", kinds[i % 5], w, h, error.text);
        lvm_image_free(&again);
        lvm_image_free(&image);
    }
}

/* A chunk of a PNG that lvm wrote, from *at on, which then stands behind it. */
static struct png_chunk next_chunk(const uint8_t *png, size_t size, size_t *at) {
    struct crc32 crc;
    struct cursor c = {png, size, *at, 0};
    struct png_chunk chunk = {"", NULL, cursor_big(&c, 4)};
    const uint8_t *type = must((void *)(uintptr_t)cursor_take(&c, 4));
    memcpy(chunk.type, type, 4);
    chunk.data = cursor_take(&c, chunk.size);
    crc32_init(&crc);
    check(cursor_big(&c, 4) == crc32_of(&crc, type, chunk.size + 4) && !c.failed,
          "a chunk %s with a wrong checksum", chunk.type);
    *at = c.at;
    return chunk;
}

/* In memory as in a file; with words, which stand in front of the pixels and change none. */
static void test_memory(const char *path) {
    static const char text[] = "seed 1, \xC3\x84pfel", head[] = "parameters\0\0\0\0";
    lvm_image image = formula("grain", 31, 17), again = {0, 0, NULL, 0};
    uint8_t *png = NULL, *file = NULL;
    size_t size = 0, file_size = 0, at = PNG_SIGNATURE_SIZE, before = in_use;
    lvm_error error = {0, ""};
    check(lvm_image_save_memory(&image, &png, &size, &error) == LVM_OK &&
              lvm_image_save(path, &image, &error) == LVM_OK &&
              read_file(path, &file, &file_size, &error) == LVM_OK && size == file_size &&
              memcmp(png, file, size) == 0, "a PNG in memory is another than in a file");
    mem_free(file);
    lvm_memory_free(png);
    lvm_memory_free(NULL);
    check(in_use == before, "a PNG in memory is not given back");
    check(image_save_text(path, &image, text, &error) == LVM_OK &&
              read_file(path, &file, &file_size, &error) == LVM_OK &&
              lvm_image_load(path, &again, &error) == LVM_OK && same_image(&image, &again),
          "a PNG with words: %s", error.text);
    next_chunk(file, file_size, &at);
    struct png_chunk words = next_chunk(file, file_size, &at);
    check(strcmp(words.type, "iTXt") == 0 && words.size == sizeof head + sizeof text - 1 &&
              memcmp(words.data, head, sizeof head) == 0 &&
              memcmp(words.data + sizeof head, text, sizeof text - 1) == 0, "other words");
    check(strcmp(next_chunk(file, file_size, &at).type, "IDAT") == 0 && file_size == size + 12 +
              words.size, "words cost more than their chunk");
    mem_free(file);
    lvm_image_free(&again);
    lvm_image_free(&image);
}

/* An animated PNG: its chunks in order, and each frame's data, put into a PNG of their own, are the
   image. */
static void test_animation(void) {
    static const char *const kinds[] = {"noise", "blocks", "flat"};
    enum { N = 3, W = 23, H = 12, DELAY = 300 };
    lvm_image images[N], again;
    uint8_t *png = NULL, *single = NULL, want[26] = {0};
    size_t size = 0, at = PNG_SIGNATURE_SIZE, single_size = 0;
    lvm_error error = {0, ""};
    struct crc32 crc;
    crc32_init(&crc);
    for (int i = 0; i < N; i++) images[i] = formula(kinds[i], W, H);
    check(apng_encode(images, N, DELAY, NULL, &png, &size, &error) == LVM_OK &&
              load_copy(png, size, &again, &error) == LVM_OK && same_image(&again, &images[0]),
          "an animation: %s", error.text);
    lvm_image_free(&again);
    struct png_chunk head = next_chunk(png, size, &at), c = next_chunk(png, size, &at);
    check(strcmp(c.type, "acTL") == 0 && c.size == 8 && memcmp(c.data, "\0\0\0\3\0\0\0\0", 8) == 0,
          "not three frames without end");
    for (int i = 0, number = 0; i < N; i++) {
        struct buffer own = {0};
        c = next_chunk(png, size, &at);
        want[3] = (uint8_t)number++;
        want[7] = W, want[11] = H, want[20] = DELAY >> 8, want[21] = DELAY & 255;
        want[22] = 1000 >> 8, want[23] = 1000 & 255;
        check(strcmp(c.type, "fcTL") == 0 && c.size == 26 && memcmp(c.data, want, 26) == 0,
              "frame %d has another fcTL", i);
        c = next_chunk(png, size, &at);
        size_t skip = i > 0 ? 4 : 0;
        check(strcmp(c.type, i > 0 ? "fdAT" : "IDAT") == 0 &&
                  (i == 0 || (c.data[3] == number && !c.data[2])), "frame %d: a wrong number", i);
        number += i > 0;
        buffer_add(&own, png_signature, PNG_SIGNATURE_SIZE, NULL);
        png_add_chunk(&own, "IHDR", head.data, head.size, &crc, NULL);
        png_add_chunk(&own, "IDAT", c.data + skip, c.size - skip, &crc, NULL);
        png_add_chunk(&own, "IEND", NULL, 0, &crc, NULL);
        check(load_copy((uint8_t *)own.data, own.n, &again, &error) == LVM_OK &&
                  same_image(&again, &images[i]), "frame %d is another image", i);
        lvm_image_free(&again);
        mem_free(own.data);
    }
    check(strcmp(next_chunk(png, size, &at).type, "IEND") == 0 && at == size, "no end");
    mem_free(png);
    check(apng_encode(images, 1, DELAY, NULL, &png, &size, NULL) == LVM_OK &&
              png_encode(images, NULL, &single, &single_size, NULL) == LVM_OK &&
              size == single_size && memcmp(png, single, size) == 0, "one frame is no plain PNG");
    mem_free(png);
    mem_free(single);
    check(apng_encode(images, N, 0, NULL, &png, &size, &error) == LVM_INVALID && png == NULL,
          "no delay");
    check(apng_encode(images, N, 65536, NULL, &png, &size, &error) == LVM_INVALID, "long delay");
    images[2].height--;
    check(apng_encode(images, N, DELAY, NULL, &png, &size, &error) == LVM_INVALID, "two sizes");
    for (int i = 0; i < N; i++) lvm_image_free(&images[i]);
}

/* A crop is the middle of the whole, resized. */
static void test_crops(struct source *t) {
    for (int i = 0; i < 60; i++) {
        int w = 1 + (int)random_below(t, 70), h = 1 + (int)random_below(t, 70);
        int R = 1 + (int)random_below(t, 40), same = 1;
        if (i % 3 == 0) R = w < h ? w : h;   /* nothing is resized */
        int width = w < h ? R : R * w / h, height = w < h ? R * h / w : R;
        lvm_image in = formula("noise", w, h), all = {0, 0, NULL, 0}, crop = {0, 0, NULL, 0};
        check(lvm_image_resize(&in, width, height, &all, NULL) == LVM_OK &&
                  fit_image(&in, R, LVM_CROP, &crop, NULL) == LVM_OK && crop.width == R &&
                  crop.height == R, "%d x %d cropped to %d", w, h, R);
        int left = (int)half_even(width - R), top = (int)half_even(height - R);
        for (int y = 0; y < R && crop.rgb && all.rgb; y++)
            same &= memcmp(crop.rgb + 3 * y * R, all.rgb + 3 * ((top + y) * width + left),
                           (size_t)R * 3) == 0;
        check(same, "%d x %d cropped to %d is not the middle", w, h, R);
        lvm_image_free(&in);
        lvm_image_free(&all);
        lvm_image_free(&crop);
    }
}

/* What resizing takes is in proportion to what comes out, however long the image. */
static void test_long_images(void) {
    enum { LONG = 1 << 22, ROOM = 8 << 20 };
    static const struct {
        int w, h, R, fit;
    } cases[] = {{1, LONG, 256, LVM_CROP}, {LONG, 1, 256, LVM_CROP}, {3, LONG, 8, LVM_CROP},
                 {LONG, 1, 64, LVM_SQUASH}, {1, LONG, 64, LVM_SQUASH}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int w = cases[i].w, h = cases[i].h, R = cases[i].R, other = 0;
        lvm_image in = {w, h, must(mem_alloc((size_t)w * (size_t)h, 3, NULL)), 0};
        lvm_image out = {0, 0, NULL, 0};
        lvm_error error = {0, ""};
        memset(in.rgb, 77, pixel_bytes(&in));
        size_t before = peak = in_use;
        int code = fit_image(&in, R, cases[i].fit, &out, &error);
        for (size_t k = 0; code == LVM_OK && k < pixel_bytes(&out); k++) other += out.rgb[k] != 77;
        check(code == LVM_OK && other == 0, "%d x %d to %d: %s", w, h, R, error.text);
        check(peak - before < ROOM, "%d x %d to %d took %zu bytes", w, h, R, peak - before);
        lvm_image_free(&in);
        lvm_image_free(&out);
    }
}

/* Sides that cannot be, of images handed in: refused before anything is computed from them. */
static void test_sides(void) {
    static const int sides[][2] = {{0, 5}, {5, 0}, {0, 0}, {-1, 5}, {5, -7}, {INT_MIN, INT_MIN},
                                   {INT_MAX, 2}, {2, INT_MAX}, {1 << 15, 1 << 15}};
    uint8_t pixel[3] = {1, 2, 3}, *png = NULL;
    size_t size = 0;
    lvm_error error;
    for (size_t i = 0; i < sizeof sides / sizeof *sides; i++) {
        lvm_image in = {sides[i][0], sides[i][1], pixel, 6}, one = {1, 1, pixel, 0}, out;
        for (int fit = LVM_SQUASH; fit <= LVM_CROP; fit++)
            check(fit_image(&in, 4, fit, &out, &error) == LVM_INVALID && out.rgb == NULL &&
                      strstr(error.text, "cannot resize an image of"), "fit %d x %d", in.width,
                  in.height);
        check(lvm_image_resize(&one, in.width, in.height, &out, &error) == LVM_INVALID &&
                  out.rgb == NULL, "resized to %d x %d", in.width, in.height);
        check(lvm_image_upright(&in, &error) == LVM_INVALID, "turned %d x %d", in.width, in.height);
        check(lvm_image_save_memory(&in, &png, &size, &error) == LVM_INVALID && png == NULL,
              "saved %d x %d", in.width, in.height);
    }
}

/* A progressive JPEG whose pixels are few enough, but not their coefficients. */
static void test_decoded_size(void) {
    static const uint8_t head[] = {0xFF, 0xD8, 0xFF, 0xC2, 0, 17, 8, 15000 >> 8, 15000 & 255,
        15000 >> 8, 15000 & 255, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0, 0xFF, 0xDA, 0, 2};
    size_t size = 2 << 20;
    uint8_t *data = must(calloc(1, size));
    lvm_image image;
    lvm_error error = {0, ""};
    memcpy(data, head, sizeof head);
    peak = in_use;
    size_t before = in_use;
    check(lvm_image_load_memory(data, size, "big", &image, &error) == LVM_FORMAT &&
              strstr(error.text, "15000 x 15000 pixels takes 1287 MiB to decode: must be at most "
                                 "1024") && peak - before < 1 << 20, "\"%s\"", error.text);
    free(data);
}

#ifndef _WIN32
/* A limit on the size of files stands in for a full disk. */
static void test_full_disk(const char *path) {
    struct rlimit old, small;
    lvm_image image = formula("noise", 100, 100), before = formula("flat", 5, 5);
    lvm_image after = {0, 0, NULL, 0};
    lvm_error error = {0, ""};
    check(lvm_image_save(path, &before, &error) == LVM_OK, "%s", error.text);
    getrlimit(RLIMIT_FSIZE, &old);
    small = old;
    small.rlim_cur = 4096;
    signal(SIGXFSZ, SIG_IGN);
    setrlimit(RLIMIT_FSIZE, &small);
    int code = lvm_image_save(path, &image, &error);
    setrlimit(RLIMIT_FSIZE, &old);
    check(code == LVM_IO && strstr(error.text, path), "full disk: code %d, \"%s\"", code,
          error.text);
    code = lvm_image_load(path, &after, &error);
    check(code == LVM_OK && same_image(&before, &after), "full disk: the old file is gone");
    lvm_image_free(&after);
    lvm_image_free(&before);
    lvm_image_free(&image);
}
#endif

static void test_refusals(const char *folder) {
    char path[1100];
    lvm_image image = formula("flat", 3, 2), out = {0, 0, NULL, 0}, none = {3, 2, NULL, 0};
    lvm_error error = {0, ""};
    snprintf(path, sizeof path, "%s/none/x.png", folder);
    check(lvm_image_save(path, &image, &error) == LVM_IO, "saved into a missing folder");
    check(lvm_image_load(path, &out, &error) == LVM_IO && strstr(error.text, path),
          "missing file: \"%s\"", error.text);
    check(lvm_image_load(folder, &out, &error) == LVM_IO, "a folder: \"%s\"", error.text);
    check(lvm_image_load(path, &out, NULL) == LVM_IO, "an error that nobody wants to read");
    check(lvm_image_save(path, &none, &error) == LVM_INVALID, "saved an image without pixels");
    check(lvm_image_resize(&none, 2, 2, &out, &error) == LVM_INVALID, "resized no pixels");
    check(lvm_image_resize(&image, 0, 2, &out, &error) == LVM_INVALID, "resized to 0 x 2");
    check(lvm_image_resize(&image, 2, -1, &out, &error) == LVM_INVALID, "resized to 2 x -1");
    check(lvm_image_resize(&image, 1 << 20, 1 << 20, &out, &error) == LVM_INVALID,
          "resized to 2^40 pixels");
    check(out.rgb == NULL, "an image in spite of an error");
    check(lvm_image_upright(&none, &error) == LVM_INVALID, "turned no pixels");
    for (int n = -1; n <= 9; n += 10) {
        image.orientation = n;
        check(lvm_image_upright(&image, &error) == LVM_INVALID && image.orientation == n,
              "turned by orientation %d", n);
    }
    lvm_image_free(&image);
    lvm_image_free(NULL);
}

/* ---- Running ---- */

static void test_line(struct source *t, char *line) {
    char name[128], path[1024];
    uint8_t *data = NULL;
    size_t size = 0;
    line[strcspn(line, "\n")] = 0;
    if (strncmp(line, "resize ", 7) == 0) test_resize(line);
    else if (strncmp(line, "crop ", 5) == 0) test_crop(line);
    else if (strncmp(line, "size ", 5) == 0) test_size(line);
    else if (strncmp(line, "bad ", 4) == 0) test_bad(t, line);
    else if (strncmp(line, "load ", 5) == 0) test_load(t, line);
    else if (strncmp(line, "upright ", 8) == 0) test_upright(t, line);
    else if (strncmp(line, "turn ", 5) == 0) test_turn(t, line);
    else if (line[0] != '#') check(0, "line not understood: %s", line);
    if (sscanf(line, "load %127s", name) != 1 && sscanf(line, "upright %127s", name) != 1) return;
    path_of(t, name, path, sizeof path);
    if (read_file(path, &data, &size, NULL) != LVM_OK) return;
    test_cuts(name, data, size);
    if (strcmp(name, "tail_idat_no_crc.png") != 0) test_tail(name, data, size);
    test_used(name, data, size);
    for (int i = 0; i < 300; i++) load_mutated(t, data, size);
    mem_free(data);
}

static int fuzz(struct source *t, FILE *list, int seconds) {
    enum { MOST = 1024 };
    static uint8_t *data[MOST];
    static size_t size[MOST];
    char line[512], name[128], path[1024];
    int n = 0;
    time_t end = time(NULL) + seconds;
    while (n < MOST && fgets(line, sizeof line, list)) {
        if (strstr(line, "size ") || line[0] == '#') continue;
        if (sscanf(line, "%*s %127s", name) != 1) continue;
        path_of(t, name, path, sizeof path);
        if (read_file(path, &data[n], &size[n], NULL) == LVM_OK) n++;
    }
    while (n > 0 && time(NULL) < end)
        for (int i = 0; i < 1000; i++) {
            uint32_t which = random_below(t, (uint32_t)n);
            load_mutated(t, data[which], size[which]);
        }
    for (int i = 0; i < n; i++) mem_free(data[i]);
    return n > 0;
}

int main(int argc, char **argv) {
    struct source t = {.folder = argc > 1 ? argv[1] : "", .random = 1};
    char line[512], path[1024], folder[] = TEMPORARY;
    int fuzzing = argc == 4 && strcmp(argv[2], "--fuzz") == 0, lines = 0;
    path_of(&t, "index.txt", path, sizeof path);
    FILE *list = argc == 2 || fuzzing ? fopen(path, "r") : NULL;
    if (list == NULL) {
        fprintf(stderr, "usage: test_images tests/images [--fuzz SECONDS]\n");
        return 2;
    }
    if (fuzzing) {
        check(fuzz(&t, list, atoi(argv[3])), "no files to mutate");
    } else {
        for (; fgets(line, sizeof line, list); lines++) test_line(&t, line);
        check(lines > 100, "%s: %d lines", path, lines);
        must(mkdtemp(folder));
        snprintf(path, sizeof path, "%s/image.png", folder);
        test_round_trips(&t, path);
        test_row(&t);
        test_memory(path);
        test_animation();
        test_crops(&t);
        test_long_images();
        test_sides();
        test_decoded_size();
#ifndef _WIN32
        test_full_disk(path);
#endif
        test_refusals(folder);
        remove(path);
        check(rmdir(folder) == 0, "files were left in %s", folder);
    }
    fclose(list);
    return checked("images");
}
