/* A disk that fails on command: preloaded, it counts what changes files under one folder, and lets
   the Nth such call fail, or kills the process in the midst of it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[4096];
static long count, at;
static int code; /* an errno; 0: only count; -1: kill */

/* From now on, the call number `n` (from 1) that changes something under `under` fails with `how`.
   A full disk stays full. */
void faults_arm(const char *under, long n, int how) {
    snprintf(folder, sizeof folder, "%s", under);
    count = 0;
    at = n;
    code = how;
}

long faults_count(void) { return count; }

static int here(const char *path) {
    return folder[0] && path && strncmp(path, folder, strlen(folder)) == 0;
}

static int here_fd(int fd) {
    char link[64], path[4096];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return here(path);
}

/* Whether this call is to fail, with errno set; 2: it is to be killed. */
static int fault(int takes_room) {
    if (++count < at || !at || !code) return 0;
    if (code == ENOSPC ? !takes_room : count != at) return 0;
    if (code < 0) return 2;
    errno = code;
    return 1;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define DIE() kill(getpid(), SIGKILL)

ssize_t write(int fd, const void *data, size_t n) {
    REAL(write);
    if (here_fd(fd)) switch (fault(1)) {
        case 2: real(fd, data, n / 2); DIE();
        case 1: return -1;
    }
    return real(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(writev);
    if (here_fd(fd)) switch (fault(1)) {
        case 2: real(fd, parts, n / 2); DIE();
        case 1: return -1;
    }
    return real(fd, parts, n);
}

#define FAIL(condition, room) \
    if (condition) switch (fault(room)) { case 2: DIE(); case 1: return -1; }

ssize_t pwrite64(int fd, const void *data, size_t n, off64_t offset) {
    REAL(pwrite64);
    FAIL(here_fd(fd), 1);
    return real(fd, data, n, offset);
}
int ftruncate64(int fd, off64_t n) {
    REAL(ftruncate64);
    FAIL(here_fd(fd), 1);
    return real(fd, n);
}
int fsync(int fd) {
    REAL(fsync);
    FAIL(here_fd(fd), 0);
    return real(fd);
}
int fdatasync(int fd) {
    REAL(fdatasync);
    FAIL(here_fd(fd), 0);
    return real(fd);
}
int rename(const char *from, const char *to) {
    REAL(rename);
    FAIL(here(to), 0);
    return real(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
    REAL(renameat);
    FAIL(here(to), 0);
    return real(a, from, b, to);
}
int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    FAIL(here(path), 1);
    return real(path, mode);
}
int unlinkat(int at_fd, const char *path, int flags) {
    REAL(unlinkat);
    if (here_fd(at_fd) && fault(0) == 2) DIE(); /* what is to go may only stay */
    return real(at_fd, path, flags);
}
int rmdir(const char *path) {
    REAL(rmdir);
    if (here(path) && fault(0) == 2) DIE();
    return real(path);
}
