/* Tests of chapter 10, on whatever system they are built for:
   names beyond ASCII, replacing, mapping, sizes beyond 4 GiB, control groups.

       test_os FOLDER     for its files: made, used and removed */
#define LVM_NO_MAIN
#include "../lvm.c"
#include "check.h"
#ifdef _WIN32
#include <direct.h>
#define make_folder(path) _mkdir(path)
#else
#define make_folder(path) mkdir(path, 0777)
#endif

enum { NAME = 1024 };

/* Whether the file holds just this text. */
static int holds(const char *path, const char *text) {
    uint8_t *data = NULL;
    size_t size = 0;
    int same = read_file(path, &data, &size, NULL) == LVM_OK && size == strlen(text) &&
               memcmp(data, text, size) == 0;
    mem_free(data);
    return same;
}

static int write_text_file(const char *path, const char *text) {
    lvm_error error = {0, ""};
    int code = write_file(path, text, strlen(text), &error);
    check(code == LVM_OK, "%s", error.text);
    return code == LVM_OK;
}

static void test_names(const char *folder) {
    static const char *const names[] = {"plain", "two words", "B\xc3\xa4ume",
                                        "\xe6\x9c\xa8 \xf0\x9f\x8c\xb2"};
    char path[NAME], again[NAME];
    for (int i = 0; i < 4; i++) {
        snprintf(path, sizeof path, "%s/%s", folder, names[i]);
        snprintf(again, sizeof again, "%s/./%s", folder, names[i]);
        check(os_stat(path).kind == OS_NOTHING, "%s: is there before it is written", path);
        check(write_text_file(path, "1\n\x1a") && holds(path, "1\n\x1a"), "%s: written", path);
        check(write_text_file(path, "2") && holds(path, "2"), "%s: replaced", path);
        struct os_info info = os_stat(path);
        check(info.kind == OS_FILE && info.size == 1, "%s: kind and size", path);
        check(same_file(path, again) && !same_file(path, folder), "%s: identity", path);
        check(os_remove(path) == 0 && os_stat(path).kind == OS_NOTHING, "%s: removed", path);
    }
}

/* A device is written to, not replaced; where that is tried, it is by a link that nobody misses. */
static void test_devices(const char *folder) {
#ifdef _WIN32
    (void)folder;
    check(os_stat("NUL").kind == OS_DEVICE, "NUL is no device");
    check(os_fopen("\xff", "rb") == NULL && errno == EILSEQ, "a name that is no UTF-8");
#else
    char path[NAME];
    snprintf(path, sizeof path, "%s/device", folder);
    check(symlink("/dev/null", path) == 0 && os_stat(path).kind == OS_DEVICE, "a link to a device");
    check(write_text_file(path, "x") && os_stat(path).kind == OS_DEVICE, "a device was replaced");
    check(os_remove(path) == 0, "a link was not removed");
#endif
}

/* What a message shows of a text, in 24 bytes and in many. */
static void test_shown(void) {
    static const char *const cases[][2] = {
        {"plain: it is", "plain: it is"},
        {"a\nb\tc\rd\x1b[1me\x7f", "a\\nb\\tc\\rd\\x1b[1me\\x7f"},
        {"\xc3\xa4 \xe6\x9c\xa8 \xf0\x9f\x8c\xb2 \xc2\xa0",
         "\xc3\xa4 \xe6\x9c\xa8 \xf0\x9f\x8c\xb2 \xc2\xa0"},
        {"\xc2\x9b \xc2", "\\xc2\\x9b \\xc2"},
        {"\x80 \xc0\xaf \xe0\x80\xaf \xed\xa0\x80",
         "\\x80 \\xc0\\xaf \\xe0\\x80\\xaf \\xed\\xa0\\x80"},
        {"\xf4\x90\x80\x80 \xf5 \xf0\x9f\x8c", "\\xf4\\x90\\x80\\x80 \\xf5 \\xf0\\x9f\\x8c"}};
    char shown[256], text[9000];
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        show_text(cases[i][0], shown, sizeof shown);
        check(strcmp(shown, cases[i][1]) == 0, "shown, case %d: \"%s\"", (int)i, shown);
    }
    show_text("0123456789012345678901: why", shown, 24);
    check(strcmp(shown, "012345...345678901: why") == 0, "shortened: \"%s\"", shown);
    show_text("12345678901234567890123", shown, 24);
    check(strcmp(shown, "12345678901234567890123") == 0, "just fits: \"%s\"", shown);
    for (int i = 0; i < 2000; i++) memcpy(text + 4 * i, "\xf0\x9f\x8c\xb2", 5); /* not cut apart */
    show_text(text, shown, sizeof shown);
    for (int i = 0; shown[i] != 0; i += utf8_bytes(shown + i) > 0 ? utf8_bytes(shown + i) : 1)
        check(utf8_bytes(shown + i) > 0, "a character was cut at byte %d", i);
    lvm_error error = {0, ""};
    memset(text, 'x', 5000);
    fail(&error, LVM_IO, "%.5000s: %s", text, "the reason");
    check(strlen(error.text) < sizeof error.text && strstr(error.text, "...xxx") != NULL &&
              strcmp(error.text + strlen(error.text) - 12, ": the reason") == 0,
          "a long message: \"%s\"", error.text);
}

