# lvm: one C file. `make` builds the program; `make test` builds and runs every test.
#   make debug      the tests under the address and undefined-behaviour sanitizers
#   make tsan       the threaded tests under the thread sanitizer
#   make fuzz       damages pictures for FUZZ_SECONDS
#   make liblvm.so  the library; `make install PREFIX=DIR` installs the program
CC      ?= cc
CFLAGS  ?= -O3
WARN    = -Wall -Wextra -Wshadow -Wpedantic
STD     = -std=c11 -ffp-contract=off
LIBS    = -lm -lpthread
PREFIX  ?= /usr/local
B       ?= build
TEST_CFLAGS  ?= -O2
FUZZ_SECONDS ?= 60
SANITIZERS   = -fsanitize=address,undefined -fno-sanitize-recover=all

lvm: lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) -o $@ lvm.c $(LDFLAGS) $(LIBS)

liblvm.so: lvm.c
	$(CC) $(STD) $(WARN) $(CFLAGS) -DLVM_NO_MAIN -shared -fPIC -o $@ lvm.c $(LDFLAGS) $(LIBS)

$(B)/lvm: lvm.c | $(B)
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -o $@ lvm.c $(LDFLAGS) $(LIBS)

$(B)/test_%: tests/test_%.c tests/npy.h lvm.c | $(B)
	$(CC) $(STD) $(WARN) $(TEST_CFLAGS) -o $@ $< $(LDFLAGS) $(LIBS)

$(B)/fuzz_images: tests/test_images.c lvm.c | $(B)
	$(CC) $(STD) $(WARN) -O1 -g $(SANITIZERS) -DLVM_FUZZING -o $@ $< $(LDFLAGS) $(LIBS)

$(B):
	mkdir -p $@

test:
	./run_tests.sh

debug:
	SANITIZE=address,undefined ./run_tests.sh

tsan:
	SANITIZE=thread ./run_tests.sh

fuzz: $(B)/fuzz_images
	$(B)/fuzz_images tests/images --fuzz $(FUZZ_SECONDS)

install: lvm
	mkdir -p $(DESTDIR)$(PREFIX)/bin
	cp lvm $(DESTDIR)$(PREFIX)/bin/lvm

clean:
	rm -rf lvm liblvm.so build

.PHONY: test debug tsan fuzz install clean
