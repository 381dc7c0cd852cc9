#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include "builtin.h"
#include "reclaim.h"

/* struct fstrim_range and its ioctl, as Linux has always had them: musl has no header for them. */
struct trim_range { uint64_t start, length, least; };
#define FITRIM_IOCTL _IOWR('X', 121, struct trim_range)

enum { PAGE = 4096, TEXT_MAX = 32 * 1024, VALUE_MAX = 24, DEVICES_MAX = 64, NAP_NS = 10 * 1000 * 1000, NAPS = 1000 };

static const char parameters[] = "module/damon_reclaim/parameters";
/* The root group's: an image's own init, and container engines, make groups beside /workload. */
static const char memory_reclaim[] = "fs/cgroup/memory.reclaim";

int reclaim_proc = -1, reclaim_sys = -1;

void reclaim_begin(int proc_fd, int sys_fd)
{
	reclaim_proc = proc_fd;
	reclaim_sys = sys_fd;
}

void reclaim_close_others(void)
{
	unsigned first = 3, low = (unsigned)reclaim_proc, high = (unsigned)reclaim_sys;
	if (reclaim_proc >= 0 && reclaim_sys >= 0) {
		if (low > high) {
			low = (unsigned)reclaim_sys;
			high = (unsigned)reclaim_proc;
		}
		/* An empty range is refused, which is as good. */
		syscall(SYS_close_range, first, low - 1, 0);
		syscall(SYS_close_range, low + 1, high - 1, 0);
		first = high + 1;
	}
	syscall(SYS_close_range, first, ~0u, 0);
}

static bool not_ours(void)
{
	if (reclaim_proc >= 0 && reclaim_sys >= 0)
		return false;
	builtin_fail_with(EPERM, "this system is not the agent's own", "/sys");
	return true;
}

