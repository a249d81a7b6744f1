/* cancel.c - a prediction that another thread stops, and the same context used again afterwards.

       cc -O2 -ffp-contract=off -DLVM_NO_MAIN -o cancel examples/cancel.c lvm.c -lm -lpthread
       ./cancel weights.bin 0.5 prompt/01.png prompt/02.png prompt/03.png

   Predicts in a thread, as a program with a window does, and stops it after half a second, as its
   Cancel button would. Then asks again and waits: out.png. */
#define _POSIX_C_SOURCE 200809L
#define LVM_API_ONLY
#include "../lvm.c"
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct job {
    lvm_ctx *ctx;
    lvm_image *prompt, answer;
    int n, code;
    lvm_error error;
    atomic_int stop;
    const char *stage; /* how far it came; other threads may look once it has ended */
    int64_t done, all;
};

/* lvm calls this many times a second, always in the thread that called lvm. Whatever can be asked
   here may stop the work: a flag, as here, or a clock. */
static int on_progress(void *user, const char *stage, int64_t done, int64_t all) {
    struct job *job = user;
    job->stage = stage;
    job->done = done;
    job->all = all;
    return atomic_load(&job->stop);
}

static void *predict(void *arg) {
    struct job *job = arg;
    job->code =
        lvm_predict(job->ctx, job->prompt, job->n, NULL, 1, 1, &job->answer, &job->error);
    return NULL;
}

static void wait_seconds(double seconds) {
    struct timespec t = {(time_t)seconds, (long)(1e9 * (seconds - (double)(time_t)seconds))};
    nanosleep(&t, NULL);
}

/* Starts the prediction, stops it after some seconds, and does it again in peace. */
static int stop_and_repeat(struct job *job, double seconds) {
    pthread_t thread;
    job->error = (lvm_error){LVM_MEMORY, "no thread can be started"};
    if (pthread_create(&thread, NULL, predict, job) != 0) return LVM_MEMORY;
    wait_seconds(seconds);
    atomic_store(&job->stop, 1);
    pthread_join(thread, NULL);
    if (job->code == LVM_CANCELLED)
        printf("stopped at %s, %lld of %lld\n", job->stage, (long long)job->done,
               (long long)job->all);
    else if (job->code != LVM_OK)
        return job->code;
    lvm_image_free(&job->answer); /* there is one where the prediction was faster */
    atomic_store(&job->stop, 0);
    predict(job);
    return job->code;
}

int main(int argc, char **argv) {
    struct job job = {.n = argc - 3, .error = {LVM_MEMORY, "out of memory"}};
    lvm_options options = lvm_default_options();
    if (argc < 4) return fprintf(stderr, "usage: cancel WEIGHTS SECONDS IMAGE...\n"), 2;
    options.progress = on_progress;
    options.user = &job;
    lvm_model *model = lvm_open(argv[1], 0, &job.error);
    job.ctx = model != NULL ? lvm_ctx_new(model, &options, &job.error) : NULL;
    job.prompt = calloc((size_t)job.n, sizeof *job.prompt);
    int done = job.ctx != NULL && job.prompt != NULL;
    for (int i = 0; done && i < job.n; i++)
        done = lvm_image_load(argv[3 + i], &job.prompt[i], &job.error) == LVM_OK;
    done = done && stop_and_repeat(&job, atof(argv[2])) == LVM_OK &&
           lvm_image_save("out.png", &job.answer, &job.error) == LVM_OK;
    if (done) printf("out.png\n");
    else fprintf(stderr, "cancel: %s\n", job.error.text);
    for (int i = 0; job.prompt != NULL && i < job.n; i++) lvm_image_free(&job.prompt[i]);
    free(job.prompt);
    lvm_image_free(&job.answer);
    lvm_ctx_free(job.ctx);
    lvm_close(model);
    return !done;
}
