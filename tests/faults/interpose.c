/*
 * Faults below the file layer: a library for LD_PRELOAD that intercepts every call which changes a file system, counts
 * those on the watched paths once it is armed, and at a chosen one kills the process or fails. It sees what Python, Rust and C++ do
 * through the C library, in all threads. Not seen are stdio's own writes and memory maps; that nothing slips through
 * is tested by replaying a record and comparing it with what is on the disk.
 *
 * The system calls are made directly, so that no call of this library is intercepted by itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

/* Mirrored by interpose.py, as is `struct fault`. */
enum operation { WRITE = 1, SYNC = 2, RENAME = 4, MKDIR = 8, UNLINK = 16, RMDIR = 32, CREATE = 64, TRUNCATE = 128 };
enum action { KILL_BEFORE, KILL_WITHIN, FAIL, FULL, RECORD };

struct fault {
    char pattern[PATH_MAX]; /* extended glob of the watched paths; * matches / too */
    int action;
    int operations; /* mask of those that are counted */
    int error;      /* errno of FAIL and FULL */
    int log;        /* descriptor to which RECORD writes */
    long first;     /* number of the call, from 1, at which it happens */
    long calls;     /* how many calls FAIL */
    long room;      /* bytes that can be written before the disk is FULL */
};

static struct fault fault;
static atomic_bool armed;
static atomic_long counted, room;
static pthread_mutex_t recording = PTHREAD_MUTEX_INITIALIZER;

/* A call in progress; nothing is done about it unless it is `watched`. */
struct call {
    enum operation kind;
    bool watched, last;
    char path[PATH_MAX], other[PATH_MAX];
};

void fault_arm(const struct fault *chosen) {
    fault = *chosen;
    counted = 0;
    room = chosen->room;
    armed = true;
}

static void die(void) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

static void path_of(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
}

static void absolute(int directory, const char *path, char *out) {
    char base[PATH_MAX] = "";
    if (path[0] != '/' && directory == AT_FDCWD) {
        if (getcwd(base, sizeof base) == NULL) base[0] = 0;
    } else if (path[0] != '/') {
        path_of(directory, base);
    }
    int length = snprintf(out, PATH_MAX, "%s%s", base, base[0] ? "/" : "");
    snprintf(out + length, (size_t)(PATH_MAX - length), "%s", path);
}

static bool matches(const char *path) { return path[0] && fnmatch(fault.pattern, path, FNM_EXTMATCH) == 0; }

/* Begins a call whose paths are filled in. Returns false if it has to fail, with errno set; may shorten a write. */
static bool begin(struct call *call, size_t *size) {
    call->watched = (fault.operations & call->kind) && (matches(call->path) || matches(call->other));
    if (!call->watched) return true;
    long number = ++counted, left = room, taken;
    bool reached = number >= fault.first;
    switch ((enum action)fault.action) {
    case KILL_BEFORE:
        if (reached) die();
        break;
    case KILL_WITHIN: /* a write that got half through, any other call just before it returns */
        call->last = reached;
        if (reached && size) *size /= 2;
        break;
    case FAIL:
        if (!reached || number - fault.first >= fault.calls) break;
        errno = fault.error;
        return false;
    case FULL:
        if (call->kind != WRITE || *size == 0) break;
        do taken = left < (long)*size ? left : (long)*size;
        while (!atomic_compare_exchange_weak(&room, &left, left - taken));
        *size = (size_t)taken; /* as disks do: a short write first, then the error */
        if (taken > 0) break;
        errno = fault.error;
        return false;
    case RECORD:
        pthread_mutex_lock(&recording);
    }
    return true;
}

/* Ends a call that was begun; `data` and `offset` are what a write wrote where, or the new length of a truncation. */
static void end(struct call *call, long result, const void *data, long offset) {
    if (!call->watched) return;
    int error = errno;
    if (call->last) die();
    if (fault.action == RECORD) {
        if (result >= 0) {
            char line[2 * PATH_MAX + 64];
            size_t size = data ? (size_t)result : 0;
            int length = snprintf(line, sizeof line, "%d\t%zu\t%ld\t%s\t%s\n", call->kind, size, offset, call->path,
                                  call->other);
            syscall(SYS_write, fault.log, line, (size_t)length);
            if (size) syscall(SYS_write, fault.log, data, size);
        }
        pthread_mutex_unlock(&recording);
    }
    errno = error;
}

static struct call on_descriptor(enum operation kind, int descriptor) {
    struct call call = {.kind = kind};
    path_of(descriptor, call.path);
    return call;
}

static struct call on_path(enum operation kind, int directory, const char *path) {
    struct call call = {.kind = kind};
    absolute(directory, path, call.path);
    return call;
}

