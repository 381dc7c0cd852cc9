/* The builtins that look at directories, or remove them. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include "builtin.h"

/* --- stat and list --- */

static char type_letter(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG: return 'f';
	case S_IFDIR: return 'd';
	case S_IFLNK: return 'l';
	case S_IFCHR: return 'c';
	case S_IFBLK: return 'b';
	case S_IFIFO: return 'p';
	default: return 's';
	}
}

static int print_record(FILE *to, int dir, const char *name, const char *shown)
{
	struct stat st;
	char target[PATH_MAX] = "";
	if (fstatat(dir, name, &st, AT_SYMLINK_NOFOLLOW) < 0)
		return -1;
	if (S_ISLNK(st.st_mode)) {
		ssize_t n = readlinkat(dir, name, target, sizeof target - 1);
		target[n > 0 ? n : 0] = 0;
	}
	fprintf(to, "%c %o %u %u %lld %lld %lu %s%c%s%c", type_letter(st.st_mode), st.st_mode & 07777, st.st_uid, st.st_gid,
		(long long)st.st_size, (long long)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec, (unsigned long)st.st_nlink, shown, 0, target, 0);
	return 0;
}

int builtin_stat(char **argv)
{
	if (print_record(stdout, AT_FDCWD, argv[1], argv[1]) < 0)
		return builtin_fail(argv[1]);
	return fflush(stdout) < 0 ? builtin_fail("stdout") : 0;
}

static bool is_dots(const char *name)
{
	return name[0] == '.' && (!name[1] || (name[1] == '.' && !name[2]));
}

int builtin_list(char **argv)
{
	static char buffer[64 * 1024];
	struct dirent *entry;
	DIR *dir = opendir(argv[1]);
	if (!dir)
		return builtin_fail(argv[1]);
	setvbuf(stdout, buffer, _IOFBF, sizeof buffer);
	errno = 0;
	while ((entry = readdir(dir))) {
		/* What went away in the meantime is not an error. */
		if (!is_dots(entry->d_name) && print_record(stdout, dirfd(dir), entry->d_name, entry->d_name) < 0 && errno != ENOENT)
			return builtin_fail(entry->d_name);
		errno = 0;
	}
	if (errno)
		return builtin_fail(argv[1]);
	return fflush(stdout) < 0 ? builtin_fail("stdout") : 0;
}

/* --- remove --- */

/* One level of the way down: enough to find back up, so that a tree of any depth needs two descriptors. */
struct level {
	struct level *up;
	dev_t dev;
	ino_t ino;
	char name[]; /* in the level above */
};

static struct level *push(struct level *up, int dir, const char *name)
{
	struct stat st;
	struct level *l = malloc(sizeof *l + strlen(name) + 1);
	if (!l || fstat(dir, &st) < 0) {
		free(l);
		return NULL;
	}
	l->up = up;
	l->dev = st.st_dev;
	l->ino = st.st_ino;
	strcpy(l->name, name);
	return l;
}

/* Removes what is not a directory; opens the first directory that it meets. -1: none is left, or (with errno) an error. */
static int remove_files(int dir, char *name)
{
	struct dirent *entry;
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC), sub = -1, error = 0;
	DIR *d = copy < 0 ? NULL : fdopendir(copy);
	if (!d)
		return -1;
	while (sub < 0 && !error && (entry = readdir(d))) {
		if (is_dots(entry->d_name) || unlinkat(dir, entry->d_name, 0) == 0 || errno == ENOENT)
			continue;
		error = errno;
		if (error != EISDIR && error != EPERM)
			break;
		if (unlinkat(dir, entry->d_name, AT_REMOVEDIR) == 0) {
			error = 0;
			continue;
		}
		if (errno == ENOTEMPTY || errno == EEXIST)
			sub = openat(dir, entry->d_name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		error = sub < 0 ? errno == ENOTDIR ? error : errno : 0;
		strcpy(name, entry->d_name);
	}
	closedir(d);
	errno = error;
	return sub;
}

/* Back to the directory above, which must be the one that was come from. */
static int climb(int dir, const struct level *l)
{
	struct stat st;
	int up = openat(dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (up >= 0 && (fstat(up, &st) < 0 || st.st_dev != l->dev || st.st_ino != l->ino)) {
		close(up);
		errno = EAGAIN; /* somebody moved it */
		return -1;
	}
	return up;
}

/* Empties dir, which it closes. */
static int remove_contents(int dir)
{
	struct level *way = NULL;
	char name[NAME_MAX + 1];
	for (;;) {
		int next = remove_files(dir, name);
		if (next < 0 && errno == 0 && !way) {
			close(dir);
			return 0;
		}
		struct level *l = way;
		if (next >= 0) {
			l = push(way, dir, name);
			if (l)
				way = l;
		} else if (errno == 0) {
			next = climb(dir, way);
			if (next >= 0 && unlinkat(next, way->name, AT_REMOVEDIR) < 0 && errno != ENOENT && errno != ENOTEMPTY)
				l = NULL;
			else
				way = way->up;
		}
		if (next < 0 || !l)
			return -1;
		if (l != way)
			free(l);
		close(dir);
		dir = next;
	}
}

int builtin_remove(char **argv)
{
	const char *path = argv[1], *flags = argv[2];
	struct stat st;
	if (flags[strspn(flags, "rf")])
		return builtin_fail_with(EINVAL, "unknown flag", flags);
	if (lstat(path, &st) < 0)
		return errno == ENOENT && strchr(flags, 'f') ? 0 : builtin_fail(path);
	if (!S_ISDIR(st.st_mode))
		return unlink(path) < 0 ? builtin_fail(path) : 0;
	if (strchr(flags, 'r') && rmdir(path) < 0) {
		int dir = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (dir < 0 || remove_contents(dir) < 0)
			return builtin_fail(path);
	} else if (strchr(flags, 'r')) {
		return 0;
	}
	return rmdir(path) < 0 ? builtin_fail(path) : 0;
}
