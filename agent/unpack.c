#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "builtin.h"
#include "tar.h"
#include "tarhead.h"

enum { BUFFER = 64 * 1024, PART_MAX = 256 };

/* Directories get their modes and times when nothing is written into them any more. */
struct later {
	struct later *next;
	struct tar_entry *entry; /* without its name arrays */
	char path[];
};

struct unpacker {
	int in, root;
	bool owners, root_is_new;
	struct tar_failure *failure;
	size_t start, end;
	uint8_t buf[BUFFER];
	int parent; /* of parent_path, or -1; nothing that is unpacked can replace a directory, so it stays true */
	char parent_path[TAR_NAME_MAX];
	struct later *later;
	struct tar_entry entry;
	struct tar_extension extension;
	uint8_t pax[TAR_PAX_MAX];
};

static bool fail_with(struct unpacker *u, int error, const char *message, const char *path)
{
	u->failure->error = error;
	snprintf(u->failure->message, sizeof u->failure->message, "%s", message);
	snprintf(u->failure->path, sizeof u->failure->path, "%s", path);
	return false;
}

static bool fail(struct unpacker *u, const char *path)
{
	return fail_with(u, errno, strerror(errno), path);
}

/* --- the stream --- */

/* At least one byte in the buffer; false at the end. */
static bool fill(struct unpacker *u)
{
	if (u->start < u->end)
		return true;
	ssize_t n;
	do
		n = read(u->in, u->buf, sizeof u->buf);
	while (n < 0 && errno == EINTR);
	u->start = 0;
	u->end = n > 0 ? (size_t)n : 0;
	return n > 0;
}

/* n bytes to `to`, to the file fd, or nowhere. */
static bool take(struct unpacker *u, uint8_t *to, int fd, int64_t n, const char *path)
{
	while (n > 0) {
		if (!fill(u))
			return fail_with(u, EPIPE, "the archive ends too early", path);
		size_t part = u->end - u->start;
		if ((int64_t)part > n)
			part = (size_t)n;
		if (to) {
			memcpy(to, u->buf + u->start, part);
			to += part;
		} else if (fd >= 0 && !write_all(fd, u->buf + u->start, part)) {
			return fail(u, path);
		}
		u->start += part;
		n -= (int64_t)part;
	}
	return true;
}

static bool skip_padding(struct unpacker *u, int64_t size)
{
	return take(u, NULL, -1, (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK, "padding");
}

/* --- paths: no symbolic link is ever followed below the root --- */

static int step(int dir, const char *part, bool make)
{
	const int how = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	int fd = openat(dir, part, how);
	if (fd < 0 && errno == ENOENT && make && (mkdirat(dir, part, 0755) == 0 || errno == EEXIST))
		fd = openat(dir, part, how);
	return fd;
}

/* The directory that path lies in, and the last part of path. The descriptor is the unpacker's. */
static int open_parent(struct unpacker *u, const char *path, bool make, const char **last)
{
	const char *slash = strrchr(path, '/');
	size_t n = slash ? (size_t)(slash - path) : 0;
	*last = slash ? slash + 1 : path;
	if (u->parent >= 0 && strlen(u->parent_path) == n && memcmp(u->parent_path, path, n) == 0)
		return u->parent;
	int dir = fcntl(u->root, F_DUPFD_CLOEXEC, 0);
	for (size_t at = 0; at < n && dir >= 0;) {
		char part[PART_MAX];
		size_t length = strcspn(path + at, "/");
		if (length >= sizeof part) {
			close(dir);
			errno = ENAMETOOLONG;
			return -1;
		}
		memcpy(part, path + at, length);
		part[length] = 0;
		int next = step(dir, part, make), error = errno;
		close(dir);
		errno = error;
		dir = next;
		at += length + 1;
	}
	if (dir < 0)
		return -1;
	if (u->parent >= 0)
		close(u->parent);
	u->parent = dir;
	memcpy(u->parent_path, path, n);
	u->parent_path[n] = 0;
	return dir;
}

/* Makes room for something that is no directory. */
static bool clear_way(int dir, const char *last)
{
	return unlinkat(dir, last, 0) == 0 || errno == ENOENT;
}

/* --- entries --- */

static unsigned mode_of(const struct unpacker *u, const struct tar_entry *e)
{
	/* Without its owner, a setuid program would be the unpacking user's. */
	return e->mode & (u->owners ? 07777 : 0777);
}

static bool finish(struct unpacker *u, int dir, const char *last, const struct tar_entry *e)
{
	struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {e->mtime, e->mtime_ns}};
	if (u->owners && fchownat(dir, last, e->uid, e->gid, AT_SYMLINK_NOFOLLOW) < 0)
		return fail(u, e->name);
	if (e->type != '2' && fchmodat(dir, last, mode_of(u, e), 0) < 0)
		return fail(u, e->name);
	/* A time that the file system cannot store is no reason to stop. */
	utimensat(dir, last, times, AT_SYMLINK_NOFOLLOW);
	return true;
}

