#ifndef RAMET_MOUNTS_H
#define RAMET_MOUNTS_H

/* /proc, /sys and /dev, in the initramfs. */
void mounts_early(void);
/* Takes them along to the new root. */
void mounts_move(const char *root);
/* What programs expect besides, in the root as it will stay. */
void mounts_late(void);
/* The calling process, and so its children, into the workload's control group. */
void mounts_workload(void);

#endif
