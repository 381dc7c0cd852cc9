#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "power.h"
#include "proc.h"
#include "slot.h"

enum {
	SYSTEMD_POWEROFF = 34 + 4, /* SIGRTMIN+4 as the kernel and systemd count: musl's SIGRTMIN is another */
	FLUSH_MS = 1000,           /* for a host that does not read */
	AFTER_KILL_MS = 1000,
	MOUNTS_MAX = 256,
};

static enum power_mode mode;
static enum { ON, FLUSHING, ASKED } state;
static uint64_t grace, deadline;

void power_begin(enum power_mode m)
{
	mode = m;
}

void power_off_soon(uint64_t grace_ms)
{
	if (state != ON)
		return;
	state = FLUSHING;
	grace = grace_ms < INT_MAX ? grace_ms : INT_MAX;
	deadline = now_ms() + FLUSH_MS;
}

/* Waits for children until there are none, or the time is over. */
static void reap_for(uint64_t ms)
{
	uint64_t end = now_ms() + ms;
	sigset_t children;
	sigemptyset(&children);
	sigaddset(&children, SIGCHLD);
	for (;;) {
		pid_t pid;
		while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
			;
		uint64_t now = now_ms();
		if (pid < 0 || now >= end)
			return;
		struct timespec left = {(time_t)((end - now) / 1000), (long)((end - now) % 1000) * 1000000};
		sigtimedwait(&children, NULL, &left);
	}
}

static void unmount_all(void)
{
	static char table[64 * 1024];
	char *points[MOUNTS_MAX];
	int n = 0;
	ssize_t size = 0, got;
	int fd = open("/proc/self/mounts", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	while (size < (ssize_t)sizeof table - 1 && (got = read(fd, table + size, sizeof table - 1 - (size_t)size)) > 0)
		size += got;
	close(fd);
	table[size] = 0;
	for (char *save, *line = strtok_r(table, "\n", &save); line && n < MOUNTS_MAX; line = strtok_r(NULL, "\n", &save)) {
		char *point = strchr(line, ' ');
		char *end = point ? strchr(point + 1, ' ') : NULL;
		if (!end || strncmp(point + 1, "/proc ", 6) == 0)
			continue;
		*end = 0;
		points[n++] = point + 1;
	}
	while (n-- > 0)
		if (strcmp(points[n], "/") != 0 && umount2(points[n], UMOUNT_NOFOLLOW) < 0)
			umount2(points[n], MNT_DETACH | UMOUNT_NOFOLLOW);
}

void power_off_now(void)
{
	sync();
	mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
	reboot(RB_POWER_OFF);
	/* A machine without a way to switch itself off. */
	reboot(RB_HALT_SYSTEM);
	for (;;)
		pause();
}

static void shut_down(void)
{
	if (mode == POWER_EXIT) {
		proc_kill_all();
		_exit(0);
	}
	if (mode == POWER_SELF) {
		kill(-1, SIGTERM);
		kill(-1, SIGCONT);
		reap_for(grace);
		kill(-1, SIGKILL);
		reap_for(AFTER_KILL_MS);
		sync();
		unmount_all();
	}
	power_off_now();
}

static void ask_init(void)
{
	char name[32] = "", exe[PATH_MAX] = "";
	int fd = open("/proc/1/comm", O_RDONLY | O_CLOEXEC);
	if (fd >= 0) {
		(void)!read(fd, name, sizeof name - 1);
		close(fd);
	}
	(void)!readlink("/proc/1/exe", exe, sizeof exe - 1);
	if (strncmp(name, "systemd", 7) == 0 || strstr(exe, "systemd"))
		kill(1, SYSTEMD_POWEROFF);
	else if (strstr(exe, "sysvinit") || strcmp(exe, "/sbin/init") == 0 || strcmp(exe, "/usr/sbin/init") == 0)
		kill(1, SIGPWR);
	else
		kill(1, SIGUSR2); /* busybox, s6, and others after them */
}

int power_due(bool port_empty)
{
	if (state == ON)
		return -1;
	uint64_t now = now_ms();
	if (state == FLUSHING && (port_empty || now >= deadline)) {
		if (mode != POWER_ASK_INIT)
			shut_down();
		ask_init();
		state = ASKED;
		deadline = now + grace;
	}
	if (state == ASKED && now >= deadline)
		shut_down();
	return (int)(deadline - now);
}
