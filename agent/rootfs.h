#ifndef RAMET_ROOTFS_H
#define RAMET_ROOTFS_H

/* Makes the disk the root, and gives the initramfs's memory back. */
void rootfs_switch(const char *device);
/* Finds a drive, `NAME:` or `NAME:/MOUNT/POINT`, links it by its name, and mounts it. */
void rootfs_drive(int sys_fd, const char *word);

#endif
