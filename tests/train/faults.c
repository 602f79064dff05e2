// For LD_PRELOAD: counts and logs the calls of libc that change files in one folder, and spoils the n-th of them.
// safetensors renames its temporary file by a system call of its own, which is not seen; it is between a write and a
// close, which are.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

// What happens at the n-th call; the last two go on: whatever needs space, or everything, fails from then on.
enum mode { COUNT, SIGNAL_BEFORE, SIGNAL_AFTER, FAIL, SHORT, FULL, READ_ONLY };
// What a call does: takes space on the disk, changes a folder's entries only, or closes a file.
enum kind { SPACE, ENTRY, CLOSE };
// What becomes of one call.
enum fate { AS_EVER, REFUSED, HALF, DEADLY };

static char folder[PATH_MAX];
static size_t folder_length;  // 0: not armed
static long spoiled;
static int mode, value;
static long count;
static char log_text[1 << 20];
static size_t log_length;

// From now on changes in `path` (absolute, without symbolic links) are counted; `number` is a signal or an errno.
void faults_arm(const char* path, long n, int what, int number) {
  spoiled = n, mode = what, value = number;
  count = 0, log_length = 0, log_text[0] = 0;
  snprintf(folder, sizeof folder, "%s", path);
  folder_length = strlen(folder);
}

void faults_disarm(void) { folder_length = 0; }

// One line a call, between tabs: its name, the bytes it was to write, its path, what was renamed to that path.
const char* faults_log(void) { return log_text; }

// The absolute path of `name` in the folder that `at` is open on, of `at` itself where `name` is null.
static const char* full_path(int at, const char* name, char* buffer) {
  if (name && name[0] == '/') return name;
  char link[64];
  if (at == AT_FDCWD) {
    strcpy(link, "/proc/self/cwd");
  } else {
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
  }
  ssize_t length = readlink(link, buffer, PATH_MAX - 1);
  if (length < 0) length = 0;
  buffer[length] = 0;
  if (name) snprintf(buffer + length, PATH_MAX - length, "/%s", name);
  return buffer;
}

static enum fate fail(int number) {
  errno = number;
  return REFUSED;
}

static enum fate fate_of_move(const char* name, enum kind kind, size_t bytes, int at, const char* file, int from_at,
                              const char* from) {
  if (!folder_length) return AS_EVER;
  char buffer[PATH_MAX], from_buffer[PATH_MAX];
  const char* path = full_path(at, file, buffer);
  const char* from_path = from ? full_path(from_at, from, from_buffer) : "";
  if (strncmp(path, folder, folder_length) || (path[folder_length] && path[folder_length] != '/')) return AS_EVER;
  long number = __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
  int written =
      snprintf(log_text + log_length, sizeof log_text - log_length, "%s\t%zu\t%s\t%s\n", name, bytes, path, from_path);
  if (log_length + written < sizeof log_text) log_length += written;
  if (mode == READ_ONLY && number >= spoiled && kind != CLOSE) return fail(value);
  if (mode == FULL && number >= spoiled && kind == SPACE) {
    return number == spoiled && bytes > 1 ? HALF : fail(value);
  }
  if (number != spoiled) return AS_EVER;
  if (mode == SIGNAL_BEFORE) kill(getpid(), value);
  if (mode == FAIL) return fail(value);
  if (mode == SHORT && bytes > 1) return HALF;
  return mode == SIGNAL_AFTER ? DEADLY : AS_EVER;
}

static enum fate fate_of(const char* name, enum kind kind, size_t bytes, int at, const char* file) {
  return fate_of_move(name, kind, bytes, at, file, AT_FDCWD, NULL);
}

#define NEXT(name)               \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define RETURN(chosen, call)                      \
  do {                                            \
    enum fate decided = chosen;                   \
    if (decided == REFUSED) return -1;            \
    __typeof__(call) result = call;               \
    if (decided == DEADLY) kill(getpid(), value); \
    return result;                                \
  } while (0)

#define CHANGES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))

