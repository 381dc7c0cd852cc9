/* Bytes in, frames out. Pure: no I/O, no allocation. */
#ifndef RAMET_FRAME_H
#define RAMET_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include "wire.h"

struct frame {
	uint8_t type, flags;
	uint32_t stream, length;
	const uint8_t *payload; /* valid until the next call on the framer */
};

struct framer {
	uint32_t start, end; /* what is in buf and not yet taken */
	uint32_t zeros;      /* while lost: zero bytes seen in a row */
	bool lost;           /* only a SYNC among zero bytes is of interest */
	uint8_t buf[2 * FRAME_MAX];
};

enum framer_result { FRAMER_MORE, FRAMER_FRAME, FRAMER_BAD };

/* A SYNC right at the start is accepted when `boundary`, else only after zeros. */
void framer_reset(struct framer *f, bool boundary);
/* Forget where frames begin (the caller saw nonsense in one): as FRAMER_BAD does by itself. */
void framer_lose(struct framer *f);
/* A new connection starts behind what has been taken: its SYNC may come at once, or be there already. */
void framer_restart(struct framer *f);
uint8_t *framer_space(struct framer *f, size_t *room);
void framer_filled(struct framer *f, size_t n);
/* FRAMER_BAD: the bytes were no frame; the framer is now lost and the connection's state is void. */
enum framer_result framer_next(struct framer *f, struct frame *out);

void frame_header(uint8_t *p, enum frame_type type, uint8_t flags, uint32_t stream, uint32_t length);

#endif
