/* How the guest gives memory back to the host: three builtins, and where they look. */
#ifndef RAMET_RECLAIM_H
#define RAMET_RECLAIM_H

/* Directories open on /proc and /sys since before an image could have laid anything over them; -1 beside an ordinary system. */
extern int reclaim_proc, reclaim_sys;

void reclaim_begin(int proc_fd, int sys_fd);
/* In the child that becomes a builtin: close all but the standard descriptors and these two. */
void reclaim_close_others(void);

#endif