/* The text of a file; NULL when there is none. */
static const char *contents(int directory, const char *path)
{
	static char text[TEXT_MAX];
	size_t length = 0;
	ssize_t n = 0;
	int fd = openat(directory, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return NULL;
	while (length < sizeof text - 1 && (n = read(fd, text + length, sizeof text - 1 - length)) > 0)
		length += (size_t)n;
	close(fd);
	text[length] = 0;
	return n < 0 ? NULL : text;
}

static int put(int directory, const char *path, const char *value)
{
	int fd = openat(directory, path, O_WRONLY | O_TRUNC | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t n = write(fd, value, strlen(value));
	int error = errno;
	close(fd);
	errno = error;
	return n < 0 ? -1 : 0;
}

/* What follows `name` and blanks at the start of a line; 0 when no line has it. */
static unsigned long long field(const char *text, const char *name)
{
	size_t n = strlen(name);
	for (const char *p = text; p && *p; p = (p = strchr(p, '\n')) ? p + 1 : NULL)
		if (strncmp(p, name, n) == 0 && (p[n] == ' ' || p[n] == ':'))
			return strtoull(p + n + 1, NULL, 10);
	return 0;
}

/* --- reclaim BYTES --- */

/* Of files and of swap, by whomever; what DAMON takes is not counted. */
static unsigned long long stolen(void)
{
	const char *text = contents(reclaim_proc, "vmstat");
	return (field(text, "pgsteal_file") + field(text, "pgsteal_anon")) * PAGE;
}

int builtin_reclaim(char **argv)
{
	long long bytes;
	if (not_ours())
		return 1;
	if (!builtin_number(argv[1], 10, &bytes) || bytes <= 0)
		return builtin_fail_with(EINVAL, "not a number of bytes", argv[1]);
	unsigned long long before = stolen();
	/* EAGAIN: it got less than that. */
	if (put(reclaim_sys, memory_reclaim, argv[1]) < 0 && errno != EAGAIN)
		return builtin_fail(memory_reclaim);
	printf("reclaimed %llu\n", stolen() - before);
	return fflush(stdout) ? builtin_fail("stdout") : 0;
}

/* --- tune NAME=VALUE … --- */

struct setting {
	char name[NAME_MAX], value[VALUE_MAX];
};

static bool parse_setting(const char *text, struct setting *s)
{
	const char *equals = strchr(text, '=');
	size_t n = equals ? (size_t)(equals - text) : 0;
	if (n == 0 || n >= sizeof s->name || strspn(text, "abcdefghijklmnopqrstuvwxyz_") != n)
		return false;
	size_t digits = strspn(equals + 1, "0123456789");
	if (digits == 0 || digits >= sizeof s->value || equals[1 + digits])
		return false;
	memcpy(s->name, text, n);
	s->name[n] = 0;
	memcpy(s->value, equals + 1, digits + 1);
	return true;
}

static const char *parameter(const char *name)
{
	static char path[sizeof parameters + NAME_MAX];
	snprintf(path, sizeof path, "%s/%s", parameters, name);
	return path;
}

static bool has(const struct setting *s)
{
	const char *text = contents(reclaim_sys, parameter(s->name));
	return text && strtoull(text, NULL, 10) == strtoull(s->value, NULL, 10);
}

static bool running(void)
{
	const char *text = contents(reclaim_sys, parameter("enabled"));
	return text && *text == 'Y';
}

/* The kernel starts and stops its thread in its own time, and tells nobody. */
static bool turn(bool on)
{
	struct timespec nap = {0, NAP_NS};
	if (put(reclaim_sys, parameter("enabled"), on ? "Y" : "N") < 0)
		return false;
	for (int i = 0; i < NAPS; i++) {
		if (running() == on)
			return true;
		nanosleep(&nap, NULL);
	}
	errno = on ? EINVAL : EBUSY;
	return false;
}

/* From the first to the last RAM: by itself DAMON looks at the largest part only, and a machine of more than 2 GiB has two. */
static int all_ram(struct setting region[2])
{
	unsigned long long start, end, first = ULLONG_MAX, last = 0;
	const char *text = contents(reclaim_proc, "iomem");
	for (const char *p = text; p && *p; p = (p = strchr(p, '\n')) ? p + 1 : NULL) {
		char what[16] = "";
		if (*p == ' ' || sscanf(p, "%llx-%llx : %15[^\n]", &start, &end, what) != 3 || strcmp(what, "System RAM") != 0)
			continue;
		first = start < first ? start : first;
		last = end > last ? end : last;
	}
	if (last <= first)
		return 0;
	strcpy(region[0].name, "monitor_region_start");
	strcpy(region[1].name, "monitor_region_end");
	snprintf(region[0].value, VALUE_MAX, "%llu", first);
	snprintf(region[1].value, VALUE_MAX, "%llu", last + 1);
	return 2;
}

static int apply(const struct setting *wanted, int count)
{
	bool same = running();
	for (int i = 0; i < count && same; i++)
		same = has(&wanted[i]);
	if (same)
		return 0;
	if (running() && !turn(false))
		return builtin_fail(parameter("enabled"));
	for (int i = 0; i < count; i++)
		if (put(reclaim_sys, parameter(wanted[i].name), wanted[i].value) < 0)
			return builtin_fail(parameter(wanted[i].name));
	return turn(true) ? 0 : builtin_fail(parameter("enabled"));
}

int builtin_tune(char **argv)
{
	struct setting wanted[BUILTIN_ARGUMENTS + 2];
	bool on = false, there;
	int count = 0, result = 0;
	if (not_ours())
		return 1;
	for (char **p = argv + 1; *p && **p; p++) {
		if (!parse_setting(*p, &wanted[count]))
			return builtin_fail_with(EINVAL, "not NAME=NUMBER", *p);
		if (strcmp(wanted[count].name, "enabled") == 0)
			on = strtoull(wanted[count].value, NULL, 10) != 0;
		else
			count++;
	}
	there = contents(reclaim_sys, parameter("enabled")) != NULL;
	if (there && on)
		result = apply(wanted, count + all_ram(wanted + count));
	else if (there && running() && !turn(false))
		result = builtin_fail(parameter("enabled"));
	if (result == 0)
		printf("tuned %d\n", there);
	return fflush(stdout) ? builtin_fail("stdout") : result;
}

/* --- slim --- */

/* A path of /proc/mounts: blanks and backslashes are there as three octal digits. */
static void unescape(char *s)
{
	char *to = s;
	for (; *s; s++) {
		if (s[0] == '\\' && strspn(s + 1, "01234567") >= 3) {
			*to++ = (char)((s[1] - '0') << 6 | (s[2] - '0') << 3 | (s[3] - '0'));
			s += 3;
		} else {
			*to++ = *s;
		}
	}
	*to = 0;
}

static uint64_t trim(const char *path, dev_t seen[], int *known)
{
	struct trim_range range = {0, UINT64_MAX, 0};
	struct stat st;
	int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
	bool again = fd < 0 || fstat(fd, &st) < 0 || *known == DEVICES_MAX;
	for (int i = 0; i < *known && !again; i++)
		again = seen[i] == st.st_dev;
	if (!again)
		seen[(*known)++] = st.st_dev;
	/* One that is read-only, or on a device without discard, has nothing to give. */
	if (again || ioctl(fd, FITRIM_IOCTL, &range) < 0)
		range.length = 0;
	if (fd >= 0)
		close(fd);
	return range.length;
}

static uint64_t trim_all(void)
{
	dev_t seen[DEVICES_MAX];
	int known = 0;
	uint64_t trimmed = 0;
	char *line, *save, *text = (char *)contents(reclaim_proc, "self/mounts");
	for (line = text ? strtok_r(text, "\n", &save) : NULL; line; line = strtok_r(NULL, "\n", &save)) {
		char path[PATH_MAX], type[32];
		if (sscanf(line, "/dev/%*s %4095s %31s", path, type) != 2 || strncmp(type, "fuse", 4) == 0)
			continue;
		unescape(path);
		trimmed += trim(path, seen, &known);
	}
	return trimmed;
}

int builtin_slim(char **argv)
{
	(void)argv;
	if (not_ours())
		return 1;
	unsigned long long before = field(contents(reclaim_proc, "meminfo"), "MemFree");
	sync();
	/* Before the caches, for it reads the maps of free blocks. */
	uint64_t trimmed = trim_all();
	if (put(reclaim_proc, "sys/vm/drop_caches", "3") < 0)
		return builtin_fail("/proc/sys/vm/drop_caches");
	/* A kernel may be built without. */
	if (put(reclaim_proc, "sys/vm/compact_memory", "1") < 0 && errno != ENOENT)
		return builtin_fail("/proc/sys/vm/compact_memory");
	unsigned long long after = field(contents(reclaim_proc, "meminfo"), "MemFree");
	printf("trimmed %llu\nfreed %llu\n", (unsigned long long)trimmed, after > before ? (after - before) * 1024 : 0);
	return fflush(stdout) ? builtin_fail("stdout") : 0;
}
