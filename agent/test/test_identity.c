/* What IDENTIFY does, in which order, to a system that is a directory; and the hooks. The calls that would change the system that runs the test end here. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>
#include "../boot.h"
#include "../hooks.h"
#include "../hosts.h"
#include "../identity.h"
#include "../port.h"
#include "check.h"

/* --- in place of the system and the port --- */

static char done[256]; /* a letter for each call, as they came */
static char failing;   /* the letter of the call that is to fail with EIO */
static char hostname[80], mounted[600];
static struct timespec clock_set;
static uint8_t fed[ENTROPY_MAX];
static int fed_bits, fed_size;
static struct { enum end_kind kind; int code; char message[MESSAGE_MAX]; } end;

int __wrap_clock_settime(clockid_t clock, const struct timespec *t);
int __wrap_ioctl(int fd, unsigned long what, ...);
int __wrap_sethostname(const char *name, size_t n);
int __wrap_mount(const char *from, const char *to, const char *type, unsigned long flags, const void *data);

static int note(char what)
{
	size_t n = strlen(done);
	done[n] = what;
	done[n + 1] = 0;
	errno = EIO;
	return what == failing ? -1 : 0;
}

int __wrap_clock_settime(clockid_t clock, const struct timespec *t)
{
	CHECK(clock == CLOCK_REALTIME);
	clock_set = *t;
	return note('t');
}

int __wrap_ioctl(int fd, unsigned long what, ...)
{
	va_list args;
	CHECK(fd == random_fd);
	if ((what & 0xffff) == ('R' << 8 | 7))
		return note('r');
	CHECK(what == (1ul << 30 | 8ul << 16 | 'R' << 8 | 3)); /* RNDADDENTROPY, as the kernel has it */
	va_start(args, what);
	const int *pool = va_arg(args, const int *);
	va_end(args);
	fed_bits = pool[0];
	fed_size = pool[1];
	memcpy(fed, pool + 2, (size_t)fed_size);
	return note('e');
}

int __wrap_sethostname(const char *name, size_t n)
{
	snprintf(hostname, sizeof hostname, "%.*s", (int)n, name);
	return note('h');
}

int __wrap_mount(const char *from, const char *to, const char *type, unsigned long flags, const void *data)
{
	CHECK(!type && flags == 4096 && !data); /* MS_BIND */
	snprintf(mounted, sizeof mounted, "%s on %s", from, to);
	return note('m');
}

bool port_end(uint32_t stream, enum end_kind kind, int code, const char *message)
{
	CHECK(stream == 7);
	end.kind = kind;
	end.code = code;
	snprintf(end.message, sizeof end.message, "%s", message ? message : "");
	return true;
}

static int said;

void boot_say(const char *format, ...)
{
	(void)format;
	said++;
}

void boot_directory(const char *path, unsigned mode)
{
	mkdir(path, mode);
}

/* --- the directory --- */

static char root[64] = "/tmp/ramet-identity-XXXXXX";

static const char *at(const char *path)
{
	static char full[200];
	snprintf(full, sizeof full, "%s%s", root, path);
	return full;
}

static const char *text_of(const char *path)
{
	static char text[4096];
	int fd = open(at(path), O_RDONLY);
	ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	return text;
}

static void write_text(const char *path, const char *text, mode_t mode)
{
	int fd = open(at(path), O_WRONLY | O_CREAT | O_TRUNC, 0644);
	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text) && fchmod(fd, mode) == 0);
	close(fd);
}

static void identify(struct request r, uint32_t tags)
{
	r.given = tags;
	done[0] = 0;
	memset(&end, 0, sizeof end);
	end.code = -1;
	identity_take(7, &r);
}

static const char uuid[] = "01234567-89ab-4def-8123-456789abcdef", id[] = "0123456789abcdef0123456789abcdef";

static struct request whole(void)
{
	static const uint8_t entropy[] = {1, 0, 2, 0, 3};
	return (struct request){.hostname = "fork-1", .machine_id = id, .generation = uuid, .entropy = entropy, .entropy_size = 5,
				.time_ns = 1700000000123456789};
}

