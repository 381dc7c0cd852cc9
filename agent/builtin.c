#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "builtin.h"

int builtin_fail_with(int error, const char *message, const char *path)
{
	dprintf(2, "%d %s: %s\n", error, message, path);
	return 1;
}

int builtin_fail(const char *path)
{
	return builtin_fail_with(errno, strerror(errno), path);
}

bool builtin_number(const char *s, int base, long long *value)
{
	char *end;
	errno = 0;
	*value = strtoll(s, &end, base);
	return *s && !*end && errno == 0;
}

bool write_all(int fd, const void *p, unsigned long n)
{
	for (const char *at = p; n > 0;) {
		ssize_t done = write(fd, at, n);
		if (done < 0 && errno == EINTR)
			continue;
		if (done <= 0)
			return false;
		at += done;
		n -= (unsigned long)done;
	}
	return true;
}

int make_parents(const char *path, unsigned mode, bool all)
{
	char part[PATH_MAX];
	size_t n = strlen(path);
	if (n >= sizeof part) {
		errno = ENAMETOOLONG;
		return -1;
	}
	memcpy(part, path, n + 1);
	for (char *p = part + 1; n > 0 && (p = strchr(p, '/')); p++) {
		*p = 0;
		if (mkdir(part, 0755) < 0 && errno != EEXIST && errno != EROFS && errno != EACCES)
			return -1;
		*p = '/';
	}
	struct stat st;
	if (!all || mkdir(path, mode) == 0)
		return 0;
	if (errno == EEXIST && stat(path, &st) == 0 && !S_ISDIR(st.st_mode))
		errno = ENOTDIR;
	else if (errno == EEXIST)
		return 0;
	return -1;
}

static int builtin_rename(char **argv)
{
	return rename(argv[1], argv[2]) < 0 ? builtin_fail(argv[1]) : 0;
}

static int builtin_mkdir(char **argv)
{
	long long mode;
	if (!builtin_number(argv[2], 8, &mode))
		return builtin_fail_with(EINVAL, "not a mode", argv[2]);
	int result = strchr(argv[3], 'p') ? make_parents(argv[1], (mode_t)mode, true) : mkdir(argv[1], (mode_t)mode);
	return result < 0 ? builtin_fail(argv[1]) : 0;
}

static int builtin_chmod(char **argv)
{
	long long mode;
	if (!builtin_number(argv[2], 8, &mode))
		return builtin_fail_with(EINVAL, "not a mode", argv[2]);
	return chmod(argv[1], (mode_t)mode) < 0 ? builtin_fail(argv[1]) : 0;
}

static int builtin_chown(char **argv)
{
	long long uid, gid;
	if (!builtin_number(argv[2], 10, &uid) || !builtin_number(argv[3], 10, &gid))
		return builtin_fail_with(EINVAL, "not a number", argv[2]);
	return lchown(argv[1], (uid_t)uid, (gid_t)gid) < 0 ? builtin_fail(argv[1]) : 0;
}

static int builtin_sync(char **argv)
{
	(void)argv;
	sync();
	return 0;
}

static const struct builtin {
	const char *name;
	int (*run)(char **argv);
	int least, most; /* arguments besides the name; those left out are empty strings */
} builtins[] = {
	{"read", builtin_read, 1, 3},     {"write", builtin_write, 1, 4},   {"stat", builtin_stat, 1, 1},
	{"list", builtin_list, 1, 1},     {"remove", builtin_remove, 1, 2}, {"rename", builtin_rename, 2, 2},
	{"mkdir", builtin_mkdir, 2, 3},   {"chmod", builtin_chmod, 2, 2},   {"chown", builtin_chown, 3, 3},
	{"pack", builtin_pack, 1, 1},     {"unpack", builtin_unpack, 1, 2}, {"hooks", builtin_hooks, 2, 2},
	{"sync", builtin_sync, 0, 0},     {"slim", builtin_slim, 0, 0},     {"reclaim", builtin_reclaim, 1, 1},
	{"tune", builtin_tune, 1, BUILTIN_ARGUMENTS},
};

static const struct builtin *find(const char *name)
{
	for (size_t i = 0; i < sizeof builtins / sizeof *builtins; i++)
		if (strcmp(builtins[i].name, name) == 0)
			return &builtins[i];
	return NULL;
}

bool builtin_exists(const char *name)
{
	return find(name) != NULL;
}

int builtin_run(int argc, char **argv)
{
	const struct builtin *b = find(argv[0]);
	char *all[BUILTIN_ARGUMENTS + 2];
	if (argc - 1 < b->least || argc - 1 > b->most)
		return builtin_fail_with(EINVAL, "wrong number of arguments", argv[0]);
	for (int i = 0; i <= BUILTIN_ARGUMENTS; i++)
		all[i] = i < argc ? argv[i] : "";
	all[BUILTIN_ARGUMENTS + 1] = NULL;
	umask(022);
	return b->run(all);
}
