#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>
#include "boot.h"
#include "mounts.h"

enum { SAFE = MS_NOSUID | MS_NODEV, DATA = MS_NOSUID | MS_NODEV | MS_NOEXEC };

static const char *const early[] = {"/dev", "/proc", "/sys"};

static void mount_at(const char *type, const char *path, unsigned mode, unsigned long flags, const char *options)
{
	boot_directory(path, mode);
	if (mount(type, path, type, flags, options) < 0 && errno != EBUSY)
		boot_say("%s: %s", path, strerror(errno));
}

void mounts_early(void)
{
	mount_at("devtmpfs", "/dev", 0755, MS_NOSUID, "mode=0755");
	mount_at("proc", "/proc", 0555, DATA, NULL);
	mount_at("sysfs", "/sys", 0555, DATA, NULL);
	boot_directory("/dev/pts", 0755);
	mount_at("devpts", "/dev/pts", 0755, MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666");
}

void mounts_move(const char *root)
{
	for (size_t i = 0; i < sizeof early / sizeof *early; i++) {
		char path[64];
		snprintf(path, sizeof path, "%s%s", root, early[i]);
		mkdir(path, 0755);
		/* A read-only image may have no such directory. The agent goes on with the descriptors that it has. */
		if (mount(early[i], path, NULL, MS_MOVE, NULL) < 0)
			boot_say("%s in the image: %s", early[i], strerror(errno));
	}
}

static bool is_mount(const char *path)
{
	struct stat st, parent;
	return stat(path, &st) == 0 && stat("/", &parent) == 0 && st.st_dev != parent.st_dev;
}

static void device_links(void)
{
	static const char *const links[][2] = {
		{"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"},
		{"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"},
	};
	for (size_t i = 0; i < sizeof links / sizeof *links; i++)
		(void)!symlink(links[i][0], links[i][1]);
}

static void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		boot_say("%s: %s", path, strerror(errno));
	if (fd >= 0)
		close(fd);
}

static void control_groups(void)
{
	char controllers[512] = "", enable[600];
	size_t at = 0;
	mount_at("cgroup2", "/sys/fs/cgroup", 0755, DATA, NULL);
	int fd = open("/sys/fs/cgroup/cgroup.controllers", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	(void)!read(fd, controllers, sizeof controllers - 1);
	close(fd);
	for (char *save, *c = strtok_r(controllers, " \n", &save); c && at < sizeof enable; c = strtok_r(NULL, " \n", &save))
		at += (size_t)snprintf(enable + at, sizeof enable - at, "+%s ", c);
	if (at)
		write_file("/sys/fs/cgroup/cgroup.subtree_control", enable);
	mkdir("/sys/fs/cgroup/workload", 0755);
}

/* Single free pages are to go back to the host. Not on the command line: the balloon's driver overwrites that when it registers (Linux 6.1). */
static void report_every_page(void)
{
	static const char order[] = "/sys/module/page_reporting/parameters/page_reporting_order";
	if (access(order, W_OK) == 0)
		write_file(order, "0");
}

void mounts_late(void)
{
	struct statvfs fs;
	if (is_mount("/dev")) {
		device_links();
		mount_at("tmpfs", "/dev/shm", 01777, SAFE, "mode=1777");
	}
	if (is_mount("/sys")) {
		control_groups();
		report_every_page();
	}
	if (!is_mount("/run"))
		mount_at("tmpfs", "/run", 0755, SAFE, "mode=0755");
	boot_directory("/tmp", 01777);
	if (statvfs("/", &fs) == 0 && (fs.f_flag & ST_RDONLY))
		mount_at("tmpfs", "/tmp", 01777, SAFE, "mode=1777");
}

void mounts_workload(void)
{
	if (access("/sys/fs/cgroup/workload", F_OK) == 0)
		write_file("/sys/fs/cgroup/workload/cgroup.procs", "0");
}