#define OPEN(name)                                                                                           \
  int name(const char* path, int flags, ...) {                                                               \
    NEXT(name);                                                                                              \
    va_list arguments;                                                                                       \
    va_start(arguments, flags);                                                                              \
    mode_t access = va_arg(arguments, mode_t);                                                               \
    va_end(arguments);                                                                                       \
    RETURN(CHANGES(flags) ? fate_of("open", SPACE, 0, AT_FDCWD, path) : AS_EVER, next(path, flags, access)); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                                       \
  int name(int at, const char* path, int flags, ...) {                                                     \
    NEXT(name);                                                                                            \
    va_list arguments;                                                                                     \
    va_start(arguments, flags);                                                                            \
    mode_t access = va_arg(arguments, mode_t);                                                             \
    va_end(arguments);                                                                                     \
    RETURN(CHANGES(flags) ? fate_of("open", SPACE, 0, at, path) : AS_EVER, next(at, path, flags, access)); \
  }
OPENAT(openat)
OPENAT(openat64)

#define CREAT(name)                                                        \
  int name(const char* path, mode_t access) {                              \
    NEXT(name);                                                            \
    RETURN(fate_of("open", SPACE, 0, AT_FDCWD, path), next(path, access)); \
  }
CREAT(creat)
CREAT(creat64)

ssize_t write(int fd, const void* from, size_t bytes) {
  NEXT(write);
  enum fate fate = fate_of("write", SPACE, bytes, fd, NULL);
  RETURN(fate, next(fd, from, fate == HALF ? bytes / 2 : bytes));
}

#define PWRITE(name, offset_type)                                            \
  ssize_t name(int fd, const void* from, size_t bytes, offset_type offset) { \
    NEXT(name);                                                              \
    enum fate fate = fate_of("write", SPACE, bytes, fd, NULL);               \
    RETURN(fate, next(fd, from, fate == HALF ? bytes / 2 : bytes, offset));  \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec* parts, int number) {
  NEXT(writev);
  size_t bytes = 0;
  for (int i = 0; i < number; i++) bytes += parts[i].iov_len;
  enum fate fate = fate_of("write", SPACE, bytes, fd, NULL);
  if (fate != HALF) RETURN(fate, next(fd, parts, number));
  size_t half = bytes / 2;
  while (parts->iov_len == 0) parts++;
  struct iovec part = {parts->iov_base, parts->iov_len < half ? parts->iov_len : half};
  return next(fd, &part, 1);
}

#define SENDFILE(name, offset_type)                                         \
  ssize_t name(int to, int from, offset_type* offset, size_t bytes) {       \
    NEXT(name);                                                             \
    enum fate fate = fate_of("write", SPACE, bytes, to, NULL);              \
    RETURN(fate, next(to, from, offset, fate == HALF ? bytes / 2 : bytes)); \
  }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int from, off64_t* from_offset, int to, off64_t* to_offset, size_t bytes, unsigned flags) {
  NEXT(copy_file_range);
  enum fate fate = fate_of("write", SPACE, bytes, to, NULL);
  RETURN(fate, next(from, from_offset, to, to_offset, fate == HALF ? bytes / 2 : bytes, flags));
}

#define SYNC(name)                                         \
  int name(int fd) {                                       \
    NEXT(name);                                            \
    RETURN(fate_of("sync", SPACE, 0, fd, NULL), next(fd)); \
  }
SYNC(fsync)
SYNC(fdatasync)

#define FTRUNCATE(name, offset_type)                                   \
  int name(int fd, offset_type length) {                               \
    NEXT(name);                                                        \
    RETURN(fate_of("truncate", SPACE, 0, fd, NULL), next(fd, length)); \
  }
FTRUNCATE(ftruncate, off_t)
FTRUNCATE(ftruncate64, off64_t)

#define TRUNCATE(name, offset_type)                                            \
  int name(const char* path, offset_type length) {                             \
    NEXT(name);                                                                \
    RETURN(fate_of("truncate", SPACE, 0, AT_FDCWD, path), next(path, length)); \
  }
TRUNCATE(truncate, off_t)
TRUNCATE(truncate64, off64_t)

int close(int fd) {
  NEXT(close);
  if (!folder_length || !CHANGES(fcntl(fd, F_GETFL))) return next(fd);
  enum fate fate = fate_of("close", CLOSE, 0, fd, NULL);
  // a close that fails has closed all the same
  if (fate == REFUSED) next(fd), errno = value;
  RETURN(fate, next(fd));
}

int rename(const char* from, const char* to) {
  NEXT(rename);
  RETURN(fate_of_move("rename", ENTRY, 0, AT_FDCWD, to, AT_FDCWD, from), next(from, to));
}

int renameat(int from_at, const char* from, int at, const char* to) {
  NEXT(renameat);
  RETURN(fate_of_move("rename", ENTRY, 0, at, to, from_at, from), next(from_at, from, at, to));
}

int renameat2(int from_at, const char* from, int at, const char* to, unsigned flags) {
  NEXT(renameat2);
  RETURN(fate_of_move("rename", ENTRY, 0, at, to, from_at, from), next(from_at, from, at, to, flags));
}

int link(const char* from, const char* to) {
  NEXT(link);
  RETURN(fate_of("link", SPACE, 0, AT_FDCWD, to), next(from, to));
}

int linkat(int from_at, const char* from, int at, const char* to, int flags) {
  NEXT(linkat);
  RETURN(fate_of("link", SPACE, 0, at, to), next(from_at, from, at, to, flags));
}

int symlink(const char* content, const char* to) {
  NEXT(symlink);
  RETURN(fate_of("link", SPACE, 0, AT_FDCWD, to), next(content, to));
}

int symlinkat(const char* content, int at, const char* to) {
  NEXT(symlinkat);
  RETURN(fate_of("link", SPACE, 0, at, to), next(content, at, to));
}

int unlink(const char* path) {
  NEXT(unlink);
  RETURN(fate_of("unlink", ENTRY, 0, AT_FDCWD, path), next(path));
}

int unlinkat(int at, const char* path, int flags) {
  NEXT(unlinkat);
  RETURN(fate_of("unlink", ENTRY, 0, at, path), next(at, path, flags));
}

int rmdir(const char* path) {
  NEXT(rmdir);
  RETURN(fate_of("unlink", ENTRY, 0, AT_FDCWD, path), next(path));
}

int mkdir(const char* path, mode_t access) {
  NEXT(mkdir);
  RETURN(fate_of("mkdir", SPACE, 0, AT_FDCWD, path), next(path, access));
}

int mkdirat(int at, const char* path, mode_t access) {
  NEXT(mkdirat);
  RETURN(fate_of("mkdir", SPACE, 0, at, path), next(at, path, access));
}