enum { EVERYTHING = 1 << TAG_TIME | 1 << TAG_ENTROPY | 1 << TAG_HOSTNAME | 1 << TAG_MACHINE_ID | 1 << TAG_GENERATION };

static void test_not_ours(void)
{
	identify(whole(), EVERYTHING);
	CHECK(end.kind == END_FAILED && end.code == EPERM && !done[0]);
}

static void test_begin(void)
{
	struct stat st;
	char first[64];
	identity_begin(root, NULL);
	CHECK(said == 0 && !done[0]);
	snprintf(first, sizeof first, "%s", text_of("/run/ramet/generation"));
	CHECK(strlen(first) == GENERATION_SIZE + 1 && first[14] == '4' && first[GENERATION_SIZE] == '\n');
	CHECK(stat(at("/run/ramet"), &st) == 0 && (st.st_mode & 07777) == 0755);
	CHECK(stat(at("/run/ramet/machine-id"), &st) < 0);
	identity_begin(root, id);
	CHECK(strcmp(first, text_of("/run/ramet/generation")) != 0);
	CHECK(strcmp(text_of("/run/ramet/machine-id"), "0123456789abcdef0123456789abcdef\n") == 0);
	CHECK(strcmp(done, "m") == 0 && strstr(mounted, "/run/ramet/machine-id on ") && strstr(mounted, "/etc/machine-id"));
	CHECK(stat(at("/etc/machine-id"), &st) == 0 && st.st_size == 0);
	identity_begin(root, "0123");
	CHECK(said == 1);
}

static void test_order(void)
{
	identify(whole(), EVERYTHING);
	CHECK(end.kind == END_EXITED && end.code == 0);
	CHECK(strcmp(done, "erthm") == 0);
	CHECK(fed_bits == 40 && fed_size == 5 && memcmp(fed, "\1\0\2\0\3", 5) == 0);
	CHECK(clock_set.tv_sec == 1700000000 && clock_set.tv_nsec == 123456789);
	CHECK(strcmp(hostname, "fork-1") == 0);
	CHECK(strcmp(text_of("/run/ramet/generation"), "01234567-89ab-4def-8123-456789abcdef\n") == 0);
	identify(whole(), 1 << TAG_TIME);
	CHECK(end.kind == END_EXITED && strcmp(done, "t") == 0);
	identify(whole(), 0);
	CHECK(end.kind == END_EXITED && !done[0]);
}

static void test_failures(void)
{
	static const char calls[] = "erthm";
	for (int i = 0; calls[i]; i++) {
		char expected[8];
		snprintf(expected, sizeof expected, "%.*s", i + 1, calls);
		failing = calls[i];
		identify(whole(), EVERYTHING);
		CHECK(end.kind == END_FAILED && end.code == EIO && strncmp(end.message, "cannot ", 7) == 0);
		CHECK(strcmp(done, expected) == 0); /* and nothing after it */
	}
	failing = 0;
}

static void test_nonsense(void)
{
	static const char *const names[] = {"", "-a", "a-", "a..b", ".a", "a.", "a b", "a_b", "a\n", "\xc3\xa4",
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", /* a label of 64 */
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"}; /* 65 in all */
	static const char *const good[] = {"a", "1", "a-b.c9", "A.b",
		"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa.aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"};
	static const char *const ids[] = {"", "0123456789abcdef0123456789abcde", "0123456789abcdef0123456789abcdef0", "0123456789ABCDEF0123456789abcdef"};
	static const char *const uuids[] = {"", "01234567-89ab-4def-8123-456789abcde", "01234567-89ab-4def-8123-456789abcdef0", "01234567089ab-4def-8123-456789abcdef",
		"01234567-89AB-4def-8123-456789abcdef", "01234567-89ab-4def-8123-456789abcde\n"};
	struct request r;
	for (size_t i = 0; i < sizeof names / sizeof *names + sizeof ids / sizeof *ids + sizeof uuids / sizeof *uuids; i++) {
		size_t n = i;
		r = whole();
		if (n < sizeof names / sizeof *names)
			r.hostname = names[n];
		else if ((n -= sizeof names / sizeof *names) < sizeof ids / sizeof *ids)
			r.machine_id = ids[n];
		else
			r.generation = uuids[n - sizeof ids / sizeof *ids];
		identify(r, EVERYTHING);
		CHECK(end.kind == END_FAILED && end.code == EINVAL && end.message[0] && !done[0]);
	}
	for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
		r = whole();
		r.hostname = good[i];
		identify(r, EVERYTHING);
		CHECK(end.kind == END_EXITED && strcmp(hostname, good[i]) == 0);
	}
}

