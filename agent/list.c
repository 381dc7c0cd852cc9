#include <errno.h>
#include <stdio.h>
#include "list.h"
#include "port.h"

enum { RECORD_MAX = COMMAND_MAX + NAME_MAX_BYTES + 128, FRAME_LIMIT = 8 * RECORD_MAX };

void list_open(uint32_t stream)
{
	if (!slot_new(LISTING, stream))
		port_end(stream, END_FAILED, EAGAIN, "too many streams");
}

static struct slot *next_process(uint32_t from)
{
	struct slot *next = NULL;
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind == PROCESS && !s->builtin && !s->dying && s->id >= from && (!next || s->id < next->id))
			next = s;
	return next;
}

static uint32_t record(char *p, const struct slot *s)
{
	static const char *const states[] = {"running", "exited", "signaled", "timeout"};
	int n = snprintf(p, RECORD_MAX, "%u %d %s %d %llu %d %d %s", s->id, s->pid, states[s->state], s->code,
			 (unsigned long long)s->started_ms, s->detach, s->stream != 0, s->name);
	n += snprintf(p + n + 1, (size_t)(RECORD_MAX - n - 1), "%s", s->command) + 1;
	return (uint32_t)n + 1;
}

bool list_emit(struct slot *s)
{
	struct output *o = &s->out[0];
	struct slot *next = next_process(s->next_id);
	if (!next) {
		uint32_t stream = s->stream;
		slot_free(s);
		port_frame(T_EOF, 1, stream, NULL, 0);
		return port_end(stream, END_EXITED, 0, NULL);
	}
	if (o->credit < RECORD_MAX || port_room() < 2 * FRAME_LIMIT)
		return false;
	uint32_t limit = o->credit < FRAME_LIMIT ? o->credit : FRAME_LIMIT, n = 0;
	uint8_t *p = port_reserve(FRAME_HEADER + limit);
	for (; next && limit - n >= RECORD_MAX; next = next_process(s->next_id)) {
		n += record((char *)p + FRAME_HEADER + n, next);
		s->next_id = next->id + 1;
	}
	frame_header(p, T_DATA, 1, s->stream, n);
	port_commit(FRAME_HEADER + n);
	o->credit -= n;
	return true;
}
