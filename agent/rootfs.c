#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>
#include "boot.h"
#include "mounts.h"
#include "rootfs.h"
#include "wire.h"

/* From <linux/fs.h> and fs/ext4/ext4.h, which musl does not come with. */
#define DEVICE_SIZE _IOR(0x12, 114, size_t)
#define EXT4_RESIZE _IOW('f', 16, uint64_t)

enum {
	SUPERBLOCK = 1024, SUPERBLOCK_SIZE = 1024,
	SB_BLOCKS_LOW = 0x4, SB_LOG_BLOCK_SIZE = 0x18, SB_MAGIC = 0x38, SB_INCOMPATIBLE = 0x60, SB_BLOCKS_HIGH = 0x150,
	EXT4_MAGIC = 0xEF53, INCOMPATIBLE_64BIT = 0x80,
};

static const char target[] = "/newroot";

/* Grows a mounted ext4 to the size of its device; the kernel does all of it. */
static void grow(const char *device, const char *point)
{
	uint8_t sb[SUPERBLOCK_SIZE];
	uint64_t size = 0;
	int disk = open(device, O_RDONLY | O_CLOEXEC), root = open(point, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (disk >= 0 && root >= 0 && pread(disk, sb, sizeof sb, SUPERBLOCK) == sizeof sb && get16(sb + SB_MAGIC) == EXT4_MAGIC &&
	    ioctl(disk, DEVICE_SIZE, &size) == 0) {
		uint64_t blocks = get32(sb + SB_BLOCKS_LOW);
		if (get32(sb + SB_INCOMPATIBLE) & INCOMPATIBLE_64BIT)
			blocks |= (uint64_t)get32(sb + SB_BLOCKS_HIGH) << 32;
		uint64_t wanted = size / ((uint64_t)1024 << get32(sb + SB_LOG_BLOCK_SIZE));
		if (wanted > blocks && ioctl(root, EXT4_RESIZE, &wanted) < 0)
			boot_say("cannot grow %s: %s", device, strerror(errno));
	}
	if (disk >= 0)
		close(disk);
	if (root >= 0)
		close(root);
}

/* discard: the host has back what was deleted when the journal commits, at most 5 s later. Deleting 10000 small files, or copying and deleting /usr twice,
 * took the guest as much cpu as with a fstrim afterwards (2.0 and 14.0 s against 2.2 and 13.9, emulated), and as many bytes came back; a trim now and then
 * would have to know when. */
static int mount_disk(const char *device, const char *point)
{
	if (mount(device, point, "ext4", 0, "discard") == 0 || mount(device, point, "ext4", 0, NULL) == 0) {
		grow(device, point);
		return 0;
	}
	int error = errno;
	if (mount(device, point, "ext4", MS_RDONLY, NULL) == 0 || mount(device, point, "erofs", MS_RDONLY, NULL) == 0)
		return 0;
	errno = error;
	return -1;
}

/* Removes all that is on the device dev below fd. The running program stays in memory without a name. */
static void clear_tree(int fd, dev_t dev)
{
	struct dirent *entry;
	DIR *dir = fdopendir(fd);
	if (!dir) {
		close(fd);
		return;
	}
	while ((entry = readdir(dir))) {
		struct stat st;
		const char *name = entry->d_name;
		if (strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || fstatat(dirfd(dir), name, &st, AT_SYMLINK_NOFOLLOW) < 0 || st.st_dev != dev)
			continue;
		if (S_ISDIR(st.st_mode)) {
			int sub = openat(dirfd(dir), name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
			if (sub >= 0)
				clear_tree(sub, dev);
			unlinkat(dirfd(dir), name, AT_REMOVEDIR);
		} else {
			unlinkat(dirfd(dir), name, 0);
		}
	}
	closedir(dir);
}

void rootfs_switch(const char *device)
{
	struct stat st;
	boot_directory(target, 0755);
	while (access(device, F_OK) < 0)
		if (!boot_wait_device())
			boot_fatal("there is no %s", device);
	if (mount_disk(device, target) < 0)
		boot_fatal("cannot mount %s: %s", device, strerror(errno));
	mounts_move(target);
	int old = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (old >= 0 && fstat(old, &st) == 0)
		clear_tree(old, st.st_dev);
	if (chdir(target) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		boot_fatal("cannot change the root: %s", strerror(errno));
}

/* --- drives --- */

/* The disk whose serial is `name`: the order in which a kernel finds disks is its own business. */
static bool find_drive(int sys_fd, const char *name, char *device, size_t size)
{
	bool found = false;
	struct dirent *entry;
	int fd = openat(sys_fd, "block", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	DIR *disks = fd < 0 ? NULL : fdopendir(fd);
	while (!found && disks && (entry = readdir(disks))) {
		char path[300], serial[32] = "";
		snprintf(path, sizeof path, "%s/serial", entry->d_name);
		int file = openat(fd, path, O_RDONLY | O_CLOEXEC);
		if (file < 0)
			continue;
		(void)!read(file, serial, sizeof serial - 1);
		close(file);
		serial[strcspn(serial, "\n")] = 0;
		snprintf(path, sizeof path, "/dev/%s", entry->d_name);
		found = strcmp(serial, name) == 0 && access(path, F_OK) == 0 && (size_t)snprintf(device, size, "%s", path) < size;
	}
	if (disks)
		closedir(disks);
	return found;
}

/* As udev would, were there one. */
static void link_drive(const char *name, const char *device)
{
	char link[64], there[80];
	boot_directory("/dev/disk", 0755);
	boot_directory("/dev/disk/by-id", 0755);
	snprintf(link, sizeof link, "/dev/disk/by-id/virtio-%s", name);
	snprintf(there, sizeof there, "../..%s", device + strlen("/dev"));
	(void)!symlink(there, link);
}

static void make_directories(const char *path)
{
	char part[256];
	snprintf(part, sizeof part, "%s", path);
	for (char *p = part + 1; *p; p++)
		if (*p == '/') {
			*p = 0;
			mkdir(part, 0755);
			*p = '/';
		}
	mkdir(part, 0755);
}

void rootfs_drive(int sys_fd, const char *word)
{
	char name[32], device[64];
	size_t length = strcspn(word, ":");
	const char *point = word[length] ? word + length + 1 : "";
	if (length == 0 || length >= sizeof name)
		boot_fatal("ramet.drive=%s is not understood", word);
	memcpy(name, word, length);
	name[length] = 0;
	while (!find_drive(sys_fd, name, device, sizeof device))
		if (!boot_wait_device())
			boot_fatal("there is no drive %s", name);
	link_drive(name, device);
	if (!*point)
		return;
	make_directories(point);
	/* To go on without it would be to write to the disk below what belongs on this one. */
	if (mount_disk(device, point) < 0)
		boot_fatal("cannot mount drive %s on %s: %s", name, point, strerror(errno));
}