static bool unpack_file(struct unpacker *u, int dir, const char *last, const struct tar_entry *e)
{
	const int how = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
	int fd = openat(dir, last, how, 0600);
	if (fd < 0 && errno == EEXIST && clear_way(dir, last))
		fd = openat(dir, last, how, 0600);
	if (fd < 0)
		return fail(u, e->name);
	struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {e->mtime, e->mtime_ns}};
	bool good = take(u, NULL, fd, e->size, e->name) && skip_padding(u, e->size);
	if (good && ((u->owners && fchown(fd, e->uid, e->gid) < 0) || fchmod(fd, mode_of(u, e)) < 0))
		good = fail(u, e->name);
	futimens(fd, times);
	if (close(fd) < 0 && good)
		good = fail(u, e->name);
	return good;
}

static bool remember(struct unpacker *u, const struct tar_entry *e)
{
	struct later *l = malloc(sizeof *l + strlen(e->name) + 1);
	/* The names are at the end of the struct and are not wanted: there may be very many directories. */
	struct tar_entry *copy = malloc(offsetof(struct tar_entry, name));
	if (!l || !copy) {
		free(l);
		free(copy);
		return fail(u, e->name);
	}
	memcpy(copy, e, offsetof(struct tar_entry, name));
	strcpy(l->path, e->name);
	l->entry = copy;
	l->next = u->later;
	u->later = l;
	return true;
}

static bool unpack_directory(struct unpacker *u, int dir, const char *last, const struct tar_entry *e)
{
	struct stat st;
	if (mkdirat(dir, last, 0700) < 0) {
		if (errno != EEXIST || fstatat(dir, last, &st, AT_SYMLINK_NOFOLLOW) < 0)
			return fail(u, e->name);
		if (!S_ISDIR(st.st_mode) && (!clear_way(dir, last) || mkdirat(dir, last, 0700) < 0))
			return fail(u, e->name);
	}
	return remember(u, e);
}

static bool unpack_link(struct unpacker *u, const char *path, struct tar_entry *e)
{
	const char *last, *from_last;
	if (!tar_clean_name(e->link) || !e->link[0])
		return fail_with(u, EPERM, "a hard link to outside of the archive", e->name);
	if (strcmp(path, e->link) == 0)
		return true;
	int from = open_parent(u, e->link, false, &from_last);
	/* The next open_parent() closes it. */
	if (from < 0 || (from = fcntl(from, F_DUPFD_CLOEXEC, 0)) < 0)
		return fail(u, e->link);
	int dir = open_parent(u, path, true, &last);
	bool good = dir >= 0 && (linkat(from, from_last, dir, last, 0) == 0 ||
				 (errno == EEXIST && clear_way(dir, last) && linkat(from, from_last, dir, last, 0) == 0));
	int error = errno;
	close(from);
	errno = error;
	return good || fail(u, e->name);
}

static bool unpack_special(struct unpacker *u, int dir, const char *last, const struct tar_entry *e)
{
	static const mode_t types[] = {S_IFCHR, S_IFBLK, 0, S_IFIFO};
	if (!clear_way(dir, last))
		return fail(u, e->name);
	int result = e->type == '2' ? symlinkat(e->link, dir, last) : mknodat(dir, last, types[e->type - '3'] | 0600, makedev(e->major, e->minor));
	return result < 0 ? fail(u, e->name) : finish(u, dir, last, e);
}

