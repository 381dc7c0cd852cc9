/* The builtins that read and write one file. */
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>
#include "builtin.h"

enum { CHUNK = 64 * 1024, SEND_MOST = 1024 * 1024, NAMES_TRIED = 100 };

static char chunk[CHUNK];

/* --- read --- */

/* Until the end, or left bytes when that is not negative. */
static int copy_out(int fd, long long left)
{
	for (;;) {
		size_t want = left < 0 || left > CHUNK ? CHUNK : (size_t)left;
		ssize_t n = want ? read(fd, chunk, want) : 0;
		if (n == 0)
			return 0;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 || !write_all(1, chunk, (size_t)n))
			return -1;
		left -= left < 0 ? 0 : n;
	}
}

int builtin_read(char **argv)
{
	long long offset = 0, length = -1;
	struct stat st;
	if ((*argv[2] && !builtin_number(argv[2], 10, &offset)) || (*argv[3] && !builtin_number(argv[3], 10, &length)) || offset < 0)
		return builtin_fail_with(EINVAL, "not a number", argv[2]);
	int fd = open(argv[1], O_RDONLY | O_CLOEXEC);
	if (fd < 0 || fstat(fd, &st) < 0)
		return builtin_fail(argv[1]);
	if (S_ISDIR(st.st_mode)) {
		errno = EISDIR;
		return builtin_fail(argv[1]);
	}
	if (offset > 0 && lseek(fd, offset, SEEK_SET) < 0)
		return builtin_fail(argv[1]);
	/* Page cache to pipe without a copy, where the file system can. */
	while (S_ISREG(st.st_mode) && st.st_size > 0 && length != 0) {
		size_t want = length < 0 || length > SEND_MOST ? SEND_MOST : (size_t)length;
		ssize_t n = sendfile(1, fd, NULL, want);
		if (n == 0)
			return 0;
		if (n < 0)
			break;
		length -= length < 0 ? 0 : n;
	}
	return copy_out(fd, length) < 0 ? builtin_fail(argv[1]) : 0;
}

/* --- write --- */

static bool copy_in(int fd)
{
	for (;;) {
		ssize_t n = read(0, chunk, CHUNK);
		if (n == 0)
			return true;
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 || !write_all(fd, chunk, (size_t)n))
			return false;
	}
}

static char temporary[PATH_MAX];

static void drop_temporary(int signal)
{
	(void)signal;
	unlink(temporary);
	_exit(1);
}

static void name_temporary(const char *path)
{
	static unsigned long long seed;
	const char *slash = strrchr(path, '/');
	int directory = slash ? (int)(slash + 1 - path) : 0;
	if (seed == 0)
		seed = (unsigned long long)getpid() << 20;
	snprintf(temporary, sizeof temporary, "%.*s.%s.ramet-%06llx", directory, path, path + directory, seed++ & 0xffffff);
}

/* A file without a name, if the file system has such: then nothing is left behind whatever happens. */
static int open_aside(const char *path, mode_t mode, bool *nameless)
{
	char directory[PATH_MAX];
	const char *slash = strrchr(path, '/');
	snprintf(directory, sizeof directory, "%.*s", slash ? (int)(slash + 1 - path) : 1, slash ? path : ".");
	int fd = open(directory, O_TMPFILE | O_WRONLY | O_CLOEXEC, mode);
	*nameless = fd >= 0;
	for (int i = 0; fd < 0 && i < NAMES_TRIED; i++) {
		name_temporary(path);
		signal(SIGTERM, drop_temporary);
		fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, mode);
		if (fd < 0 && errno != EEXIST)
			break;
	}
	return fd;
}

static int give_name(int fd, const char *path)
{
	char self[64];
	snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
	for (int i = 0; i < NAMES_TRIED; i++) {
		name_temporary(path);
		if (linkat(AT_FDCWD, self, AT_FDCWD, temporary, AT_SYMLINK_FOLLOW) == 0)
			return 0;
		if (errno != EEXIST)
			break;
	}
	return -1;
}

/* A file that is replaced keeps its mode and owner; what a symbolic link points to is replaced, not the link. */
static int replace(const char *name, mode_t mode)
{
	static char resolved[PATH_MAX];
	struct stat old;
	bool nameless, there = stat(name, &old) == 0;
	const char *path = there && realpath(name, resolved) ? resolved : name;
	if (there && !S_ISREG(old.st_mode)) {
		errno = S_ISDIR(old.st_mode) ? EISDIR : EINVAL;
		return builtin_fail(name);
	}
	int fd = open_aside(path, mode, &nameless);
	if (fd < 0)
		return builtin_fail(name);
	if (there && fchown(fd, old.st_uid, old.st_gid) < 0)
		(void)!fchown(fd, (uid_t)-1, old.st_gid);
	if (there)
		fchmod(fd, old.st_mode & 07777);
	if (copy_in(fd) && fsync(fd) == 0 && (!nameless || give_name(fd, path) == 0) && rename(temporary, path) == 0)
		return 0;
	int error = errno;
	if (temporary[0])
		unlink(temporary);
	errno = error;
	return builtin_fail(name);
}

int builtin_write(char **argv)
{
	const char *path = argv[1], *flags = argv[4];
	long long offset = 0, mode = 0644;
	if ((*argv[2] && !builtin_number(argv[2], 10, &offset)) || (*argv[3] && !builtin_number(argv[3], 8, &mode)) || offset < 0)
		return builtin_fail_with(EINVAL, "not a number", argv[2]);
	if (flags[strspn(flags, "cxtapr")])
		return builtin_fail_with(EINVAL, "unknown flag", flags);
	if (strchr(flags, 'p') && make_parents(path, 0755, false) < 0)
		return builtin_fail(path);
	if (strchr(flags, 'r'))
		return replace(path, (mode_t)mode);
	int how = O_WRONLY | O_CLOEXEC | O_NOCTTY;
	how |= strchr(flags, 'c') || strchr(flags, 'x') ? O_CREAT : 0;
	how |= strchr(flags, 'x') ? O_EXCL : 0;
	how |= strchr(flags, 't') ? O_TRUNC : 0;
	how |= strchr(flags, 'a') ? O_APPEND : 0;
	int fd = open(path, how, (mode_t)mode);
	if (fd < 0 || (offset > 0 && lseek(fd, offset, SEEK_SET) < 0) || !copy_in(fd) || close(fd) < 0)
		return builtin_fail(path);
	return 0;
}
