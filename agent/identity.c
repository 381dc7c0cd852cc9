#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "boot.h"
#include "hosts.h"
#include "identity.h"
#include "port.h"

/* From <linux/random.h>, which musl does not come with. */
struct pool {
	int bits, size;
	uint8_t bytes[ENTROPY_MAX];
};
#define RNDADDENTROPY _IOW('R', 3, int[2])
#define RNDRESEEDCRNG _IO('R', 7)

#ifndef GRND_INSECURE
#define GRND_INSECURE 4 /* Linux 5.6: never waits */
#endif

enum { PATH_SIZE = 256, LABEL_MAX = 63, NS_PER_S = 1000000000 };

int random_fd = -1;

/* A file on /run that is kept open: to change it costs one write, and no disk has any work. */
struct kept {
	int fd;
	dev_t dev;
	ino_t ino;
	char path[PATH_SIZE];
};

static bool ours; /* the system is: the clock, the names and the files may be changed */
static struct kept generation = {.fd = -1}, machine_id = {.fd = -1};
static char directory[PATH_SIZE], hosts[PATH_SIZE], machine_id_seen[PATH_SIZE], hooks[PATH_SIZE];

/* --- files --- */

static int keep(struct kept *k)
{
	struct stat st;
	boot_directory(directory, 0755);
	k->fd = open(k->path, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0444);
	if (k->fd < 0)
		return -1;
	if (fstat(k->fd, &st) < 0) {
		close(k->fd);
		k->fd = -1;
		return -1;
	}
	k->dev = st.st_dev;
	k->ino = st.st_ino;
	return 0;
}

static bool seen_at(const struct kept *k, const char *path)
{
	struct stat st;
	return k->fd >= 0 && stat(path, &st) == 0 && st.st_ino == k->ino && st.st_dev == k->dev;
}

/* text and a newline, always as long as what was there: who has the file mapped sees it, and who watches it gets one event. */
static int put(struct kept *k, const char *text)
{
	char line[64];
	int n = snprintf(line, sizeof line, "%s\n", text);
	/* An init may have put another /run over ours, or somebody removed the file. */
	if (!seen_at(k, k->path)) {
		if (k->fd >= 0)
			close(k->fd);
		if (keep(k) < 0)
			return -1;
	}
	return pwrite(k->fd, line, (size_t)n, 0) == n ? 0 : -1;
}

/* Over the image's own file, so that a new id needs no write to the disk. */
static int put_machine_id(const char *text)
{
	if (put(&machine_id, text) < 0)
		return -1;
	/* systemd takes the mount away once it has written the id to the disk. */
	if (seen_at(&machine_id, machine_id_seen))
		return 0;
	int fd = open(machine_id_seen, O_RDONLY | O_CREAT | O_CLOEXEC, 0444);
	if (fd < 0)
		return -1;
	close(fd);
	return mount(machine_id.path, machine_id_seen, NULL, MS_BIND, NULL);
}

