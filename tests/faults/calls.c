/* Loaded before libc: counts a process's file-system calls below FAULT_ROOT and, at call number FAULT_AT, does what
   FAULT_DO says: "kill" (SIGKILL to itself), "slow" (take five seconds), or an errno to fail with. FAULT_COUNT names a file for the count. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int calls;

static int below_root(const char *path) {
    const char *root = getenv("FAULT_ROOT");
    return root && path && strncmp(path, root, strlen(root)) == 0;
}

static int fd_below_root(int fd) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below_root(path);
}

static int at_below_root(int folder, const char *path) {
    return path && path[0] != '/' && folder != AT_FDCWD ? fd_below_root(folder) : below_root(path);
}

/* 0 to go on; otherwise errno is set and the call fails. */
static int count(int concerned) {
    if (!concerned) return 0;
    calls++;
    const char *at = getenv("FAULT_AT"), *act = getenv("FAULT_DO"), *log = getenv("FAULT_COUNT");
    if (log) {
        FILE *(*open_file)(const char *, const char *) = dlsym(RTLD_NEXT, "fopen");
        FILE *file = open_file(log, "w");
        fprintf(file, "%d", calls);
        fclose(file);
    }
    if (!at || !act || calls != atoi(at)) return 0;
    if (strcmp(act, "kill") == 0) kill(getpid(), SIGKILL);
    if (strcmp(act, "slow") == 0) return sleep(5);
    errno = atoi(act);
    return -1;
}

#define NEXT(name) __typeof__(&name) name##_ = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, int); \
        va_end(rest); \
        NEXT(name); \
        return count(below_root(path)) ? -1 : name##_(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, int); \
        va_end(rest); \
        NEXT(name); \
        return count(at_below_root(folder, path)) ? -1 : name##_(folder, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    NEXT(write);
    return count(fd_below_root(fd)) ? -1 : write_(fd, data, size);
}

ssize_t read(int fd, void *data, size_t size) {
    NEXT(read);
    return count(fd_below_root(fd)) ? -1 : read_(fd, data, size);
}

#define ON_FD(name) \
    int name(int fd) { \
        NEXT(name); \
        return count(fd_below_root(fd)) ? -1 : name##_(fd); \
    }
ON_FD(fsync)
ON_FD(close)

int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir);
    return count(below_root(path)) ? -1 : mkdir_(path, mode);
}

int rename(const char *from, const char *to) {
    NEXT(rename);
    return count(below_root(from)) ? -1 : rename_(from, to);
}

#define ON_PATH(name) \
    int name(const char *path) { \
        NEXT(name); \
        return count(below_root(path)) ? -1 : name##_(path); \
    }
ON_PATH(unlink)
ON_PATH(rmdir)

int unlinkat(int folder, const char *path, int flags) {
    NEXT(unlinkat);
    return count(at_below_root(folder, path)) ? -1 : unlinkat_(folder, path, flags);
}
