#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>
#include "dial.h"
#include "list.h"
#include "port.h"
#include "proc.h"
#include "pump.h"

enum {
	CREDIT_BATCH = 16 * 1024,
	/* Data frames leave this much of the port's buffer to answers and ends, and are not made smaller than it. */
	ROOM_KEPT = 8 * 1024,
	ROOM_WANTED = 24 * 1024, /* with this much, nobody was held back */
	INTERRUPT_EOF = 4, /* ^D */
};

/* --- from the host --- */

/* How much of p was taken: n, less, or (after an error) all of it, because nobody will ever read it. */
static uint32_t write_some(struct slot *s, const uint8_t *p, uint32_t n)
{
	if (s->in.done)
		return n;
	if (s->connecting || s->in.fd < 0)
		return 0;
	ssize_t done = s->kind == CONNECTION ? send(s->in.fd, p, n, MSG_NOSIGNAL) : write(s->in.fd, p, n);
	if (done >= 0)
		return (uint32_t)done;
	if (errno == EAGAIN || errno == EINTR)
		return 0;
	slot_close_input(s);
	return n;
}

static void finish_input(struct slot *s)
{
	if (s->kind == CONNECTION) {
		shutdown(s->in.fd, SHUT_WR);
		slot_close_input(s);
	} else if (s->pty) {
		/* A terminal cannot be half closed; typing the end of file is the nearest thing. */
		uint8_t end = INTERRUPT_EOF;
		(void)!write(s->in.fd, &end, 1);
		s->in.done = true;
	} else {
		slot_close_input(s);
	}
}

static void drain_pending(struct slot *s)
{
	struct ring *r = &s->in.pending;
	while (r->length) {
		uint32_t n = ring_peek(r, PENDING_SIZE);
		uint32_t done = write_some(s, slot_pending(s) + r->start, n);
		if (s->in.done && r->length == 0)
			return; /* an error emptied it */
		ring_take(r, PENDING_SIZE, done);
		s->in.consumed += done;
		if (done < n)
			return;
	}
	if (s->in.eof && !s->in.done && !s->connecting)
		finish_input(s);
}

bool pump_data(struct slot *s, const uint8_t *p, uint32_t n)
{
	struct input *in = &s->in;
	if (n > in->window)
		return false;
	in->window -= n;
	uint32_t done = 0;
	if (in->eof)
		done = n;
	else if (in->pending.length == 0)
		done = write_some(s, p, n);
	in->consumed += done;
	if (done < n)
		ring_push(&in->pending, slot_pending(s), PENDING_SIZE, p + done, n - done);
	return true;
}

void pump_eof(struct slot *s)
{
	s->in.eof = true;
	if (!s->in.done && !s->connecting && s->in.pending.length == 0)
		finish_input(s);
}

bool pump_credit(struct slot *s, int channel, uint32_t n)
{
	struct output *o = &s->out[channel - 1];
	if (n > UINT32_MAX - o->credit)
		return false;
	o->credit += n;
	return true;
}

/* --- polling --- */

static struct { struct slot *slot; int what; } polled[PUMP_POLL_MAX];
enum { INPUT = 2, BOTH = 3 };

static bool wants_read(const struct slot *s, int c)
{
	const struct output *o = &s->out[c];
	return o->fd >= 0 && !o->eof && !o->ready && !s->connecting && (s->stream == 0 || (o->credit > 0 && o->kept.length == 0));
}

static bool wants_write(const struct slot *s)
{
	return s->connecting || (s->in.fd >= 0 && !s->in.done && s->in.pending.length > 0);
}

static int add(struct pollfd *p, int n, struct slot *s, int what, int fd, int events)
{
	p[n] = (struct pollfd){.fd = fd, .events = (short)events};
	polled[n].slot = s;
	polled[n].what = what;
	return n + 1;
}

int pump_poll(struct pollfd *p)
{
	int n = 0;
	for (struct slot *s = slots; s < slots + slots_top; s++) {
		if (s->kind != PROCESS && s->kind != CONNECTION)
			continue;
		bool write = wants_write(s);
		for (int c = 0; c < 2; c++) {
			bool shared = c == 0 && s->out[0].fd == s->in.fd;
			if (wants_read(s, c)) {
				n = add(p, n, s, shared && write ? BOTH : c, s->out[c].fd, shared && write ? POLLIN | POLLOUT : POLLIN);
				write = write && !shared;
			}
		}
		if (write)
			n = add(p, n, s, INPUT, s->in.fd, POLLOUT);
	}
	return n;
}

static void readable(struct slot *s, int c, short revents)
{
	struct output *o = &s->out[c];
	/* A pipe that is empty and has lost its writers need not be read to be known as finished. */
	if (!(revents & POLLIN) && s->kind == PROCESS)
		o->eof = true;
	else
		o->ready = true;
	if (s->stream == 0)
		proc_absorb(s);
}

void pump_polled(const struct pollfd *p, int n)
{
	for (int i = 0; i < n; i++) {
		struct slot *s = polled[i].slot;
		short revents = p[i].revents;
		int what = polled[i].what;
		/* The slot may have changed its owner since: then the descriptor is another one, or none. */
		int fd = what == INPUT ? s->in.fd : s->out[what == BOTH ? 0 : what].fd;
		if (revents == 0 || s->kind == FREE || fd != p[i].fd)
			continue;
		if (s->connecting) {
			dial_connected(s);
			continue;
		}
		if (what != INPUT && (revents & (POLLIN | POLLHUP | POLLERR)))
			readable(s, what == BOTH ? 0 : what, revents);
		if ((what == INPUT || what == BOTH) && (revents & (POLLOUT | POLLERR | POLLHUP)))
			drain_pending(s);
	}
}

