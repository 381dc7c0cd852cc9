/* The table of everything that may have something to say: processes, dialled connections, listings. */
#ifndef RAMET_SLOT_H
#define RAMET_SLOT_H

#include <stdbool.h>
#include <sys/types.h>
#include "ring.h"
#include "wire.h"

enum { SLOTS = 256, KEPT_SIZE = 65536, PENDING_SIZE = 2 * CREDIT_START, COMMAND_MAX = 1000 };

enum slot_kind { FREE, PROCESS, CONNECTION, LISTING };
enum process_state { RUNNING, EXITED, SIGNALED, TIMED_OUT };

/* From the process to the host. */
struct output {
	int fd;          /* -1: there is none */
	bool exists;     /* the channel is one of this slot's */
	bool ready;      /* readable when last heard of */
	bool eof;        /* nothing more will be read from fd */
	bool eof_sent;
	uint32_t credit;
	uint32_t left;   /* after the exit: how much of what is in the pipe was the process's own */
	struct ring kept; /* written while nobody was attached */
};

/* From the host to the process. */
struct input {
	int fd;
	bool eof;             /* the host will send no more */
	bool done;            /* nothing more will be written: all that comes is thrown away */
	uint32_t window;      /* what the host may still send */
	uint32_t consumed;    /* what it gets back with the next CREDIT */
	struct ring pending;
};

struct slot {
	enum slot_kind kind;
	uint32_t stream; /* 0: nobody is attached */
	bool started_due;
	uint8_t turn;    /* which output says something first */
	struct input in;
	struct output out[2];
	uint64_t deadline; /* of the process or of the connection's opening; 0: none. Milliseconds, as now_ms() */

	/* PROCESS */
	uint32_t id;
	pid_t pid;       /* also its group; 0 once reaped */
	bool pty, detach, builtin;
	bool dying;      /* nobody wants to know how it ends */
	bool timed_out;
	uint8_t kills;   /* how far the deadline's escalation has come */
	enum process_state state;
	int code;
	uint64_t started_ms;
	char name[NAME_MAX_BYTES + 1];
	char command[COMMAND_MAX];

	/* CONNECTION */
	bool connecting;
	int error;

	/* LISTING */
	uint32_t next_id;
};

extern struct slot slots[SLOTS];
extern int slots_top; /* no slot from here on is in use */

void slots_begin(void);
/* A zeroed slot, or NULL. The place of the finished detached process that is oldest is taken when there is no other. */
struct slot *slot_new(enum slot_kind kind, uint32_t stream);
void slot_free(struct slot *s);
struct slot *slot_of_stream(uint32_t stream);
struct slot *slot_of_process(uint32_t id);
struct slot *slot_of_pid(pid_t pid);

/* A new stream on the slot, with fresh credit. */
void slot_attach(struct slot *s, uint32_t stream);
void slot_close_input(struct slot *s);
void slot_close(struct slot *s);

uint8_t *slot_kept(const struct slot *s, int channel);
uint8_t *slot_pending(const struct slot *s);

uint64_t now_ms(void);
/* Not before that many milliseconds from now, as the clock only ticks; a time beyond any machine's life is as good as none. */
uint64_t deadline_after(uint64_t ms);

#endif