static struct call on_paths(int from, const char *old, int to, const char *new) {
    struct call call = on_path(RENAME, from, old);
    absolute(to, new, call.other);
    return call;
}

static ssize_t put(int descriptor, const void *data, size_t size, off_t offset) {
    struct call call = armed ? on_descriptor(WRITE, descriptor) : (struct call){.kind = WRITE};
    if (armed && !begin(&call, &size)) return -1;
    bool here = offset < 0;
    ssize_t done = here ? syscall(SYS_write, descriptor, data, size)
                        : syscall(SYS_pwrite64, descriptor, data, size, offset);
    end(&call, done, data, here && call.watched ? lseek(descriptor, 0, SEEK_CUR) - done : offset);
    return done;
}

ssize_t write(int descriptor, const void *data, size_t size) { return put(descriptor, data, size, -1); }
ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) { return put(descriptor, data, size, at); }
ssize_t pwrite64(int, const void *, size_t, off64_t) __attribute__((alias("pwrite")));

/* Of a watched file's vector only the first piece is written: short writes are allowed, and callers go on. */
ssize_t writev(int descriptor, const struct iovec *pieces, int count) {
    char path[PATH_MAX] = "";
    if (armed) path_of(descriptor, path);
    if (!armed || !matches(path)) return syscall(SYS_writev, descriptor, pieces, count);
    while (count > 1 && pieces->iov_len == 0) pieces++, count--;
    return count > 0 ? write(descriptor, pieces->iov_base, pieces->iov_len) : 0;
}

/* Copies inside the kernel are refused on watched files: whoever tries them reads and writes instead. */
static bool copies_into_watched(int descriptor) {
    char path[PATH_MAX] = "";
    if (armed) path_of(descriptor, path);
    errno = EINVAL;
    return armed && matches(path);
}

ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
    return copies_into_watched(out) ? -1 : syscall(SYS_sendfile, out, in, offset, size);
}
ssize_t sendfile64(int, int, off64_t *, size_t) __attribute__((alias("sendfile")));

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    return copies_into_watched(out) ? -1 : syscall(SYS_copy_file_range, in, from, out, to, size, flags);
}

/* The body of a function that makes one system call about the paths of `about`. */
#define INTERCEPT(about, size, ...)                                                                                    \
    {                                                                                                                  \
        if (!armed) return (int)syscall(__VA_ARGS__);                                                                  \
        struct call call = about;                                                                                      \
        if (!begin(&call, NULL)) return -1;                                                                            \
        int result = (int)syscall(__VA_ARGS__);                                                                        \
        end(&call, result, NULL, size);                                                                                \
        return result;                                                                                                 \
    }

int fsync(int descriptor) INTERCEPT(on_descriptor(SYNC, descriptor), 0, SYS_fsync, descriptor)
int fdatasync(int descriptor) INTERCEPT(on_descriptor(SYNC, descriptor), 0, SYS_fdatasync, descriptor)

int ftruncate(int descriptor, off_t size)
    INTERCEPT(on_descriptor(TRUNCATE, descriptor), size, SYS_ftruncate, descriptor, size)
int ftruncate64(int, off64_t) __attribute__((alias("ftruncate")));

int mkdirat(int directory, const char *path, mode_t mode)
    INTERCEPT(on_path(MKDIR, directory, path), 0, SYS_mkdirat, directory, path, mode)
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int directory, const char *path, int flags)
    INTERCEPT(on_path(flags & AT_REMOVEDIR ? RMDIR : UNLINK, directory, path), 0, SYS_unlinkat, directory, path, flags)
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
    INTERCEPT(on_paths(from, old, to, new), 0, SYS_renameat2, from, old, to, new, flags)
int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* Only what makes or empties a file is an operation; to open one that is there is none. */
static int open_at(int directory, const char *path, int flags, mode_t mode) {
    bool makes = armed && (flags & O_CREAT) && syscall(SYS_faccessat, directory, path, F_OK) != 0;
    if (!makes && !(flags & O_TRUNC)) return (int)syscall(SYS_openat, directory, path, flags, mode);
    INTERCEPT(on_path(makes ? CREATE : TRUNCATE, directory, path), 0, SYS_openat, directory, path, flags, mode)
}

#define MODE(flags)                                                                                                    \
    mode_t mode = 0;                                                                                                   \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, mode_t);                                                                                   \
        va_end(rest);                                                                                                  \
    }

int openat(int parent, const char *path, int flags, ...) { MODE(flags) return open_at(parent, path, flags, mode); }
int openat64(int, const char *, int, ...) __attribute__((alias("openat")));

int open(const char *path, int flags, ...) { MODE(flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *, int, ...) __attribute__((alias("open")));
