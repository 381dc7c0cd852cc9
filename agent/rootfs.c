#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
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
static void grow(const char *device)
{
	uint8_t sb[SUPERBLOCK_SIZE];
	uint64_t size = 0;
	int disk = open(device, O_RDONLY | O_CLOEXEC), root = open(target, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
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

static int mount_disk(const char *device)
{
	if (mount(device, target, "ext4", 0, "discard") == 0 || mount(device, target, "ext4", 0, NULL) == 0) {
		grow(device);
		return 0;
	}
	int error = errno;
	if (mount(device, target, "ext4", MS_RDONLY, NULL) == 0 || mount(device, target, "erofs", MS_RDONLY, NULL) == 0)
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
	if (mount_disk(device) < 0)
		boot_fatal("cannot mount %s: %s", device, strerror(errno));
	mounts_move(target);
	int old = open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (old >= 0 && fstat(old, &st) == 0)
		clear_tree(old, st.st_dev);
	if (chdir(target) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
		boot_fatal("cannot change the root: %s", strerror(errno));
}
