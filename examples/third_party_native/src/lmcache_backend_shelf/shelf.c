/* A store of files that works on threads of its own, straight from and to the caller's memory.
 *
 * shelf_start begins a job; shelf_wait waits for it.  A job that is not done in time is left: it goes
 * on, and when it has ended it writes its token to the pipe and frees itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum op { GET, PUT, DELETE, EXISTS };

struct job {
    enum op op;
    char *path, *aside;
    unsigned char *at;
    uint64_t nbytes;
    int64_t token;
    int pipe;
    int error, done, left;
    pthread_mutex_t lock;
    pthread_cond_t ended;
};

static int get(struct job *job) {
    struct stat stat;
    uint64_t moved = 0;
    int fd = open(job->path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno;
    int error = fstat(fd, &stat) ? errno : 0;
    if (!error && (uint64_t)stat.st_size > job->nbytes) error = EMSGSIZE;
    while (!error && moved < (uint64_t)stat.st_size) {
        ssize_t count = pread(fd, job->at + moved, stat.st_size - moved, moved);
        if (count < 0) error = errno;
        else if (count == 0) error = EIO;
        else moved += count;
    }
    if (!error || error == EMSGSIZE) job->nbytes = stat.st_size;
    close(fd);
    return error;
}

static int put(struct job *job) {
    uint64_t moved = 0;
    int error = 0, fd = open(job->aside, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return errno;
    while (!error && moved < job->nbytes) {
        ssize_t count = pwrite(fd, job->at + moved, job->nbytes - moved, moved);
        if (count < 0) error = errno;
        else moved += count;
    }
    close(fd);
    if (!error && rename(job->aside, job->path)) error = errno;
    if (error && unlink(job->aside)) unlink(job->aside);
    return error;
}

static void release(struct job *job) {
    pthread_mutex_destroy(&job->lock);
    pthread_cond_destroy(&job->ended);
    free(job->path);
    free(job->aside);
    free(job);
}

static void *run(void *argument) {
    struct job *job = argument;
    int error = 0;
    if (job->op == GET) error = get(job);
    if (job->op == PUT) error = put(job);
    if (job->op == DELETE && unlink(job->path)) error = errno;
    if (job->op == EXISTS && access(job->path, F_OK)) error = errno;
    pthread_mutex_lock(&job->lock);
    job->error = error;
    job->done = 1;
    int left = job->left;
    pthread_cond_signal(&job->ended);
    pthread_mutex_unlock(&job->lock);
    if (left) {
        while (write(job->pipe, &job->token, sizeof job->token) < 0 && errno == EINTR) {}
        release(job);
    }
    return NULL;
}

/* A running job, or NULL with errno.  The buffer is the job's until it ends. */
struct job *shelf_start(int op, const char *path, const char *aside, void *at, uint64_t nbytes,
                        int64_t token, int pipe) {
    struct job *job = calloc(1, sizeof *job);
    pthread_condattr_t clock;
    pthread_t thread;
    if (!job) return NULL;
    *job = (struct job){.op = op, .path = strdup(path), .aside = strdup(aside), .at = at,
                        .nbytes = nbytes, .token = token, .pipe = pipe};
    pthread_mutex_init(&job->lock, NULL);
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&job->ended, &clock);
    int error = pthread_create(&thread, NULL, run, job);
    if (error) {
        release(job);
        errno = error;
        return NULL;
    }
    pthread_detach(thread);
    return job;
}

/* 0 when it ended in time: then *error is an errno, *nbytes the value's size, and the job is gone.
 * 1 when it was left. */
int shelf_wait(struct job *job, double timeout_s, int *error, uint64_t *nbytes) {
    struct timespec end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += (time_t)timeout_s;
    end.tv_nsec += (long)((timeout_s - (time_t)timeout_s) * 1e9);
    if (end.tv_nsec >= 1000000000L) end.tv_sec++, end.tv_nsec -= 1000000000L;
    pthread_mutex_lock(&job->lock);
    while (!job->done && pthread_cond_timedwait(&job->ended, &job->lock, &end) == 0) {}
    int done = job->done;
    if (!done) job->left = 1;
    *error = job->error;
    *nbytes = job->nbytes;
    pthread_mutex_unlock(&job->lock);
    if (done) release(job);
    return !done;
}

/* Where a card's library would pin memory and make it known; here it is kept from being swapped. */
int shelf_register(void *at, uint64_t nbytes) { return mlock(at, nbytes) ? errno : 0; }
int shelf_unregister(void *at, uint64_t nbytes) { return munlock(at, nbytes) ? errno : 0; }