enum { WRITERS = 8, ROUNDS = 50 };

static void *write_often(void *path) {
    static const char text[] = "all of it or nothing";
    intptr_t bad = 0;
    for (int i = 0; i < ROUNDS; i++) bad += write_file(path, text, sizeof text - 1, NULL) != LVM_OK;
    return (void *)bad;
}

/* Threads that write the same file at once: each under a temporary name of its own. */
static void test_writers(const char *folder) {
    char path[NAME];
    pthread_t threads[WRITERS];
    snprintf(path, sizeof path, "%s/busy", folder);
    for (int i = 0; i < WRITERS; i++) pthread_create(&threads[i], NULL, write_often, path);
    for (int i = 0; i < WRITERS; i++) {
        void *bad = NULL;
        pthread_join(threads[i], &bad);
#ifndef _WIN32 /* which refuses to replace a file that another thread is replacing */
        check(bad == NULL, "writer %d failed %d times", i, (int)(intptr_t)bad);
#endif
    }
    check(holds(path, "all of it or nothing") && os_remove(path) == 0, "%s: not whole", path);
}

static void test_kinds(const char *folder) {
    char path[NAME];
    lvm_error error = {0, ""};
    uint8_t *data = NULL;
    size_t size = 0;
    check(os_stat(folder).kind == OS_FOLDER, "a folder is one");
    snprintf(path, sizeof path, "%s/none/x", folder);
    check(write_file(path, "x", 1, &error) == LVM_IO && strstr(error.text, "No such file"),
          "into a missing folder: \"%s\"", error.text);
    check(read_file(path, &data, &size, &error) == LVM_IO && strstr(error.text, "No such file"),
          "a missing file: \"%s\"", error.text);
    check(read_file(folder, &data, &size, &error) == LVM_IO, "a folder was read");
    check(write_file(folder, "x", 1, &error) == LVM_IO, "a folder was replaced");
}

/* Longer than Windows takes without ado. */
static void test_long_path(const char *folder) {
    char outer[NAME], inner[NAME], path[NAME], part[91];
    memset(part, 'x', 90);
    part[90] = 0;
    snprintf(outer, sizeof outer, "%s/%s", folder, part);
    snprintf(inner, sizeof inner, "%s/%s/%s", folder, part, part);
    snprintf(path, sizeof path, "%s/%s/%s/%s", folder, part, part, part);
    check(make_folder(outer) == 0 && make_folder(inner) == 0, "folders for a long path");
    check(write_text_file(path, "long") && holds(path, "long") && os_remove(path) == 0,
          "a path of %d characters", (int)strlen(path));
    check(rmdir(inner) == 0 && rmdir(outer) == 0, "a long path's folders were not empty");
}

/* A sparse file of 4 GiB and a little: its end is where it was written, read and mapped. */
static void test_large(const char *folder) {
    char path[NAME];
    const int64_t size = ((int64_t)1 << 32) + 7;
    snprintf(path, sizeof path, "%s/large", folder);
    FILE *f = os_fopen(path, "wb");
    int written = f != NULL && fseeko(f, size - 3, SEEK_SET) == 0 && fwrite("end", 1, 3, f) == 3;
    check(written && ftello(f) == size, "a large file was not written");
    if (f != NULL) fclose(f);
    check(os_stat(path).size == size, "the size of a large file");
    int64_t opened = 0;
    int fd = open_file(path, &opened, NULL);
    uint8_t *map = fd < 0 ? NULL : os_map(fd, (size_t)size);
    check(map != NULL && opened == size, "a large file was not mapped: %s", strerror(errno));
    if (map != NULL) {
        check(map[0] == 0 && memcmp(map + size - 3, "end", 3) == 0, "the end of a large file");
        os_unmap(map, (size_t)size);
    }
    if (fd >= 0) close(fd);
    check(os_remove(path) == 0, "%s: %s", path, strerror(errno));
}

