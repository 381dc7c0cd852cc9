#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include "user.h"

enum { LINE_SIZE = 16 * 1024, CACHED = 4, FIELDS = 7, SPEC_MAX = 2 * USER_TEXT_MAX };

/* A file by lines. What does not fit a line's buffer is left out of it. */
struct lines {
	int fd;
	size_t start, end;
	char buf[LINE_SIZE];
};

static bool lines_open(struct lines *l, const char *path)
{
	struct stat st;
	l->start = l->end = 0;
	/* Whoever put a fifo there must not stop the agent. */
	l->fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	if (l->fd >= 0 && (fstat(l->fd, &st) < 0 || !S_ISREG(st.st_mode))) {
		close(l->fd);
		l->fd = -1;
	}
	return l->fd >= 0;
}

static char *lines_next(struct lines *l)
{
	char *newline;
	while (!(newline = memchr(l->buf + l->start, '\n', l->end - l->start))) {
		memmove(l->buf, l->buf + l->start, l->end - l->start);
		l->end -= l->start;
		l->start = 0;
		bool overlong = l->end == LINE_SIZE - 1;
		char rest[512];
		ssize_t n = overlong ? read(l->fd, rest, sizeof rest) : read(l->fd, l->buf + l->end, LINE_SIZE - 1 - l->end);
		if (n <= 0) {
			if (l->end == 0)
				return NULL;
			newline = l->buf + l->end++;
			break;
		}
		char *cut = overlong ? memchr(rest, '\n', (size_t)n) : NULL;
		if (cut) {
			/* Some of the next line was read with the overlong one's end: step back. */
			lseek(l->fd, cut + 1 - (rest + n), SEEK_CUR);
			newline = l->buf + l->end++;
			break;
		}
		if (!overlong)
			l->end += (size_t)n;
	}
	char *line = l->buf + l->start;
	*newline = 0;
	l->start = (size_t)(newline + 1 - l->buf);
	return line;
}

static int split(char *line, char **field)
{
	int n = 0;
	while (n < FIELDS) {
		field[n++] = line;
		line = strchr(line, ':');
		if (!line)
			break;
		*line++ = 0;
	}
	return n;
}

static bool number(const char *s, unsigned *value)
{
	char *end;
	unsigned long v = strtoul(s, &end, 10);
	if (*s < '0' || *s > '9' || *end || v >= UINT32_MAX) /* -1 means "unchanged" to the system calls */
		return false;
	*value = (unsigned)v;
	return true;
}

static struct lines lines;

/* Fills u from the line of that name, or (with by_uid) the first line of that uid. */
static bool passwd_find(struct user *u, const char *name, bool by_uid, unsigned uid)
{
	bool found = false;
	if (!lines_open(&lines, "/etc/passwd"))
		return false;
	for (char *line; !found && (line = lines_next(&lines));) {
		char *f[FIELDS];
		unsigned line_uid, line_gid;
		if (split(line, f) < FIELDS || !number(f[2], &line_uid) || !number(f[3], &line_gid))
			continue;
		if (by_uid ? line_uid != uid : strcmp(f[0], name) != 0)
			continue;
		u->uid = line_uid;
		u->gid = line_gid;
		snprintf(u->name, sizeof u->name, "%s", f[0]);
		snprintf(u->home, sizeof u->home, "%s", f[5]);
		snprintf(u->shell, sizeof u->shell, "%s", f[6]);
		found = true;
	}
	close(lines.fd);
	return found;
}

static bool is_member(const char *members, const char *name)
{
	size_t length = strlen(name);
	for (const char *p = members; *p; p += *p == ',') {
		size_t n = strcspn(p, ",");
		if (n == length && memcmp(p, name, n) == 0)
			return true;
		p += n;
	}
	return false;
}

/* The gid of the group `name` into *gid, and the groups that u->name is a member of (where wanted) into u. */
static bool group_find(struct user *u, const char *name, gid_t *gid)
{
	bool found = false;
	if (!lines_open(&lines, "/etc/group"))
		return false;
	for (char *line; (line = lines_next(&lines));) {
		char *f[FIELDS];
		unsigned line_gid;
		if (split(line, f) < 4 || !number(f[2], &line_gid))
			continue;
		if (name && !found && strcmp(f[0], name) == 0) {
			*gid = line_gid;
			found = true;
		} else if (!name && line_gid != u->gid && u->groups_count < GROUPS_MAX && is_member(f[3], u->name)) {
			u->groups[u->groups_count++] = line_gid;
		}
	}
	close(lines.fd);
	return found;
}

static bool resolve(struct user *u, const char *spec, char *message, size_t size)
{
	char name[SPEC_MAX];
	unsigned id;
	snprintf(name, sizeof name, "%s", spec);
	char *group = strchr(name, ':');
	if (group)
		*group++ = 0;
	*u = (struct user){.home = "/"};
	if (passwd_find(u, name, false, 0)) {
		;
	} else if (number(name, &id)) {
		/* As in containers, a number that nobody has is a user in group 0. */
		if (!passwd_find(u, name, true, id))
			u->uid = id;
	} else if (strcmp(name, "root") != 0) {
		snprintf(message, size, "no such user: %s", name);
		return false;
	}
	if (u->uid == 0 && !u->name[0]) {
		strcpy(u->name, "root");
		strcpy(u->home, "/root");
	}
	if (!group) {
		if (u->name[0])
			group_find(u, NULL, NULL);
	} else if (!group_find(u, group, &u->gid)) {
		if (!number(group, &id)) {
			snprintf(message, size, "no such group: %s", group);
			return false;
		}
		u->gid = id;
	}
	return true;
}

/* What tells one state of a file from another, for two files. */
struct version {
	struct { ino_t ino; off_t size; struct timespec changed; } file[2];
};

static void version_now(struct version *v)
{
	static const char *const path[2] = {"/etc/passwd", "/etc/group"};
	memset(v, 0, sizeof *v);
	for (int i = 0; i < 2; i++) {
		struct stat st;
		if (stat(path[i], &st) == 0) {
			v->file[i].ino = st.st_ino;
			v->file[i].size = st.st_size;
			v->file[i].changed = st.st_ctim;
		}
	}
}

const struct user *user_find(const char *spec, char *message, size_t size)
{
	static struct cached { bool valid; char spec[SPEC_MAX]; struct version version; struct user user; } cache[CACHED];
	static unsigned next;
	struct version now;
	if (!spec || !*spec)
		spec = "root";
	if (strlen(spec) >= SPEC_MAX) {
		snprintf(message, size, "no such user: the name is too long");
		return NULL;
	}
	version_now(&now);
	for (struct cached *c = cache; c < cache + CACHED; c++)
		if (c->valid && strcmp(c->spec, spec) == 0 && memcmp(&c->version, &now, sizeof now) == 0)
			return &c->user;
	struct cached *c = &cache[next++ % CACHED];
	c->valid = false;
	if (!resolve(&c->user, spec, message, size))
		return NULL;
	strcpy(c->spec, spec);
	c->version = now;
	c->valid = true;
	return &c->user;
}
