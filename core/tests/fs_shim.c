/* Stands between a process and its file system (LD_PRELOAD), so that a test can fail the k-th call that changes something
 * below one folder: by the end of the process, as SIGKILL would bring it, or by ENOSPC. It sees the calls of every
 * library in the process, Python's, Rust's (safetensors) and C++'s (Arrow).
 *
 * shim_arm(folder, k, mode): count from 0 from now on; k < 0: count only. mode 0: end before the k-th call, a write half
 * done. mode 1: from the k-th call on every call that takes space fails with ENOSPC, the first write half done.
 * shim_count(): calls so far. shim_off(): count no more. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_len;
static long at = -1;
static int mode, armed;
static long count;

void shim_arm(const char *folder, long k, int how) {
    strncpy(root, folder, sizeof root - 1);
    root_len = strlen(root);
    at = k; mode = how; count = 0; armed = 1;
}
long shim_count(void) { return count; }
void shim_off(void) { armed = 0; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int below(const char *path) { return strncmp(path, root, root_len) == 0; }

static int at_below(int dir, const char *path) {
    char link[64], place[PATH_MAX];
    if (path[0] == '/') return below(path);
    if (dir == AT_FDCWD) return getcwd(place, sizeof place) && below(place);
    snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
    ssize_t n = readlink(link, place, sizeof place - 1);
    if (n < 0) return 0;
    place[n] = 0;
    return below(place);
}
static int fd_below(int fd) {
    char link[64], place[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, place, sizeof place - 1);
    if (n < 0) return 0;
    place[n] = 0;
    return below(place);
}

/* 0: go on. 1: fail with ENOSPC. 2: the first call that fails. Ends the process in mode 0, unless `torn`: then 2.
 * takes_space: 0 never, 1 always, 2 now and then (a rename whose folder needs another block: it fails only once). */
static int due(int takes_space, int torn) {
    long here = count++;
    if (at < 0) return 0;
    if (mode == 0) {
        if (here != at) return 0;
        if (torn) return 2;
        _exit(137);
    }
    if (!takes_space || here < at || (takes_space == 2 && here > at)) return 0;
    if (here == at) return torn ? 2 : 1;
    return 1;
}
#define FULL(fails) do { if (fails) { errno = ENOSPC; return -1; } } while (0)

static int changes(int flags) { return (flags & (O_CREAT | O_TRUNC)) != 0; }

#define OPEN(name)                                                                  \
    int name(const char *path, int flags, ...) {                                    \
        va_list ap; va_start(ap, flags); mode_t m = va_arg(ap, mode_t); va_end(ap); \
        if (armed && changes(flags) && at_below(AT_FDCWD, path)) FULL(due(1, 0));   \
        return REAL(name)(path, flags, m);                                          \
    }
OPEN(open) OPEN(open64)
#define OPENAT(name)                                                                \
    int name(int dir, const char *path, int flags, ...) {                           \
        va_list ap; va_start(ap, flags); mode_t m = va_arg(ap, mode_t); va_end(ap); \
        if (armed && changes(flags) && at_below(dir, path)) FULL(due(1, 0));        \
        return REAL(name)(dir, path, flags, m);                                     \
    }
OPENAT(openat) OPENAT(openat64)

#define FOPEN(name)                                                                          \
    FILE *name(const char *path, const char *how) {                                          \
        if (armed && how[0] != 'r' && at_below(AT_FDCWD, path) && due(1, 0)) { errno = ENOSPC; return NULL; } \
        return REAL(name)(path, how);                                                        \
    }
FOPEN(fopen) FOPEN(fopen64)

ssize_t write(int fd, const void *data, size_t n) {
    if (armed && fd_below(fd)) {
        int fails = due(1, 1);
        if (fails == 2 && n > 1) {
            ssize_t half = REAL(write)(fd, data, n / 2);
            if (mode == 0) _exit(137);
            return half;
        }
        if (fails && mode == 0) _exit(137);
        FULL(fails);
    }
    return REAL(write)(fd, data, n);
}
ssize_t writev(int fd, const struct iovec *parts, int n) {
    if (armed && fd_below(fd)) FULL(due(1, 0));
    return REAL(writev)(fd, parts, n);
}
#define PWRITE(name, off)                                                  \
    ssize_t name(int fd, const void *data, size_t n, off where) {          \
        if (armed && fd_below(fd)) FULL(due(1, 0));                        \
        return REAL(name)(fd, data, n, where);                             \
    }
PWRITE(pwrite, off_t) PWRITE(pwrite64, off64_t)

#define ON_FD(name, space) int name(int fd) { if (armed && fd_below(fd)) FULL(due(space, 0)); return REAL(name)(fd); }
ON_FD(fsync, 1) ON_FD(fdatasync, 1)
#define TRUNCATE(name, off) int name(int fd, off n) { if (armed && fd_below(fd)) FULL(due(0, 0)); return REAL(name)(fd, n); }
TRUNCATE(ftruncate, off_t) TRUNCATE(ftruncate64, off64_t)
#define FALLOCATE(name, off)                                                            \
    int name(int fd, off from, off n) {                                                 \
        if (armed && fd_below(fd) && due(1, 0)) return ENOSPC;                          \
        return REAL(name)(fd, from, n);                                                 \
    }
FALLOCATE(posix_fallocate, off_t) FALLOCATE(posix_fallocate64, off64_t)

int mkdir(const char *path, mode_t m) {
    if (armed && at_below(AT_FDCWD, path)) FULL(due(1, 0));
    return REAL(mkdir)(path, m);
}
int mkdirat(int dir, const char *path, mode_t m) {
    if (armed && at_below(dir, path)) FULL(due(1, 0));
    return REAL(mkdirat)(dir, path, m);
}
int rename(const char *from, const char *to) {
    if (armed && at_below(AT_FDCWD, to)) FULL(due(2, 0));
    return REAL(rename)(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    if (armed && at_below(b, to)) FULL(due(2, 0));
    return REAL(renameat)(a, from, b, to);
}
int link(const char *from, const char *to) {
    if (armed && at_below(AT_FDCWD, to)) FULL(due(2, 0));
    return REAL(link)(from, to);
}
int unlink(const char *path) {
    if (armed && at_below(AT_FDCWD, path)) FULL(due(0, 0));
    return REAL(unlink)(path);
}
int unlinkat(int dir, const char *path, int flags) {
    if (armed && at_below(dir, path)) FULL(due(0, 0));
    return REAL(unlinkat)(dir, path, flags);
}
int rmdir(const char *path) {
    if (armed && at_below(AT_FDCWD, path)) FULL(due(0, 0));
    return REAL(rmdir)(path);
}
int chmod(const char *path, mode_t m) {
    if (armed && at_below(AT_FDCWD, path)) FULL(due(0, 0));
    return REAL(chmod)(path, m);
}
