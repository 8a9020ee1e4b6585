/* I/O faults for the process that preloads this: the n-th call fails, stalls or kills.
 *
 * Told what to do through a page of shared memory (the file named by LMC_SHIM), laid out as
 * shim.py says.  Calls are counted only while it is armed.  Standard streams are left alone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { K_READ, K_WRITE, K_SYNC, K_OPEN, K_CONNECT, K_SEND, K_RECV, K_NAME, K_SOCKET };
enum action { A_COUNT, A_ERRNO, A_KILL, A_STALL };

struct control {
    int armed, action, error, at, mask, seen, fired, stall_ms;
    int counts[9];
};

static struct control *control;

__attribute__((constructor)) static void attach(void) {
    const char *path = getenv("LMC_SHIM");
    if (!path) return;
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page != MAP_FAILED) control = page;
}

/* 1 when the call must fail; errno is set then. */
static int hit(enum kind kind) {
    if (!control || !control->armed || !(control->mask & (1 << kind))) return 0;
    __atomic_add_fetch(&control->counts[kind], 1, __ATOMIC_SEQ_CST);
    int number = __atomic_add_fetch(&control->seen, 1, __ATOMIC_SEQ_CST);
    if (control->action == A_COUNT || (control->at > 0 && number != control->at)) return 0;
    __atomic_add_fetch(&control->fired, 1, __ATOMIC_SEQ_CST);
    if (control->action == A_KILL) {
        kill(getpid(), SIGKILL);
        for (;;) pause();
    }
    if (control->action == A_STALL) {
        struct timespec left = {control->stall_ms / 1000, (control->stall_ms % 1000) * 1000000L};
        while (nanosleep(&left, &left) && errno == EINTR) {}
        return 0;
    }
    errno = control->error;
    return 1;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define ON_FD(kind, ret, name, params, args) \
    ret name params { \
        REAL(name); \
        if (fd > 2 && hit(kind)) return -1; \
        return real args; \
    }

#define PLAIN(kind, ret, name, params, args) \
    ret name params { \
        REAL(name); \
        if (hit(kind)) return -1; \
        return real args; \
    }

ON_FD(K_READ, ssize_t, read, (int fd, void *b, size_t n), (fd, b, n))
ON_FD(K_READ, ssize_t, pread, (int fd, void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(K_READ, ssize_t, pread64, (int fd, void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(K_READ, ssize_t, readv, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(K_READ, ssize_t, preadv, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
ON_FD(K_READ, ssize_t, preadv64, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
ON_FD(K_READ, ssize_t, preadv2, (int fd, const struct iovec *v, int n, off_t o, int f), (fd, v, n, o, f))
ON_FD(K_READ, ssize_t, preadv64v2, (int fd, const struct iovec *v, int n, off64_t o, int f), (fd, v, n, o, f))
ON_FD(K_WRITE, ssize_t, pwritev64v2, (int fd, const struct iovec *v, int n, off64_t o, int f), (fd, v, n, o, f))
ON_FD(K_WRITE, ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n))
ON_FD(K_WRITE, ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o))
ON_FD(K_WRITE, ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o))
ON_FD(K_WRITE, ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n))
ON_FD(K_WRITE, ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o))
ON_FD(K_WRITE, ssize_t, pwritev64, (int fd, const struct iovec *v, int n, off64_t o), (fd, v, n, o))
ON_FD(K_WRITE, ssize_t, pwritev2, (int fd, const struct iovec *v, int n, off_t o, int f), (fd, v, n, o, f))
ON_FD(K_WRITE, int, ftruncate, (int fd, off_t n), (fd, n))
ON_FD(K_WRITE, int, ftruncate64, (int fd, off64_t n), (fd, n))
ON_FD(K_SYNC, int, fsync, (int fd), (fd))
ON_FD(K_SYNC, int, fdatasync, (int fd), (fd))
ON_FD(K_CONNECT, int, connect, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
ON_FD(K_SEND, ssize_t, send, (int fd, const void *b, size_t n, int f), (fd, b, n, f))
ON_FD(K_SEND, ssize_t, sendto, (int fd, const void *b, size_t n, int f, const struct sockaddr *a, socklen_t l), (fd, b, n, f, a, l))
ON_FD(K_SEND, ssize_t, sendmsg, (int fd, const struct msghdr *m, int f), (fd, m, f))
ON_FD(K_RECV, ssize_t, recv, (int fd, void *b, size_t n, int f), (fd, b, n, f))
ON_FD(K_RECV, ssize_t, recvfrom, (int fd, void *b, size_t n, int f, struct sockaddr *a, socklen_t *l), (fd, b, n, f, a, l))
ON_FD(K_RECV, ssize_t, recvmsg, (int fd, struct msghdr *m, int f), (fd, m, f))
PLAIN(K_SOCKET, int, socket, (int d, int t, int p), (d, t, p))
PLAIN(K_NAME, int, mkdir, (const char *a, mode_t m), (a, m))
PLAIN(K_NAME, int, mkdirat, (int d, const char *a, mode_t m), (d, a, m))
PLAIN(K_NAME, int, rename, (const char *a, const char *b), (a, b))
PLAIN(K_NAME, int, renameat, (int da, const char *a, int db, const char *b), (da, a, db, b))
PLAIN(K_NAME, int, unlink, (const char *a), (a))
PLAIN(K_NAME, int, unlinkat, (int d, const char *a, int f), (d, a, f))
PLAIN(K_NAME, int, link, (const char *a, const char *b), (a, b))

static mode_t mode_of(int flags, va_list rest) {
    return (flags & O_CREAT) || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        if (hit(K_OPEN)) return -1; \
        return real(path, flags, mode); \
    }

#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = mode_of(flags, rest); \
        va_end(rest); \
        if (hit(K_OPEN)) return -1; \
        return real(dir, path, flags, mode); \
    }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
