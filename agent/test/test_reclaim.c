/* The builtins that give memory back, in directories that look like /proc and /sys. The calls that would change the system that runs the test end here. */
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include "../builtin.h"
#include "../reclaim.h"
#include "check.h"

static char done[2048]; /* a letter for each call, as they came */
static char root[64], said[4096], complaint[4096];

int __wrap_ioctl(int fd, unsigned long what, ...);
void __wrap_sync(void);
int __wrap_nanosleep(const struct timespec *t, struct timespec *left);

static void note(char what)
{
	size_t n = strlen(done);
	done[n] = what;
	done[n + 1] = 0;
}

int __wrap_ioctl(int fd, unsigned long what, ...)
{
	va_list args;
	CHECK(fd >= 0);
	CHECK(what == 0xc0185879); /* FITRIM, as the kernel has it */
	va_start(args, what);
	uint64_t *range = va_arg(args, uint64_t *);
	va_end(args);
	CHECK(range[0] == 0 && range[1] == UINT64_MAX && range[2] == 0);
	range[1] = 1000;
	note('t');
	return 0;
}

void __wrap_sync(void)
{
	note('s');
}

int __wrap_nanosleep(const struct timespec *t, struct timespec *left)
{
	(void)t;
	(void)left;
	note('n');
	return 0;
}

static const char *at(const char *path)
{
	static char full[512];
	snprintf(full, sizeof full, "%s/%s", root, path);
	return full;
}

static void file(const char *path, const char *text)
{
	make_parents(at(path), 0755, false);
	int fd = open(at(path), O_WRONLY | O_CREAT | O_TRUNC, 0644);
	CHECK(fd >= 0 && write_all(fd, text, strlen(text)));
	close(fd);
}

static bool is(const char *path, const char *text)
{
	char found[256] = "";
	int fd = open(at(path), O_RDONLY);
	if (fd < 0 || read(fd, found, sizeof found - 1) < 0)
		return false;
	close(fd);
	return strcmp(found, text) == 0;
}

static void taken(int fd, int kept, char *to, size_t size)
{
	ssize_t n = pread(fd, to, size - 1, 0);
	to[n > 0 ? n : 0] = 0;
	dup2(kept, fd == 1 ? 1 : 2);
	close(kept);
}

static int run(int argc, char **argv)
{
	int out = dup(1), error = dup(2);
	int files[2] = {open(at("out"), O_RDWR | O_CREAT | O_TRUNC, 0600), open(at("err"), O_RDWR | O_CREAT | O_TRUNC, 0600)};
	done[0] = 0;
	fflush(stdout);
	dup2(files[0], 1);
	dup2(files[1], 2);
	int result = builtin_run(argc, argv);
	fflush(stdout);
	taken(1, out, said, sizeof said);
	taken(2, error, complaint, sizeof complaint);
	close(files[0]);
	close(files[1]);
	return result;
}

#define RUN(...) run((int)(sizeof(char *[]){__VA_ARGS__} / sizeof(char *)), (char *[]){__VA_ARGS__})
#define DAMON "sys/module/damon_reclaim/parameters/"

static void guest(void)
{
	int proc, sys;
	file("proc/vmstat", "nr_free_pages 5\npgsteal_anon 1\npgsteal_file 20\n");
	file("proc/meminfo", "MemTotal: 2000 kB\nMemFree:   1000 kB\n");
	file("proc/iomem", "00000000-00000fff : Reserved\n00001000-0009fbff : System RAM\n00100000-7fffffff : System RAM\n  01000000-01ffffff : Kernel code\n"
	                   "80000000-8fffffff : PCI Bus\n100000000-17fffffff : System RAM\n");
	file("proc/sys/vm/drop_caches", "0");
	file("proc/sys/vm/compact_memory", "");
	file("sys/fs/cgroup/memory.reclaim", "");
	proc = open(at("proc"), O_RDONLY | O_DIRECTORY);
	sys = open(at("sys"), O_RDONLY | O_DIRECTORY);
	reclaim_begin(proc, sys);
}

static void test_another_system_is_left_alone(void)
{
	CHECK(RUN("slim") == 1 && strncmp(complaint, "1 this system is not", 20) == 0 && !*done);
	CHECK(RUN("reclaim", "4096") == 1);
	CHECK(RUN("tune", "enabled=0") == 1);
}

static void test_reclaim(void)
{
	CHECK(RUN("reclaim", "4096") == 0 && strcmp(said, "reclaimed 0\n") == 0);
	CHECK(is("sys/fs/cgroup/memory.reclaim", "4096"));
	CHECK(RUN("reclaim", "-1") == 1 && strncmp(complaint, "22 ", 3) == 0);
	CHECK(RUN("reclaim", "0") == 1);
	CHECK(RUN("reclaim", "1G") == 1);
	unlink(at("sys/fs/cgroup/memory.reclaim"));
	CHECK(RUN("reclaim", "4096") == 1 && strncmp(complaint, "2 ", 2) == 0);
}

