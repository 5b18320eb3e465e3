/* Counts the file-system operations of a process on one folder, and fails or kills it at one of them.

   Preloaded (LD_PRELOAD) before the C library, so that Python, NumPy and the C++ of Orbax's TensorStore all
   call it. crash_shim_arm(folder, number, mode) begins: operation `number` (from 1) of any thread then
     mode 0  is only counted
     mode 1  is not done: the process gets SIGKILL
     mode 2  is half done, if it writes bytes, and the process gets SIGKILL
     mode 3  fails with ENOSPC, and so does every later one that needs space
     mode 4  fails once with EIO
     mode 5  fails once with EACCES
   crash_shim_count() returns how many operations there were.
   An operation is a call with a path under the folder, or with a file that was opened there. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAX_FILES 65536

static char folder[4096];
static size_t folder_length;
static atomic_long count;
static long chosen;
static int mode;
static atomic_uchar ours[MAX_FILES]; /* by descriptor: 1 for a file or folder opened under `folder` */

void crash_shim_arm(const char *path, long number, int what) {
  chosen = number;
  mode = what;
  atomic_store(&count, 0);
  strncpy(folder, path, sizeof folder - 1);
  folder_length = strlen(folder);
}

long crash_shim_count(void) { return atomic_load(&count); }

static void *next(const char *name) {
  void *found = dlsym(RTLD_NEXT, name);
  if (!found) abort();
  return found;
}

static int under(const char *path) {
  if (!folder_length || !path) return 0;
  return !strncmp(path, folder, folder_length) && (path[folder_length] == '/' || !path[folder_length]);
}

static int under_at(int directory, const char *path) {
  if (!folder_length || !path) return 0;
  if (path[0] == '/' || directory == AT_FDCWD) return under(path);
  return directory >= 0 && directory < MAX_FILES && atomic_load(&ours[directory]);
}

static int is_ours(int file) {
  return folder_length && file >= 0 && file < MAX_FILES && atomic_load(&ours[file]);
}

static void die(void) {
  syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
  for (;;) pause();
}

/* Counts an operation. Returns 0 if it may be done, 1 if it is to be half done and then to kill, and -1, with
   errno, if it fails. */
static int enter(int needs_space) {
  long number = atomic_fetch_add(&count, 1) + 1;
  if (mode == 3 && number >= chosen && needs_space) {
    errno = ENOSPC;
    return -1;
  }
  if (number != chosen) return 0;
  if (mode == 1) die();
  if (mode == 2) return 1;
  if (mode == 4 || mode == 5) {
    errno = mode == 4 ? EIO : EACCES;
    return -1;
  }
  return 0;
}

static void note(int file, int is) {
  if (file >= 0 && file < MAX_FILES) atomic_store(&ours[file], is);
}