static void random_uuid(char text[GENERATION_SIZE + 1])
{
	uint8_t b[16] = {0};
	(void)!getrandom(b, sizeof b, GRND_INSECURE);
	b[6] = (uint8_t)((b[6] & 0x0f) | 0x40);
	b[8] = (uint8_t)((b[8] & 0x3f) | 0x80);
	char *p = text;
	for (size_t i = 0; i < sizeof b; i++)
		p += sprintf(p, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", b[i]);
}

static bool is_hex(const char *s, size_t n)
{
	return strspn(s, "0123456789abcdef") >= n;
}

static bool is_machine_id(const char *s)
{
	return strlen(s) == MACHINE_ID_SIZE && is_hex(s, MACHINE_ID_SIZE);
}

static void name_paths(const char *root)
{
	snprintf(directory, sizeof directory, "%s/run/ramet", root);
	snprintf(generation.path, sizeof generation.path, "%s/run/ramet/generation", root);
	snprintf(machine_id.path, sizeof machine_id.path, "%s/run/ramet/machine-id", root);
	snprintf(machine_id_seen, sizeof machine_id_seen, "%s/etc/machine-id", root);
	snprintf(hosts, sizeof hosts, "%s/etc/hosts", root);
	snprintf(hooks, sizeof hooks, "%s/etc/ramet/fork.d", root);
}

void identity_begin(const char *root, const char *id)
{
	char uuid[GENERATION_SIZE + 1];
	name_paths(root);
	ours = true;
	random_uuid(uuid);
	if (put(&generation, uuid) < 0)
		boot_say("%s: %s", generation.path, strerror(errno));
	if (id && !is_machine_id(id))
		boot_say("ramet.machine_id is not 32 hexadecimal digits");
	else if (id && put_machine_id(id) < 0)
		boot_say("%s: %s", machine_id_seen, strerror(errno));
}

/* --- what the host says --- */

static bool is_uuid(const char *s)
{
	static const uint8_t groups[] = {8, 4, 4, 4, 12};
	for (size_t i = 0; i < sizeof groups; i++) {
		if (!is_hex(s, groups[i]) || s[groups[i]] != (i < sizeof groups - 1 ? '-' : 0))
			return false;
		s += groups[i] + 1;
	}
	return true;
}

static bool is_hostname(const char *s)
{
	static const char letters[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-";
	if (strlen(s) > HOSTNAME_MAX)
		return false;
	for (;; s++) {
		size_t n = strspn(s, letters);
		if (n == 0 || n > LABEL_MAX || s[0] == '-' || s[n - 1] == '-' || (s[n] && s[n] != '.'))
			return false;
		s += n;
		if (!*s)
			return true;
	}
}

static int take_entropy(const struct request *r)
{
	static struct pool pool;
	pool.bits = (int)r->entropy_size * 8;
	pool.size = (int)r->entropy_size;
	memcpy(pool.bytes, r->entropy, r->entropy_size);
	return ioctl(random_fd, RNDADDENTROPY, &pool) < 0 ? -1 : ioctl(random_fd, RNDRESEEDCRNG);
}

static int take_time(const struct request *r)
{
	struct timespec t = {(time_t)(r->time_ns / NS_PER_S), (long)(r->time_ns % NS_PER_S)};
	return clock_settime(CLOCK_REALTIME, &t);
}

static int take_hostname(const struct request *r)
{
	if (sethostname(r->hostname, strlen(r->hostname)) < 0)
		return -1;
	return hosts_rename(hosts, r->hostname);
}

static int take_machine_id(const struct request *r)
{
	return put_machine_id(r->machine_id);
}

static int take_generation(const struct request *r)
{
	return put(&generation, r->generation);
}

/* Entropy first: until then whatever runs may draw the numbers that the other copies of this machine draw too. */
static const struct step {
	enum tag tag;
	int (*take)(const struct request *r);
	const char *what;
} steps[] = {
	{TAG_ENTROPY, take_entropy, "reseed the random number generator"},
	{TAG_TIME, take_time, "set the clock"},
	{TAG_HOSTNAME, take_hostname, "set the hostname"},
	{TAG_MACHINE_ID, take_machine_id, "set the machine id"},
	{TAG_GENERATION, take_generation, "write the generation"},
};

static const char *wrong(const struct request *r)
{
	if (r->hostname && !is_hostname(r->hostname))
		return "not a hostname";
	if (r->machine_id && !is_machine_id(r->machine_id))
		return "not a machine id: 32 hexadecimal digits, in lower case";
	if (r->generation && !is_uuid(r->generation))
		return "not a generation: a UUID as text, in lower case";
	return NULL;
}

/* How many entries /etc/ramet/fork.d has, where all above 1 are 1; -1 with errno. */
static int count_hooks(void)
{
	static uint8_t entries[1024] __attribute__((aligned(8)));
	int fd = open(hooks, O_RDONLY | O_DIRECTORY | O_CLOEXEC), found = 0;
	if (fd < 0)
		return errno == ENOENT || errno == ENOTDIR ? 0 : -1;
	long n = 0;
	while (!found && (n = syscall(SYS_getdents64, fd, entries, sizeof entries)) > 0) {
		for (long at = 0; at < n && !found;) {
			const struct dirent *e = (const struct dirent *)(entries + at);
			found = strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
			at += e->d_reclen;
		}
	}
	int error = errno;
	close(fd);
	errno = error;
	return n < 0 ? -1 : found;
}

static void refuse(uint32_t stream, const char *what)
{
	char message[128];
	int error = errno;
	snprintf(message, sizeof message, "cannot %s: %s", what, strerror(error));
	port_end(stream, END_FAILED, error, message);
}

void identity_take(uint32_t stream, const struct request *r)
{
	const char *message = wrong(r);
	if (message || !ours) {
		port_end(stream, END_FAILED, message ? EINVAL : EPERM, message ? message : "this system is not the agent's own");
		return;
	}
	for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
		if (given(r, steps[i].tag) && steps[i].take(r) < 0) {
			refuse(stream, steps[i].what);
			return;
		}
	}
	int found = count_hooks();
	if (found < 0)
		refuse(stream, "read /etc/ramet/fork.d");
	else
		port_end(stream, END_EXITED, found, NULL);
}
