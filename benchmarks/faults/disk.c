/* A disk that fails: preloaded (LD_PRELOAD), it counts the calls that write, sync, make or rename files below a folder,
   and lets one of them fail, or that one and all after it. disk.py builds and arms it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long calls, failing_call, failing_errno, goes_on;

/* Fail the call number `at` (from 1; 0: none) with `number`; stays: and all after it. */
void fault_arm(const char *below, long at, long number, long stays) {
    strncpy(folder, below, sizeof folder - 1);
    calls = 0, failing_call = at, failing_errno = number, goes_on = stays;
}

long fault_calls(void) { return calls; }

static int is_below(const char *path) {
    char whole[PATH_MAX];
    if (!folder[0] || !path)
        return 0;
    if (path[0] != '/') {
        if (!getcwd(whole, sizeof whole) || strlen(whole) + strlen(path) + 2 > sizeof whole)
            return 0;
        strcat(strcat(whole, "/"), path);
        path = whole;
    }
    return !strncmp(path, folder, strlen(folder)) && path[strlen(folder)] == '/';
}

static int is_open_below(int descriptor) {
    char link[40], path[PATH_MAX];
    if (!folder[0])
        return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0)
        return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether this call, on such a file, is to fail. */
static int fails(int counted) {
    if (!counted)
        return 0;
    calls++;
    if (!failing_call || calls < failing_call || (calls > failing_call && !goes_on))
        return 0;
    errno = (int)failing_errno;
    return 1;
}

#define REAL(name) ((__typeof__(&name))real_##name())
#define FIND(name)                                                                                                     \
    static void *real_##name(void) {                                                                                   \
        static void *found;                                                                                            \
        return found ? found : (found = dlsym(RTLD_NEXT, #name));                                                      \
    }
#define ON_DESCRIPTOR(type, name, parameters, arguments)                                                               \
    FIND(name)                                                                                                         \
    type name parameters { return fails(is_open_below(fd)) ? -1 : REAL(name) arguments; }
#define ON_PATH(name, path, parameters, arguments)                                                                     \
    FIND(name)                                                                                                         \
    int name parameters { return fails(is_below(path)) ? -1 : REAL(name) arguments; }
#define OPEN(name, parameters, arguments)                                                                              \
    FIND(name)                                                                                                         \
    int name parameters {                                                                                              \
        va_list more;                                                                                                  \
        va_start(more, flags);                                                                                         \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0;                                        \
        va_end(more);                                                                                                  \
        return (flags & O_ACCMODE) != O_RDONLY && fails(is_below(path)) ? -1 : REAL(name) arguments;                   \
    }

ON_DESCRIPTOR(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
ON_DESCRIPTOR(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t at), (fd, data, size, at))
ON_DESCRIPTOR(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t at), (fd, data, size, at))
ON_DESCRIPTOR(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
ON_DESCRIPTOR(ssize_t, pwritev, (int fd, const struct iovec *parts, int count, off_t at), (fd, parts, count, at))
ON_DESCRIPTOR(ssize_t, pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), (fd, parts, count, at))
ON_DESCRIPTOR(int, fsync, (int fd), (fd))
ON_DESCRIPTOR(int, fdatasync, (int fd), (fd))
ON_DESCRIPTOR(int, ftruncate, (int fd, off_t size), (fd, size))
ON_DESCRIPTOR(int, ftruncate64, (int fd, off64_t size), (fd, size))
ON_PATH(rename, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_PATH(link, to, (const char *from, const char *to), (from, to))
ON_PATH(linkat, to, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
ON_PATH(mkdir, path, (const char *path, mode_t mode), (path, mode))
OPEN(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode))
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode))

FIND(fwrite)
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    return fails(is_open_below(fileno(file))) ? 0 : REAL(fwrite)(data, size, count, file);
}
