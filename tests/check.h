/* What every C driver counts its checks with; included behind lvm.c.

       where("%s, round %d", model, i);      stands in front of what fails from here on
       check(a == b, "a is %d, not %d", a, b);
       int32_t *ids = must(malloc(n));       memory that the test itself needs
       INVALID(lvm_encode(ctx, NULL, 1, ids, e));  refused, with e an error struct and with e NULL
       REFUSES(lvm_open(NULL, 0, e));        the same of calls that return NULL
       return checked("embed");              main's end: the line that run_tests.sh reads

   The first failures are shown, all are counted; with CHECK_FIRST in the environment the first one
   ends the test. Only one thread may check. */
#ifndef CHECK_H
#define CHECK_H

enum { SHOWN_FAILURES = 40 };

static struct {
    int passed, failed;
    char where[160];
} checks;

LVM_PRINTF(1, 2) static inline void where(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(checks.where, sizeof checks.where, format, args);
    va_end(args);
}

LVM_PRINTF(2, 3) static inline void check(int ok, const char *format, ...) {
    if (ok) {
        checks.passed++;
        return;
    }
    if (checks.failed++ >= SHOWN_FAILURES) return;
    va_list args;
    va_start(args, format);
    printf("FAILED: %s%s", checks.where, checks.where[0] != 0 ? ": " : "");
    vprintf(format, args);
    printf("\n");
    fflush(stdout); /* a crash may follow */
    va_end(args);
    if (getenv("CHECK_FIRST") == NULL) return;
    printf("stopped: %d passed, 1 failed\n", checks.passed);
    exit(1);
}

static inline int checked(const char *name) {
    if (checks.failed > SHOWN_FAILURES)
        printf("%d more failures are not shown\n", checks.failed - SHOWN_FAILURES);
    printf("%s: %d passed, %d failed\n", name, checks.passed, checks.failed);
    return checks.failed > 0 || checks.passed == 0;
}

static inline void *must(void *p) {
    if (p != NULL) return p;
    fprintf(stderr, "%s: a pointer that the test needs is NULL\n", checks.where);
    abort();
}

static inline void check_invalid(const char *call, int with, int without, const lvm_error *fault) {
    check(with == LVM_INVALID && fault->code == LVM_INVALID && fault->text[0] != 0,
          "%s gives %d: %s", call, with, fault->text);
    check(without == LVM_INVALID, "%s without an error struct gives %d", call, without);
}

/* Macros, for only a macro can evaluate a call twice and print it. */
#define INVALID(call) do { \
        lvm_error fault = {0, ""}, *e = &fault; \
        int with = (call); \
        e = NULL; \
        int without = (call); \
        check_invalid(#call, with, without, &fault); \
    } while (0)

#define REFUSES(call) do { \
        lvm_error fault = {0, ""}, *e = &fault; \
        int with = (call) == NULL ? fault.code : LVM_OK; \
        e = NULL; \
        int without = (call) == NULL ? LVM_INVALID : LVM_OK; \
        check_invalid(#call, with, without, &fault); \
    } while (0)

#endif
