/* Processes: how they start, end, are killed, and what is done with what they write. */
#ifndef RAMET_PROC_H
#define RAMET_PROC_H

#include "params.h"
#include "slot.h"

/* The answers go to the port. */
void proc_exec(uint32_t stream, struct request *r);
void proc_attach(uint32_t stream, const struct request *r);
void proc_signal(uint32_t stream, const struct request *r);
void proc_resize(uint32_t stream, const struct request *r);
void proc_forget(uint32_t stream, const struct request *r);

/* The host no longer follows s. */
void proc_leave(struct slot *s);
/* The host is gone for good, but its machine goes on in a fork or after a hibernation: s lives on as if it had been started with DETACH. */
void proc_keep(struct slot *s);
/* A child has ended: ours, or an orphan that PID 1 inherited. */
void proc_reaped(pid_t pid, int status);
/* Keep the last of what a process writes while nobody is attached. */
void proc_absorb(struct slot *s);
/* The answer is sent: the slot is free, or a finished detached process rests in it. */
void proc_ended(struct slot *s);
void proc_end_result(const struct slot *s, enum end_kind *kind, int *code);

/* Carries out what is due; milliseconds to the next deadline, or -1. */
int proc_deadlines(void);
void proc_kill_all(void);

/* Open on /dev/null since before the guest could have taken it away. */
extern int null_fd;

#endif
