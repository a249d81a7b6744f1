/* Counts checks and says which failed, for test drivers that include lvm.c first. */
#ifndef CHECK_H
#define CHECK_H

static int passed, failed;

LVM_PRINTF(2, 3) static void check(int ok, const char *format, ...) {
    va_list args;
    passed += ok != 0;
    failed += ok == 0;
    if (ok) return;
    va_start(args, format);
    fputs("FAILED: ", stdout);
    vprintf(format, args);
    putchar('\n');
    va_end(args);
}

#endif
