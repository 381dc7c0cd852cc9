#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>
#include "builtin.h"
#include "tar.h"
#include "tarhead.h"

enum { BUFFER = 64 * 1024, BUCKETS = 4096, END_BLOCKS = 2 };

struct linked {
	struct linked *next;
	dev_t dev;
	ino_t ino;
	char name[];
};

/* A directory on the way down. Only the lowest is open; the way back up is "..", checked. */
struct level {
	struct level *up;
	dev_t dev;
	ino_t ino;
	char **names;
	size_t count, at, name_length;
};

struct packer {
	int out, dir;
	dev_t device; /* mount points below are sent as empty directories */
	int failures;
	bool broken;
	size_t used;
	uint8_t buf[BUFFER + TAR_ENCODED_MAX];
	struct tar_entry entry;
	struct linked *linked[BUCKETS];
	struct level *level;
};

static void missed(struct packer *p, const char *name)
{
	builtin_fail(name);
	p->failures++;
}

static void flush(struct packer *p)
{
	if (!p->broken && !write_all(p->out, p->buf, p->used))
		p->broken = true;
	p->used = 0;
}

static void put_zeros(struct packer *p, int64_t n)
{
	while (n > 0 && !p->broken) {
		size_t part = n < BUFFER ? (size_t)n : BUFFER;
		if (p->used + part > BUFFER)
			flush(p);
		memset(p->buf + p->used, 0, part);
		p->used += part;
		n -= (int64_t)part;
	}
}

/* Exactly size bytes, whatever the file does in the meantime: the header has promised them. */
static void put_contents(struct packer *p, int fd, int64_t size)
{
	int64_t left = size;
	while (left > 0 && !p->broken) {
		if (p->used >= BUFFER)
			flush(p);
		size_t want = BUFFER - p->used;
		ssize_t n = read(fd, p->buf + p->used, (int64_t)want < left ? want : (size_t)left);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			missed(p, p->entry.name);
		if (n <= 0)
			break;
		p->used += (size_t)n;
		left -= n;
	}
	put_zeros(p, left + (TAR_BLOCK - size % TAR_BLOCK) % TAR_BLOCK);
}

/* True when the file was sent before under another name, which is then in e->link. */
static bool is_known(struct packer *p, const struct stat *st, struct tar_entry *e)
{
	struct linked **bucket = &p->linked[(st->st_ino ^ st->st_dev) % BUCKETS];
	for (struct linked *l = *bucket; l; l = l->next)
		if (l->dev == st->st_dev && l->ino == st->st_ino) {
			strcpy(e->link, l->name);
			return true;
		}
	struct linked *l = malloc(sizeof *l + strlen(e->name) + 1);
	if (l) {
		l->dev = st->st_dev;
		l->ino = st->st_ino;
		strcpy(l->name, e->name);
		l->next = *bucket;
		*bucket = l;
	}
	return false;
}

static char type_of(mode_t mode)
{
	switch (mode & S_IFMT) {
	case S_IFREG: return '0';
	case S_IFLNK: return '2';
	case S_IFCHR: return '3';
	case S_IFBLK: return '4';
	case S_IFDIR: return '5';
	case S_IFIFO: return '6';
	default: return 0; /* a socket means nothing elsewhere */
	}
}

static void put_header(struct packer *p)
{
	if (p->used >= BUFFER)
		flush(p);
	p->used += tar_encode(&p->entry, p->buf + p->used);
	if (p->used >= BUFFER)
		flush(p);
}

/* What `last` in p->dir is, under the name that p->entry has. */
static void put_entry(struct packer *p, const char *last, const struct stat *st)
{
	struct tar_entry *e = &p->entry;
	int fd = -1;
	e->type = type_of(st->st_mode);
	e->mode = st->st_mode & 07777;
	e->uid = st->st_uid;
	e->gid = st->st_gid;
	e->mtime = st->st_mtim.tv_sec;
	e->major = S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode) ? major(st->st_rdev) : 0;
	e->minor = S_ISCHR(st->st_mode) || S_ISBLK(st->st_mode) ? minor(st->st_rdev) : 0;
	e->size = 0;
	e->link[0] = 0;
	if (!e->type)
		return;
	if (e->type == '2') {
		ssize_t n = readlinkat(p->dir, last, e->link, sizeof e->link - 1);
		if (n < 0) {
			missed(p, e->name);
			return;
		}
		e->link[n] = 0;
	}
	if (st->st_nlink > 1 && e->type != '5' && is_known(p, st, e)) {
		e->type = '1';
	} else if (e->type == '0') {
		fd = openat(p->dir, last, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
		if (fd < 0) {
			if (errno != ENOENT)
				missed(p, e->name);
			return;
		}
		e->size = st->st_size;
	}
	put_header(p);
	if (fd >= 0) {
		put_contents(p, fd, e->size);
		close(fd);
	}
}

/* --- the way through a tree --- */