#define OPEN(name)                                                             \
  int name(const char *path, int flags, ...) {                                 \
    int permissions = 0, mine = under(path), result;                           \
    if (flags & (O_CREAT | O_TMPFILE)) {                                       \
      va_list list;                                                            \
      va_start(list, flags);                                                   \
      permissions = va_arg(list, int);                                         \
      va_end(list);                                                            \
    }                                                                          \
    if (mine) {                                                                \
      int verdict = enter(flags & O_CREAT);                                    \
      if (verdict < 0) return -1;                                              \
      if (verdict) die();                                                      \
    }                                                                          \
    result = ((int (*)(const char *, int, ...))next(#name))(path, flags, permissions); \
    if (result >= 0) note(result, mine);                                       \
    return result;                                                             \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                           \
  int name(int directory, const char *path, int flags, ...) {                  \
    int permissions = 0, mine = under_at(directory, path), result;             \
    if (flags & (O_CREAT | O_TMPFILE)) {                                       \
      va_list list;                                                            \
      va_start(list, flags);                                                   \
      permissions = va_arg(list, int);                                         \
      va_end(list);                                                            \
    }                                                                          \
    if (mine) {                                                                \
      int verdict = enter(flags & O_CREAT);                                    \
      if (verdict < 0) return -1;                                              \
      if (verdict) die();                                                      \
    }                                                                          \
    result = ((int (*)(int, const char *, int, ...))next(#name))(directory, path, flags, permissions); \
    if (result >= 0) note(result, mine);                                       \
    return result;                                                             \
  }
OPENAT(openat)
OPENAT(openat64)

/* A call that changes something at `condition`, with the arguments `call` of the next function. */
#define SIMPLE(type, name, parameters, call, condition, needs_space)           \
  type name parameters {                                                       \
    if (condition) {                                                           \
      int verdict = enter(needs_space);                                        \
      if (verdict < 0) return -1;                                              \
      if (verdict) die();                                                      \
    }                                                                          \
    return ((type(*) parameters)next(#name)) call;                             \
  }

SIMPLE(int, creat, (const char *path, mode_t permissions), (path, permissions), under(path), 1)
SIMPLE(int, rename, (const char *from, const char *to), (from, to), under(from) || under(to), 0)
SIMPLE(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to),
       under_at(a, from) || under_at(b, to), 0)
SIMPLE(int, renameat2, (int a, const char *from, int b, const char *to, unsigned flags), (a, from, b, to, flags),
       under_at(a, from) || under_at(b, to), 0)
SIMPLE(int, unlink, (const char *path), (path), under(path), 0)
SIMPLE(int, unlinkat, (int directory, const char *path, int flags), (directory, path, flags),
       under_at(directory, path), 0)
SIMPLE(int, rmdir, (const char *path), (path), under(path), 0)
SIMPLE(int, mkdir, (const char *path, mode_t permissions), (path, permissions), under(path), 1)
SIMPLE(int, mkdirat, (int directory, const char *path, mode_t permissions), (directory, path, permissions),
       under_at(directory, path), 1)
SIMPLE(int, link, (const char *from, const char *to), (from, to), under(from) || under(to), 1)
SIMPLE(int, linkat, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags),
       under_at(a, from) || under_at(b, to), 1)
SIMPLE(int, symlink, (const char *from, const char *to), (from, to), under(to), 1)
SIMPLE(int, fsync, (int file), (file), is_ours(file), 0)
SIMPLE(int, fdatasync, (int file), (file), is_ours(file), 0)
SIMPLE(int, ftruncate, (int file, off_t length), (file, length), is_ours(file), 0)
SIMPLE(int, ftruncate64, (int file, off64_t length), (file, length), is_ours(file), 0)
SIMPLE(int, truncate, (const char *path, off_t length), (path, length), under(path), 0)
SIMPLE(int, truncate64, (const char *path, off64_t length), (path, length), under(path), 0)

#define WRITE(name, parameters, call, half, size)                              \
  ssize_t name parameters {                                                    \
    if (is_ours(file)) {                                                       \
      int verdict = enter(1);                                                  \
      if (verdict < 0) return -1;                                              \
      if (verdict) {                                                           \
        if ((size) / 2 > 0) ((ssize_t(*) parameters)next(#name)) half;         \
        die();                                                                 \
      }                                                                        \
    }                                                                          \
    return ((ssize_t(*) parameters)next(#name)) call;                          \
  }

WRITE(write, (int file, const void *bytes, size_t size), (file, bytes, size), (file, bytes, size / 2), size)
WRITE(pwrite, (int file, const void *bytes, size_t size, off_t at), (file, bytes, size, at),
      (file, bytes, size / 2, at), size)
WRITE(pwrite64, (int file, const void *bytes, size_t size, off64_t at), (file, bytes, size, at),
      (file, bytes, size / 2, at), size)
WRITE(writev, (int file, const struct iovec *parts, int number), (file, parts, number), (file, parts, number / 2),
      (size_t)number)
WRITE(pwritev, (int file, const struct iovec *parts, int number, off_t at), (file, parts, number, at),
      (file, parts, number / 2, at), (size_t)number)
WRITE(pwritev64, (int file, const struct iovec *parts, int number, off64_t at), (file, parts, number, at),
      (file, parts, number / 2, at), (size_t)number)

int close(int file) {
  int verdict = 0, mine = is_ours(file), result;
  if (mine) {
    verdict = enter(0);
    if (verdict > 0) die();
  }
  int failed = errno;
  note(file, 0);
  result = ((int (*)(int))next("close"))(file);
  if (verdict < 0) {
    errno = failed;
    return -1;
  }
  return result;
}
