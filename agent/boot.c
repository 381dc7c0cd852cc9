#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "boot.h"
#include "identity.h"
#include "mounts.h"
#include "net.h"
#include "power.h"
#include "proc.h"
#include "rootfs.h"
#include "slot.h"
#include "terminal.h"

enum { DEVICE_WAIT_MS = 30000, DEVICE_NAP_MS = 50, LINE_SIZE = 4096, WORD_MAX = 256 };

static char command_line[LINE_SIZE];

void boot_say(const char *format, ...)
{
	char line[512];
	va_list args;
	va_start(args, format);
	int n = snprintf(line, sizeof line, "ramet-agent: ");
	n += vsnprintf(line + n, sizeof line - (size_t)n, format, args);
	va_end(args);
	if (n > (int)sizeof line - 2)
		n = sizeof line - 2;
	line[n++] = '\n';
	(void)!write(1, line, (size_t)n);
}

void boot_fatal(const char *format, ...)
{
	char line[400];
	va_list args;
	va_start(args, format);
	vsnprintf(line, sizeof line, format, args);
	va_end(args);
	boot_say("fatal: %s", line);
	power_off_now();
}

const char *boot_word_at(const char *name, int at)
{
	static char value[WORD_MAX];
	size_t n = strlen(name);
	for (const char *p = command_line; *p; p += strspn(p, " \n")) {
		size_t length = strcspn(p, " \n");
		if (length > n && length - n - 1 < sizeof value && strncmp(p, name, n) == 0 && p[n] == '=' && at-- == 0) {
			memcpy(value, p + n + 1, length - n - 1);
			value[length - n - 1] = 0;
			return value[0] ? value : NULL;
		}
		p += length;
	}
	return NULL;
}

const char *boot_word(const char *name)
{
	return boot_word_at(name, 0);
}

void boot_directory(const char *path, unsigned mode)
{
	if (mkdir(path, mode) == 0)
		chmod(path, mode);
}

/* --- devices --- */

static int events = -1;
static uint64_t device_deadline;

static void watch_devices(void)
{
	/* struct sockaddr_nl and the constants, as Linux has always had them: musl has no header for them. */
	struct { unsigned short family, pad; unsigned pid, groups; } address = {AF_NETLINK, 0, 0, 1};
	enum { KOBJECT_UEVENT = 15 };
	device_deadline = now_ms() + DEVICE_WAIT_MS;
	events = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, KOBJECT_UEVENT);
	if (events >= 0 && bind(events, (struct sockaddr *)&address, sizeof address) < 0) {
		close(events);
		events = -1;
	}
}

bool boot_wait_device(void)
{
	char ignored[LINE_SIZE];
	struct pollfd p = {.fd = events, .events = POLLIN};
	uint64_t now = now_ms();
	if (now >= device_deadline)
		return false;
	poll(&p, events >= 0, events >= 0 ? (int)(device_deadline - now) : DEVICE_NAP_MS);
	while (events >= 0 && recv(events, ignored, sizeof ignored, 0) > 0)
		;
	return true;
}

static void load_modules(void)
{
	char path[512], name[256];
	FILE *order = fopen("/modules/order", "re");
	if (!order)
		return;
	while (fgets(name, sizeof name, order)) {
		name[strcspn(name, "\n")] = 0;
		if (!name[0] || name[0] == '#')
			continue;
		snprintf(path, sizeof path, "%s%s", name[0] == '/' ? "" : "/modules/", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) < 0 && errno != EEXIST))
			boot_say("module %s: %s", path, strerror(errno));
		if (fd >= 0)
			close(fd);
	}
	fclose(order);
}

static bool is_our_port(const char *device)
{
	char path[320], name[32] = "";
	snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", device);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return false;
	(void)!read(fd, name, sizeof name - 1);
	close(fd);
	return strcmp(name, "ramet.agent\n") == 0;
}

static int find_port(void)
{
	int fd = -1;
	struct dirent *entry;
	DIR *ports = opendir("/sys/class/virtio-ports");
	while (fd < 0 && ports && (entry = readdir(ports))) {
		char path[300];
		if (!is_our_port(entry->d_name))
			continue;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
	}
	if (ports)
		closedir(ports);
	return fd;
}

/* --- the whole --- */

static void read_command_line(void)
{
	int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	ssize_t n = read(fd, command_line, sizeof command_line - 1);
	command_line[n > 0 ? n : 0] = 0;
	close(fd);
}

static void open_console(void)
{
	/* An initramfs without /dev/console starts its init with nothing open. */
	for (int fd; (fd = open("/dev/console", O_RDWR | O_NOCTTY)) >= 0;) {
		if (fd > 2) {
			close(fd);
			return;
		}
	}
	for (int fd; (fd = open("/", O_RDONLY | O_DIRECTORY)) >= 0;) {
		if (fd > 2) {
			close(fd);
			return;
		}
	}
}

/* The image's init becomes PID 1; what returns is the agent, a child of it. */
static void give_way(const char *init, char *argv0)
{
	pid_t pid = fork();
	if (pid < 0)
		boot_fatal("cannot start a second process: %s", strerror(errno));
	if (pid == 0) {
		setsid();
		/* systemd spares processes named like this when it kills what is left at shutdown. */
		argv0[0] = '@';
		mounts_workload();
		return;
	}
	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	char *argv[] = {(char *)init, NULL}, *envp[] = {"HOME=/", "TERM=linux", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL};
	execve(init, argv, envp);
	int error = errno;
	kill(pid, SIGKILL);
	boot_fatal("cannot run %s: %s", init, strerror(error));
}

void boot_machine(struct boot *b, char *argv0)
{
	static char init[WORD_MAX];
	mounts_early();
	open_console();
	read_command_line();
	watch_devices();
	load_modules();
	b->proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	b->sys_fd = open("/sys", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
	terminal_dev = open("/dev", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	random_fd = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
	while ((b->port_fd = find_port()) < 0)
		if (!boot_wait_device())
			boot_fatal("there is no port ramet.agent");
	const char *word = boot_word("ramet.root");
	if (word)
		rootfs_switch(word);
	mounts_late();
	for (int at = 0; (word = boot_word_at("ramet.drive", at)); at++)
		rootfs_drive(b->sys_fd, word);
	identity_begin("", boot_word("ramet.machine_id"));
	net_configure();
	if (events >= 0)
		close(events);
	if ((word = boot_word("ramet.init"))) {
		b->init = strcpy(init, word);
		give_way(init, argv0);
	} else {
		mounts_workload();
	}
}

void boot_beside(struct boot *b, int fd)
{
	b->test = true;
	b->port_fd = fd;
	fcntl(fd, F_SETFD, FD_CLOEXEC);
	fcntl(fd, F_SETFL, O_RDWR | O_NONBLOCK);
	b->proc_fd = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
}

void boot_ready(void)
{
	boot_say("ready");
}
