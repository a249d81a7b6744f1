/* For test drivers that have struct test and check(). */
#ifndef INVALID_H
#define INVALID_H

static void check_invalid(struct test *t, const char *call, int with, int without,
                          const lvm_error *fault) {
    check(t, with == LVM_INVALID && fault->code == LVM_INVALID && fault->text[0] != 0,
          "%s gives %d: %s", call, with, fault->text);
    check(t, without == LVM_INVALID, "%s without an error struct gives %d", call, without);
}

/* Makes a call twice, with e an error struct and with e NULL. A macro, for only a macro can
   evaluate an expression twice and print it. */
#define INVALID(t, call) do { \
        lvm_error fault = {0, ""}, *e = &fault; \
        int with = (call); \
        e = NULL; \
        int without = (call); \
        check_invalid(t, #call, with, without, &fault); \
    } while (0)

#endif