static bool unpack_entry(struct unpacker *u)
{
	struct tar_entry *e = &u->entry;
	const char *last;
	tar_apply(e, &u->extension);
	if (!tar_clean_name(e->name))
		return fail_with(u, EPERM, "a name that is absolute or contains ..", e->name);
	if (e->type == 'V') /* the archive's label */
		return take(u, NULL, -1, e->size, e->name) && skip_padding(u, e->size);
	if (e->type != '7' && (e->type < '0' || e->type > '6'))
		return fail_with(u, EOPNOTSUPP, "an unsupported type of member", e->name);
	if (!e->name[0]) {
		if (e->type != '5')
			return fail_with(u, EINVAL, "a member without a name", e->name);
		/* What was there before keeps its mode: "./" in an archive is no order to change /tmp's. */
		return !u->root_is_new || remember(u, e);
	}
	if (e->type == '1')
		return unpack_link(u, e->name, e);
	int dir = open_parent(u, e->name, true, &last);
	if (dir < 0)
		return fail(u, e->name);
	if (e->type == '0' || e->type == '7')
		return unpack_file(u, dir, last, e);
	return e->type == '5' ? unpack_directory(u, dir, last, e) : unpack_special(u, dir, last, e);
}

static bool unpack_extension(struct unpacker *u)
{
	struct tar_entry *e = &u->entry;
	if (e->size > TAR_PAX_MAX)
		return fail_with(u, E2BIG, "an extended header is too long", e->name);
	if (!take(u, u->pax, -1, e->size, e->name) || !skip_padding(u, e->size))
		return false;
	if (e->type == 'g') /* defaults for all: nothing of what we read belongs there */
		return true;
	const char *wrong = e->type == 'x' ? tar_extend(&u->extension, u->pax, (size_t)e->size)
					   : tar_long_name(&u->extension, e->type, u->pax, (size_t)e->size);
	return !wrong || fail_with(u, EINVAL, wrong, e->name);
}

static bool unpack_all(struct unpacker *u)
{
	for (;;) {
		uint8_t block[TAR_BLOCK];
		if (!take(u, block, -1, TAR_BLOCK, "header"))
			return false;
		enum tar_result r = tar_decode(&u->entry, block);
		if (r == TAR_END)
			return true;
		if (r == TAR_BAD)
			return fail_with(u, EINVAL, "not a tar archive, or a damaged one", "header");
		bool extension = strchr("xgLK", u->entry.type) != NULL;
		if (!(extension ? unpack_extension(u) : unpack_entry(u)))
			return false;
	}
}

/* The last first: a directory before the one that it is in. Somebody else's directory may refuse; it was not ours to change then. */
static void finish_directories(struct unpacker *u, bool good)
{
	struct tar_failure ignored, *kept = u->failure;
	u->failure = &ignored;
	for (struct later *l; (l = u->later); free(l)) {
		struct tar_entry *e = &u->entry;
		const char *last;
		u->later = l->next;
		memcpy(e, l->entry, offsetof(struct tar_entry, name));
		free(l->entry);
		strcpy(e->name, l->path);
		int dir = good ? open_parent(u, l->path, false, &last) : -1;
		if (dir >= 0)
			finish(u, dir, *last ? last : ".", e);
	}
	u->failure = kept;
}

bool tar_unpack(int in, int root, bool owners, bool root_is_new, struct tar_failure *f)
{
	struct unpacker *u = calloc(1, sizeof *u);
	if (!u) {
		*f = (struct tar_failure){errno, "no memory", ""};
		return false;
	}
	u->in = in;
	u->root = root;
	u->owners = owners;
	u->root_is_new = root_is_new;
	u->failure = f;
	u->parent = -1;
	bool good = unpack_all(u);
	finish_directories(u, good);
	/* Whatever follows the end, so that the sender is not left with a full pipe. */
	while (good && fill(u))
		u->start = u->end;
	if (u->parent >= 0)
		close(u->parent);
	free(u);
	return good;
}

int builtin_unpack(char **argv)
{
	struct tar_failure f;
	const char *path = argv[1], *flags = argv[2];
	struct stat st;
	if (flags[strspn(flags, "o")])
		return builtin_fail_with(EINVAL, "unknown flag", flags);
	bool is_new = stat(path, &st) < 0;
	if (is_new && make_parents(path, 0755, true) < 0)
		return builtin_fail(path);
	int root = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		return builtin_fail(path);
	if (!tar_unpack(0, root, geteuid() == 0 && strchr(flags, 'o'), is_new, &f))
		return builtin_fail_with(f.error, f.message, f.path);
	return 0;
}
