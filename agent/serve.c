#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <unistd.h>
#include "dial.h"
#include "identity.h"
#include "list.h"
#include "metrics.h"
#include "params.h"
#include "port.h"
#include "power.h"
#include "proc.h"
#include "pump.h"
#include "serve.h"

enum { BOOT_ID = 16, ANSWER_ROOM = 8 * 1024 };

static uint8_t boot_id[BOOT_ID];

/* The one OPEN that is being put together. */
static struct {
	uint32_t stream; /* 0: none */
	bool refused;    /* its other parts are only to be skipped */
	uint32_t length;
	uint8_t buf[PARAMS_MAX + 1];
} opening;

static int digit(char c)
{
	return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

void serve_begin(int proc_fd)
{
	char text[64] = "";
	int fd = openat(proc_fd, "sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (read(fd, text, sizeof text - 1) < 0)
		text[0] = 0;
	close(fd);
	size_t nibble = 0;
	for (char *p = text; *p && nibble < 2 * BOOT_ID; p++)
		if (digit(*p) >= 0) {
			boot_id[nibble / 2] = (uint8_t)(boot_id[nibble / 2] << 4 | digit(*p));
			nibble++;
		}
}

static void leave(struct slot *s)
{
	if (s->kind == PROCESS)
		proc_leave(s);
	else
		slot_free(s);
}

void serve_disconnect(void)
{
	bool quiet = port_quiet;
	opening.stream = 0;
	port_quiet = false;
	port_forget_output();
	for (int i = slots_top - 1; i >= 0; i--) {
		if (i >= slots_top || slots[i].kind == FREE || slots[i].stream == 0)
			continue;
		if (quiet && slots[i].kind == PROCESS)
			proc_keep(&slots[i]);
		else
			leave(&slots[i]);
	}
}

/* The host broke the protocol: the stream pays for it, or, when there is none to name, the connection. */
static void violation(uint32_t stream, const char *message)
{
	struct slot *s = stream ? slot_of_stream(stream) : NULL;
	if (s)
		leave(s);
	if (stream)
		port_end(stream, END_FAILED, EPROTO, message);
}

static void lost(void)
{
	framer_lose(&port_in);
	serve_disconnect();
}

static void sync_frame(const struct frame *f)
{
	uint8_t p[NONCE_SIZE + 4 + BOOT_ID + sizeof AGENT_VERSION];
	memcpy(p, f->payload, NONCE_SIZE);
	put32(p + NONCE_SIZE, PROTOCOL_VERSION);
	memcpy(p + NONCE_SIZE + 4, boot_id, BOOT_ID);
	memcpy(p + NONCE_SIZE + 4 + BOOT_ID, AGENT_VERSION, sizeof AGENT_VERSION - 1);
	serve_disconnect();
	port_frame(T_SYNC, 0, 0, p, sizeof p - 1);
}

static void carry_out(uint32_t stream, struct request *r)
{
	switch (r->op) {
	case OP_PING: port_end(stream, END_EXITED, 0, NULL); break;
	case OP_EXEC: proc_exec(stream, r); break;
	case OP_ATTACH: proc_attach(stream, r); break;
	case OP_LIST: list_open(stream); break;
	case OP_SIGNAL: proc_signal(stream, r); break;
	case OP_RESIZE: proc_resize(stream, r); break;
	case OP_FORGET: proc_forget(stream, r); break;
	case OP_METRICS: metrics_answer(stream); break;
	case OP_DIAL: dial_open(stream, r); break;
	case OP_POWEROFF:
		port_end(stream, END_EXITED, 0, NULL);
		power_off_soon(r->grace_ms);
		break;
	case OP_QUIESCE:
		port_end(stream, END_EXITED, 0, NULL);
		port_quiet = true;
		break;
	case OP_RESUME: port_end(stream, END_EXITED, 0, NULL); break;
	case OP_IDENTIFY: identity_take(stream, r); break;
	}
}

static void open_frame(const struct frame *f)
{
	if (opening.stream != f->stream) {
		opening.stream = f->stream;
		opening.length = 0;
		opening.refused = false;
		if (slot_of_stream(f->stream)) {
			violation(f->stream, "the stream is in use");
			opening.refused = true;
		}
	}
	if (!opening.refused && f->length > PARAMS_MAX - opening.length) {
		violation(f->stream, "the parameters are too long");
		opening.refused = true;
	}
	if (!opening.refused) {
		memcpy(opening.buf + opening.length, f->payload, f->length);
		opening.length += f->length;
	}
	if (f->flags & FLAG_MORE)
		return;
	opening.stream = 0;
	if (opening.refused)
		return;
	struct request r;
	const char *wrong = params_decode(&r, opening.buf, opening.length);
	if (wrong)
		port_end(f->stream, END_FAILED, EPROTO, wrong);
	else
		carry_out(f->stream, &r);
}

/* A stream that has ended may still get what the host sent before it knew: s is NULL then. */
static void stream_frame(const struct frame *f, struct slot *s)
{
	bool good = true;
	switch (f->type) {
	case T_DATA:
		good = f->flags == 0 && (!s || pump_data(s, f->payload, f->length));
		break;
	case T_EOF:
		good = f->flags == 0 && f->length == 0;
		if (good && s)
			pump_eof(s);
		break;
	case T_CREDIT:
		good = (f->flags == 1 || f->flags == 2) && f->length == 4 && (!s || pump_credit(s, f->flags, get32(f->payload)));
		break;
	case T_CLOSE:
		good = f->flags == 0 && f->length == 0;
		if (good && s)
			leave(s);
		break;
	}
	if (!good)
		violation(f->stream, "a frame that breaks the rules of the protocol");
}

static bool is_resume(const struct frame *f)
{
	return f->type == T_OPEN && f->flags == 0 && f->stream != 0 && f->length >= 4 && get16(f->payload) == OP_RESUME;
}

static void handle(const struct frame *f)
{
	if (f->type == T_SYNC) {
		sync_frame(f);
		return;
	}
	if (port_quiet) {
		if (!is_resume(f)) {
			lost();
			return;
		}
		port_quiet = false;
	}
	if (f->stream == 0 || f->type < T_OPEN || f->type > T_CLOSE) {
		if (f->stream && slot_of_stream(f->stream))
			violation(f->stream, "a frame of an unknown type");
		else
			lost();
		return;
	}
	if (opening.stream && (f->type != T_OPEN || f->stream != opening.stream)) {
		if (!opening.refused)
			violation(opening.stream, "the parameters are cut off");
		opening.stream = 0;
	}
	if (f->type != T_OPEN)
		stream_frame(f, slot_of_stream(f->stream));
	else if (f->flags & ~FLAG_MORE)
		violation(f->stream, "a frame with an unknown flag");
	else
		open_frame(f);
}

bool serve_input(void)
{
	while (port_room() >= ANSWER_ROOM) {
		struct frame f;
		switch (framer_next(&port_in, &f)) {
		case FRAMER_MORE:
			return false;
		case FRAMER_BAD:
			serve_disconnect();
			break;
		case FRAMER_FRAME:
			handle(&f);
			break;
		}
	}
	return true;
}
