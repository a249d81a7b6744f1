# lvm: one C file. `make` builds the program; `make test` builds and runs every test.
CC      ?= cc
CFLAGS  ?= -O3
WARN    = -Wall -Wextra -Wshadow -Wpedantic
STD     = -std=c11 -ffp-contract=off
LIBS    = -lm -lpthread

lvm: lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) -o $@ lvm.c $(LDFLAGS) $(LIBS)

clean:
	rm -rf lvm build

.PHONY: clean
