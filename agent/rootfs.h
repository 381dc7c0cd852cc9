#ifndef RAMET_ROOTFS_H
#define RAMET_ROOTFS_H

/* Makes the disk the root, and gives the initramfs's memory back. */
void rootfs_switch(const char *device);

#endif
