/* A byte queue over storage that somebody else owns. */
#ifndef RAMET_RING_H
#define RAMET_RING_H

#include <stdint.h>
#include <string.h>

struct ring {
	uint32_t start, length;
};

/* The longest stretch of contents that lies in one piece. */
static inline uint32_t ring_peek(const struct ring *r, uint32_t size)
{
	uint32_t to_end = size - r->start;
	return r->length < to_end ? r->length : to_end;
}

static inline void ring_take(struct ring *r, uint32_t size, uint32_t n)
{
	r->start = (r->start + n) % size;
	r->length -= n;
	if (r->length == 0)
		r->start = 0;
}

/* Adds all n bytes, n <= size; what was there longest makes room when there is none. */
static inline void ring_push(struct ring *r, uint8_t *store, uint32_t size, const uint8_t *p, uint32_t n)
{
	if (r->length + n > size)
		ring_take(r, size, r->length + n - size);
	uint32_t at = (r->start + r->length) % size;
	uint32_t first = n < size - at ? n : size - at;
	memcpy(store + at, p, first);
	memcpy(store, p + first, n - first);
	r->length += n;
}

#endif