static void test_a_kernel_without_damon(void)
{
	CHECK(RUN("tune", "min_age=5", "enabled=1") == 0 && strcmp(said, "tuned 0\n") == 0);
	CHECK(RUN("tune", "enabled=0") == 0 && strcmp(said, "tuned 0\n") == 0);
}

static void test_tune(void)
{
	struct stat before, after;
	file(DAMON "enabled", "N\n");
	file(DAMON "min_age", "120000000\n");
	file(DAMON "monitor_region_start", "0\n");
	file(DAMON "monitor_region_end", "0\n");
	CHECK(RUN("tune", "min_age=5", "enabled=1") == 0 && strcmp(said, "tuned 1\n") == 0);
	CHECK(is(DAMON "enabled", "Y") && is(DAMON "min_age", "5"));
	CHECK(is(DAMON "monitor_region_start", "4096") && is(DAMON "monitor_region_end", "6442450944"));
	stat(at(DAMON "enabled"), &before);
	CHECK(RUN("tune", "enabled=1", "min_age=5") == 0 && strcmp(said, "tuned 1\n") == 0);
	stat(at(DAMON "enabled"), &after);
	CHECK(memcmp(&before.st_mtim, &after.st_mtim, sizeof before.st_mtim) == 0);
	CHECK(RUN("tune", "min_age=6", "enabled=1") == 0 && is(DAMON "min_age", "6"));
	stat(at(DAMON "enabled"), &after);
	CHECK(memcmp(&before.st_mtim, &after.st_mtim, sizeof before.st_mtim) != 0);
	CHECK(RUN("tune", "enabled=0") == 0 && is(DAMON "enabled", "N") && is(DAMON "min_age", "6"));
	CHECK(RUN("tune", "no_such=6", "enabled=1") == 1 && strncmp(complaint, "2 ", 2) == 0);
}

static void test_settings_that_are_none(void)
{
	char *const wrong[] = {"min_age", "min_age=", "=5", "../min_age=5", "min_age=5x", "min_age=-5", "min_age=111111111111111111111111"};
	for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
		CHECK(RUN("tune", wrong[i]) == 1 && strncmp(complaint, "22 ", 3) == 0);
	CHECK(RUN("tune") == 1);
}

static void test_a_kernel_that_refuses(void)
{
	file(DAMON "enabled", "N");
	unlink(at(DAMON "enabled"));
	CHECK(symlink("/dev/zero", at(DAMON "enabled")) == 0); /* takes everything, and never says Y */
	CHECK(RUN("tune", "min_age=5", "enabled=1") == 1 && strncmp(complaint, "22 ", 3) == 0 && strlen(done) > 10);
	unlink(at(DAMON "enabled"));
}

static void test_slim(void)
{
	char mounts[1024];
	file("a b/x", "");
	snprintf(mounts, sizeof mounts,
	         "proc /proc proc rw 0 0\n/dev/vda %s ext4 rw,discard 0 0\n/dev/vda %s/a\\040b ext4 rw 0 0\n/dev/fuse %s fuse.x rw 0 0\n"
	         "/dev/vdb %s/missing ext4 rw 0 0\n",
	         root, root, root, root);
	file("proc/self/mounts", mounts);
	CHECK(RUN("slim") == 0 && strcmp(said, "trimmed 1000\nfreed 0\n") == 0);
	CHECK(strcmp(done, "st") == 0);
	CHECK(is("proc/sys/vm/drop_caches", "3") && is("proc/sys/vm/compact_memory", "1"));
	unlink(at("proc/sys/vm/compact_memory"));
	CHECK(RUN("slim") == 0);
	unlink(at("proc/sys/vm/drop_caches"));
	CHECK(RUN("slim") == 1);
}

static void test_descriptors_that_stay(void)
{
	int low = open("/dev/null", O_RDONLY), kept = open("/dev/null", O_RDONLY), between = open("/dev/null", O_RDONLY);
	int other = open("/dev/null", O_RDONLY), high = open("/dev/null", O_RDONLY);
	reclaim_begin(other, kept);
	reclaim_close_others();
	CHECK(fcntl(kept, F_GETFD) >= 0 && fcntl(other, F_GETFD) >= 0);
	CHECK(fcntl(low, F_GETFD) < 0 && fcntl(between, F_GETFD) < 0 && fcntl(high, F_GETFD) < 0);
	reclaim_begin(-1, -1);
	reclaim_close_others();
	CHECK(fcntl(kept, F_GETFD) < 0 && fcntl(other, F_GETFD) < 0 && fcntl(2, F_GETFD) >= 0);
}

int main(void)
{
	snprintf(root, sizeof root, "%s", "/tmp/test_reclaim.XXXXXX");
	if (!mkdtemp(root))
		return 1;
	test_another_system_is_left_alone();
	guest();
	test_reclaim();
	test_a_kernel_without_damon();
	test_tune();
	test_settings_that_are_none();
	test_a_kernel_that_refuses();
	test_slim();
	builtin_run(3, (char *[]){"remove", root, "rf"});
	test_descriptors_that_stay();
	return check_report();
}
