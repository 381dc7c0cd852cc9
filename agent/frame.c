#include "frame.h"

/* The host's 32,780 zeros leave at least 13 after the longest frame that they had to fill up, so a run of 12 must do. */
enum { ZERO_RUN = 12 };

void framer_reset(struct framer *f, bool boundary)
{
	f->start = f->end = 0;
	f->lost = true;
	f->zeros = boundary ? ZERO_RUN : 0;
}

void framer_lose(struct framer *f)
{
	f->lost = true;
	f->zeros = 0;
}

void framer_restart(struct framer *f)
{
	f->lost = true;
	f->zeros = ZERO_RUN;
}

uint8_t *framer_space(struct framer *f, size_t *room)
{
	if (f->start == f->end) {
		f->start = f->end = 0;
	} else if (f->start >= FRAME_MAX) {
		memmove(f->buf, f->buf + f->start, f->end - f->start);
		f->end -= f->start;
		f->start = 0;
	}
	*room = sizeof f->buf - f->end;
	return f->buf + f->end;
}

void framer_filled(struct framer *f, size_t n)
{
	f->end += (uint32_t)n;
}

static bool is_sync(const uint8_t *p)
{
	return p[0] == T_SYNC && p[1] == 0 && get16(p + 2) == 0 && get32(p + 4) == 0 && get32(p + 8) == NONCE_SIZE;
}

/* True when a frame's header starts at f->start, or might once more bytes are there. */
static bool find_start(struct framer *f)
{
	for (; f->start < f->end; f->start++) {
		const uint8_t *p = f->buf + f->start;
		if (*p == 0) {
			f->zeros += f->zeros < ZERO_RUN;
			continue;
		}
		if (!f->lost)
			return true;
		if (f->zeros >= ZERO_RUN && (f->end - f->start < FRAME_HEADER || is_sync(p)))
			return true;
		f->zeros = 0;
	}
	return false;
}

enum framer_result framer_next(struct framer *f, struct frame *out)
{
	if (!find_start(f) || f->end - f->start < FRAME_HEADER)
		return FRAMER_MORE;
	const uint8_t *p = f->buf + f->start;
	uint32_t length = get32(p + 8);
	if (get16(p + 2) != 0 || length > FRAME_PAYLOAD_MAX || (p[0] == T_SYNC && !is_sync(p))) {
		f->start++;
		framer_lose(f);
		return FRAMER_BAD;
	}
	if (f->end - f->start < FRAME_HEADER + length)
		return FRAMER_MORE;
	/* Zeros follow a frame only when somebody starts anew, and then some of them may have filled this one up: half of it could be made up. */
	uint32_t next = f->start + FRAME_HEADER + length;
	if (p[0] != T_SYNC && next < f->end && f->buf[next] == 0) {
		f->start = next;
		framer_lose(f);
		return FRAMER_BAD;
	}
	*out = (struct frame){p[0], p[1], get32(p + 4), length, p + FRAME_HEADER};
	f->start = next;
	f->lost = false;
	f->zeros = 0;
	return FRAMER_FRAME;
}

void frame_header(uint8_t *p, enum frame_type type, uint8_t flags, uint32_t stream, uint32_t length)
{
	p[0] = (uint8_t)type;
	p[1] = flags;
	put16(p + 2, 0);
	put32(p + 4, stream);
	put32(p + 8, length);
}