/* As programs may watch it: by inotify, by a mapping, or by an open file. */
static void test_watched(void)
{
	struct request r = whole();
	char events[4096];
	int watch = inotify_init1(IN_NONBLOCK);
	int fd = open(at("/run/ramet/generation"), O_RDONLY);
	const char *map = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(watch >= 0 && inotify_add_watch(watch, at("/run/ramet/generation"), IN_ALL_EVENTS & ~IN_ACCESS) >= 0);
	r.generation = "fffffff0-89ab-4def-8123-456789abcdef";
	identify(r, 1 << TAG_GENERATION);
	CHECK(end.kind == END_EXITED && strncmp(map, r.generation, GENERATION_SIZE) == 0 && map[GENERATION_SIZE] == '\n');
	ssize_t n = read(watch, events, sizeof events);
	CHECK(n == sizeof(struct inotify_event) && ((struct inotify_event *)(void *)events)->mask == IN_MODIFY);
	munmap((void *)map, 4096);
	close(fd);
	close(watch);
	/* Removed, with its directory: made again, not written into what nobody sees. */
	CHECK(unlink(at("/run/ramet/generation")) == 0 && unlink(at("/run/ramet/machine-id")) == 0 && rmdir(at("/run/ramet")) == 0);
	identify(whole(), EVERYTHING);
	CHECK(end.kind == END_EXITED && strncmp(text_of("/run/ramet/generation"), uuid, GENERATION_SIZE) == 0);
	CHECK(strncmp(text_of("/run/ramet/machine-id"), id, MACHINE_ID_SIZE) == 0);
}

static void test_bound(void)
{
	/* As after a bind mount: the same file at both names. */
	CHECK(unlink(at("/etc/machine-id")) == 0);
	char from[200];
	snprintf(from, sizeof from, "%s", at("/run/ramet/machine-id"));
	CHECK(link(from, at("/etc/machine-id")) == 0);
	identify(whole(), 1 << TAG_MACHINE_ID);
	CHECK(end.kind == END_EXITED && !done[0]);
	CHECK(unlink(at("/etc/machine-id")) == 0);
	identify(whole(), 1 << TAG_MACHINE_ID);
	CHECK(end.kind == END_EXITED && strcmp(done, "m") == 0);
}

static void test_hosts(void)
{
	static const char *const others[] = {"", "127.0.0.1 localhost\n", "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 \n",
		"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 a b\n",
		"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 a",
		"127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 a\n10.0.0.1 b\n"};
	char text[HOSTS_MAX];
	hosts_text(text, "a-longer-name-than-the-other");
	write_text("/etc/hosts", text, 0644);
	identify(whole(), 1 << TAG_HOSTNAME);
	hosts_text(text, "fork-1");
	CHECK(end.kind == END_EXITED && strcmp(text_of("/etc/hosts"), text) == 0 && strstr(text, "\n127.0.1.1 fork-1\n"));
	for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
		write_text("/etc/hosts", others[i], 0644);
		identify(whole(), 1 << TAG_HOSTNAME);
		CHECK(end.kind == END_EXITED && strcmp(text_of("/etc/hosts"), others[i]) == 0);
	}
	unlink(at("/etc/hosts"));
	identify(whole(), 1 << TAG_HOSTNAME);
	CHECK(end.kind == END_EXITED && access(at("/etc/hosts"), F_OK) < 0);
}