static int by_name(const void *a, const void *b)
{
	return strcmp(*(char *const *)a, *(char *const *)b);
}

static bool read_names(struct level *l, int dir)
{
	struct dirent *entry;
	int copy = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *d = copy < 0 ? NULL : fdopendir(copy);
	size_t room = 0;
	if (!d)
		return false;
	while ((entry = readdir(d))) {
		const char *name = entry->d_name;
		if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
			continue;
		if (l->count == room) {
			char **more = realloc(l->names, (room = room ? 2 * room : 64) * sizeof *more);
			if (!more)
				break;
			l->names = more;
		}
		if (!(l->names[l->count] = strdup(name)))
			break;
		l->count++;
	}
	closedir(d);
	/* So that the same tree always makes the same archive. */
	if (l->count > 1)
		qsort(l->names, l->count, sizeof *l->names, by_name);
	return !entry;
}

/* fd, which is in p->entry.name, becomes the directory to go through. */
static bool descend(struct packer *p, int fd, const struct stat *st)
{
	struct level *l = calloc(1, sizeof *l);
	if (!l || !read_names(l, fd)) {
		missed(p, p->entry.name);
		for (size_t i = 0; l && i < l->count; i++)
			free(l->names[i]);
		free(l ? l->names : NULL);
		free(l);
		close(fd);
		return false;
	}
	l->up = p->level;
	l->dev = st->st_dev;
	l->ino = st->st_ino;
	l->name_length = strlen(p->entry.name);
	p->level = l;
	if (p->dir >= 0)
		close(p->dir);
	p->dir = fd;
	return true;
}

static void ascend(struct packer *p)
{
	struct level *l = p->level;
	struct stat st;
	p->level = l->up;
	free(l->names);
	free(l);
	int up = p->level ? openat(p->dir, "..", O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
	close(p->dir);
	p->dir = up;
	if (p->level && (up < 0 || fstat(up, &st) < 0 || st.st_dev != p->level->dev || st.st_ino != p->level->ino)) {
		/* Somebody moved it: there is no way to go on. */
		errno = EAGAIN;
		missed(p, p->entry.name);
		p->broken = true;
	}
}

static void visit(struct packer *p, char *last)
{
	struct stat st;
	struct tar_entry *e = &p->entry;
	size_t n = p->level->name_length;
	if (n + strlen(last) + 2 > TAR_NAME_MAX) {
		errno = ENAMETOOLONG;
		missed(p, last);
		return;
	}
	strcpy(e->name + n, last);
	if (fstatat(p->dir, last, &st, AT_SYMLINK_NOFOLLOW) < 0) {
		if (errno != ENOENT)
			missed(p, e->name);
		return;
	}
	if (S_ISDIR(st.st_mode))
		strcat(e->name, "/");
	put_entry(p, last, &st);
	if (S_ISDIR(st.st_mode) && st.st_dev == p->device) {
		int fd = openat(p->dir, last, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
		if (fd >= 0)
			descend(p, fd, &st);
		else if (errno != ENOENT)
			missed(p, e->name);
	}
}

static void go_through(struct packer *p)
{
	while (p->level && !p->broken) {
		struct level *l = p->level;
		if (l->at == l->count) {
			ascend(p);
			continue;
		}
		char *last = l->names[l->at++];
		visit(p, last);
		free(last);
	}
}

static bool start(struct packer *p, const char *path)
{
	struct stat st;
	char whole[PATH_MAX];
	if (stat(path, &st) < 0 || !realpath(path, whole)) {
		missed(p, path);
		return false;
	}
	if (S_ISDIR(st.st_mode)) {
		int fd = open(whole, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
		if (fd < 0) {
			missed(p, path);
			return false;
		}
		strcpy(p->entry.name, "./");
		p->device = st.st_dev;
		put_entry(p, ".", &st);
		return descend(p, fd, &st);
	}
	const char *slash = strrchr(path, '/');
	strcpy(p->entry.name, slash ? slash + 1 : path);
	char *last = strrchr(whole, '/');
	*last = 0;
	p->dir = open(last == whole ? "/" : whole, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	put_entry(p, last + 1, &st);
	return true;
}

int tar_pack(int out, const char *path)
{
	struct packer *p = calloc(1, sizeof *p);
	if (!p)
		return -1;
	p->out = out;
	p->dir = -1;
	if (strlen(path) < PATH_MAX && start(p, path)) {
		go_through(p);
		put_zeros(p, END_BLOCKS * TAR_BLOCK);
		flush(p);
	}
	if (p->dir >= 0)
		close(p->dir);
	int result = p->broken ? -1 : p->failures;
	for (size_t i = 0; i < BUCKETS; i++)
		for (struct linked *l = p->linked[i], *next; l; l = next) {
			next = l->next;
			free(l);
		}
	free(p);
	return result;
}

int builtin_pack(char **argv)
{
	return tar_pack(1, argv[1]) != 0;
}