#ifdef __linux__
/* Folders of a control group tree and what stands in their files; then the processors, of 16, that
   are granted to a process with this /proc/self/cgroup. */
static const struct cgroup_case {
    const char *list, *files[4][3];
    int64_t n;
} cgroup_cases[] = {
    {"0::/\n", {{"", "cpu.max", "max 100000\n"}}, 16},
    {"0::/\n", {{"", "cpu.max", "150000 100000\n"}}, 2},
    {"0::/a/b\n", {{"/a", "cpu.max", "300000 100000\n"}, {"/a/b", "cpu.max", "max 100000\n"}}, 3},
    {"0::/a/b\n", {{"/a", "cpu.max", "900000 100000\n"}, {"/a/b", "cpu.max", "5000 10000\n"}}, 1},
    {"0::/a/b\n", {{"/a/c", "cpu.max", "100000 100000\n"}}, 16},
    {"0::/not/seen\n", {{"", "cpu.max", "400000 100000\n"}}, 4},
    {"4:cpuset,cpu:/docker/x\n",
     {{"/cpu", "cpu.cfs_quota_us", "700000\n"}, {"/cpu", "cpu.cfs_period_us", "100000\n"}}, 7},
    {"4:cpu:/a\n",
     {{"/cpu", "cpu.cfs_quota_us", "-1\n"}, {"/cpu", "cpu.cfs_period_us", "100000\n"}}, 16},
    {"4:cpu:/\n0::/a\n",
     {{"/a", "cpu.max", "500000 100000\n"}, {"/cpu", "cpu.cfs_quota_us", "200000\n"},
      {"/cpu", "cpu.cfs_period_us", "100000\n"}}, 2},
    {"0::/a\n", {{"/a", "cpu.max", "words 1\n"}}, 16},
    {"no colons\n\n0:\n", {{"/a", "cpu.max", "100000 100000\n"}}, 16}};

/* Makes or removes the folders of path behind root, one by one. */
static void folders(const char *root, const char *path, int make) {
    char full[NAME];
    snprintf(full, sizeof full, "%s%s", root, path);
    size_t first = strlen(root);
    if (make)
        for (size_t i = first + 1; first < strlen(full) && i <= strlen(full); i++) {
            char kept = full[i];
            if (kept != '/' && kept != 0) continue;
            full[i] = 0;
            mkdir(full, 0777);
            full[i] = kept;
        }
    for (; !make && strlen(full) > first; *strrchr(full, '/') = 0) rmdir(full);
}

static void test_cgroups(const char *folder) {
    char list[NAME], file[NAME];
    snprintf(list, sizeof list, "%s/list", folder);
    for (size_t i = 0; i < sizeof cgroup_cases / sizeof *cgroup_cases; i++) {
        const struct cgroup_case *c = &cgroup_cases[i];
        write_text_file(list, c->list);
        for (int make = 1; make >= 0; make--) {
            for (int j = 0; j < 4 && c->files[j][0] != NULL; j++) {
                if (make) folders(folder, c->files[j][0], 1);
                snprintf(file, sizeof file, "%s%s/%s", folder, c->files[j][0], c->files[j][1]);
                if (make) write_text_file(file, c->files[j][2]);
                else os_remove(file);
            }
            int64_t n = cgroup_processors(list, folder, 16);
            if (make) check(n == c->n, "control groups, case %d: %lld", (int)i, (long long)n);
            else check(n == 16, "control groups, case %d: files were left", (int)i);
            for (int j = 0; !make && j < 4 && c->files[j][0] != NULL; j++)
                folders(folder, c->files[j][0], 0);
        }
    }
    os_remove(list);
    check(cgroup_processors(list, folder, 5) == 5, "control groups without a list");
}
#endif

int main(int argc, char **argv) {
    if (argc != 2 || (make_folder(argv[1]) != 0 && os_stat(argv[1]).kind != OS_FOLDER)) {
        fputs("usage: test_os FOLDER\n", stderr);
        return 2;
    }
    check(processors() >= 1 && processors() <= 1024, "%d processors", processors());
    test_names(argv[1]);
    test_shown();
    test_devices(argv[1]);
    test_writers(argv[1]);
    test_kinds(argv[1]);
    test_long_path(argv[1]);
    test_large(argv[1]);
#ifdef __linux__
    test_cgroups(argv[1]);
#endif
    check(rmdir(argv[1]) == 0, "%s: something was left in it", argv[1]);
    return checked("os");
}