/* --- to the host: each of these makes at most one frame and says whether it did --- */

static bool emit_eof(struct slot *s, int c)
{
	s->out[c].eof_sent = true;
	return port_frame(T_EOF, (uint8_t)(c + 1), s->stream, NULL, 0);
}

static uint32_t data_limit(const struct output *o)
{
	uint32_t n = port_room() - ROOM_KEPT;
	if (n > FRAME_PAYLOAD_MAX)
		n = FRAME_PAYLOAD_MAX;
	return n < o->credit ? n : o->credit;
}

static bool emit_kept(struct slot *s, int c)
{
	struct output *o = &s->out[c];
	uint32_t n = ring_peek(&o->kept, KEPT_SIZE), limit = data_limit(o);
	if (n > limit)
		n = limit;
	if (n == 0 || !port_frame(T_DATA, (uint8_t)(c + 1), s->stream, slot_kept(s, c) + o->kept.start, n))
		return false;
	ring_take(&o->kept, KEPT_SIZE, n);
	o->credit -= n;
	return true;
}

static bool emit_read(struct slot *s, int c)
{
	struct output *o = &s->out[c];
	uint32_t limit = data_limit(o);
	bool ended = s->kind == PROCESS && s->state != RUNNING;
	if (ended && limit > o->left)
		limit = o->left;
	if (limit == 0)
		return false;
	uint8_t *p = port_reserve(FRAME_HEADER + limit);
	ssize_t n = read(o->fd, p + FRAME_HEADER, limit);
	if (n > 0) {
		frame_header(p, T_DATA, (uint8_t)(c + 1), s->stream, (uint32_t)n);
		port_commit(FRAME_HEADER + (uint32_t)n);
		o->credit -= (uint32_t)n;
		o->left -= ended ? (uint32_t)n : 0;
		o->eof = ended && o->left == 0;
		o->ready = ended || (uint32_t)n == limit;
		return true;
	}
	if (n < 0 && errno == EINTR)
		return false;
	o->ready = false;
	/* Once the process has ended, a pause is the end. */
	o->eof = ended || n == 0 || errno != EAGAIN;
	if (n < 0 && errno != EAGAIN && s->kind == CONNECTION)
		s->error = errno;
	return false;
}

static bool emit_output(struct slot *s, int c)
{
	struct output *o = &s->out[c];
	if (!o->exists || o->eof_sent)
		return false;
	if (port_room() > 2 * ROOM_KEPT && o->credit > 0) {
		if (o->kept.length)
			return emit_kept(s, c);
		if (o->ready && !o->eof && emit_read(s, c))
			return true;
	}
	return o->eof && o->kept.length == 0 && emit_eof(s, c);
}

static bool emit_started(struct slot *s)
{
	uint8_t p[8];
	put32(p, s->kind == PROCESS ? s->id : 0);
	put32(p + 4, s->kind == PROCESS ? (uint32_t)s->pid : 0);
	s->started_due = false;
	return port_frame(T_STARTED, 0, s->stream, p, sizeof p);
}

static bool emit_credit(struct slot *s)
{
	uint8_t p[4];
	put32(p, s->in.consumed);
	s->in.window += s->in.consumed;
	s->in.consumed = 0;
	return port_frame(T_CREDIT, 0, s->stream, p, sizeof p);
}

static bool outputs_sent(const struct slot *s)
{
	return (!s->out[0].exists || s->out[0].eof_sent) && (!s->out[1].exists || s->out[1].eof_sent);
}

static bool emit_end(struct slot *s)
{
	enum end_kind kind = END_EXITED;
	int code = 0;
	const char *message = NULL;
	if (s->kind == PROCESS) {
		proc_end_result(s, &kind, &code);
	} else if (s->error) {
		kind = END_FAILED;
		code = s->error;
		message = strerror(code);
	}
	port_end(s->stream, kind, code, message);
	if (s->kind == PROCESS)
		proc_ended(s);
	else
		slot_free(s);
	return true;
}

static bool ended(const struct slot *s)
{
	if (s->kind == PROCESS)
		return s->state != RUNNING && outputs_sent(s);
	return outputs_sent(s) && (s->in.done || s->error);
}

static bool emit(struct slot *s)
{
	if (s->kind == FREE || s->stream == 0 || s->connecting)
		return false;
	if (s->kind == LISTING)
		return list_emit(s);
	if (s->started_due)
		return emit_started(s);
	if (s->in.consumed >= CREDIT_BATCH && !s->in.eof)
		return emit_credit(s);
	int first = s->turn ^= 1;
	if (emit_output(s, first) || emit_output(s, !first))
		return true;
	return ended(s) && emit_end(s);
}

bool pump_emit(void)
{
	static int next;
	/* A whole turn without a frame means that nobody has anything to say. */
	for (int silent = 0; silent <= slots_top && port_room() > ROOM_KEPT; silent++) {
		if (next >= slots_top)
			next = 0;
		if (emit(&slots[next++]))
			silent = 0;
	}
	return port_room() < ROOM_WANTED;
}