/* --- hooks --- */

static int run_hooks(char *errors, size_t size)
{
	char directory[200];
	int kept = dup(2), fd = open(at("/errors"), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	snprintf(directory, sizeof directory, "%s", at("/etc/ramet/fork.d"));
	dup2(fd, 2);
	int result = hooks_run(directory, uuid, "my name");
	dup2(kept, 2);
	close(kept);
	ssize_t n = pread(fd, errors, size - 1, 0);
	errors[n > 0 ? n : 0] = 0;
	close(fd);
	return result;
}

static void test_hooks(void)
{
	char errors[1024], script[400];
	CHECK(run_hooks(errors, sizeof errors) == 0 && !errors[0]);
	mkdir(at("/etc/ramet"), 0755);
	mkdir(at("/etc/ramet/fork.d"), 0755);
	identify(whole(), EVERYTHING);
	CHECK(end.kind == END_EXITED && end.code == 0);
	CHECK(run_hooks(errors, sizeof errors) == 0);
	snprintf(script, sizeof script, "#!/bin/sh\necho \"${0##*/} $RAMET_GENERATION $RAMET_NAME $PATH\" >> %s/log\n", root);
	write_text("/etc/ramet/fork.d/b", script, 0755);
	write_text("/etc/ramet/fork.d/B", script, 0755);
	write_text("/etc/ramet/fork.d/a", script, 0644);
	identify(whole(), EVERYTHING);
	CHECK(end.kind == END_EXITED && end.code == 1);
	CHECK(run_hooks(errors, sizeof errors) == 0 && !errors[0]);
	char expected[400], line[160];
	snprintf(line, sizeof line, " %s my name /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n", uuid);
	snprintf(expected, sizeof expected, "B%sb%s", line, line);
	CHECK(strcmp(text_of("/log"), expected) == 0);
	unlink(at("/log"));
	write_text("/etc/ramet/fork.d/C", "#!/bin/sh\nprintf 'half a line' >&2\nexit 3\n", 0755);
	CHECK(run_hooks(errors, sizeof errors) == 1 && strstr(errors, "half a line3 ended with status 3: ") && strstr(errors, "/etc/ramet/fork.d/C\n"));
	snprintf(expected, sizeof expected, "B%s", line);
	CHECK(strcmp(text_of("/log"), expected) == 0); /* b was not run any more */
	write_text("/etc/ramet/fork.d/A", "#!/bin/sh\nkill -9 $$\n", 0755);
	CHECK(run_hooks(errors, sizeof errors) == 1 && strncmp(errors, "137 was killed by signal 9: ", 28) == 0);
	write_text("/etc/ramet/fork.d/A", "#!/no/such/interpreter\n", 0755);
	CHECK(run_hooks(errors, sizeof errors) == 1 && strncmp(errors, "2 No such file or directory: ", 29) == 0);
	write_text("/etc/ramet/fork.d/A", "#!/bin/sh\nkill $PPID\nkill $$\n", 0755); /* as when there is no time left */
	CHECK(run_hooks(errors, sizeof errors) == 1 && strncmp(errors, "124 did not end in time: ", 25) == 0);
	CHECK(strstr(errors, "/fork.d/A\n") && strchr(errors, '\n')[1] == 0);
}

int main(void)
{
	random_fd = 99;
	CHECK(mkdtemp(root) != NULL);
	mkdir(at("/run"), 0755);
	mkdir(at("/etc"), 0755);
	test_not_ours();
	test_begin();
	test_order();
	test_failures();
	test_nonsense();
	test_watched();
	test_bound();
	test_hosts();
	test_hooks();
	char command[128];
	snprintf(command, sizeof command, "rm -rf %s", root);
	CHECK(system(command) == 0);
	return check_report();
}
