/* The parameters of an OPEN, decoded in place. Pure. */
#ifndef RAMET_PARAMS_H
#define RAMET_PARAMS_H

#include <stdbool.h>
#include <stddef.h>
#include "wire.h"

enum {
	PARAM_HEADER = 8,
	VECTOR_MAX = PARAMS_MAX / PARAM_HEADER + 1,
	ENV_DEFAULTS = 8, /* room that exec.c needs after the given variables */
};

struct request {
	uint16_t op, flags;
	uint32_t given; /* bit (1 << tag) for each parameter that was there */
	int argc, envc;
	char **argv, **envp; /* both end with NULL */
	const char *cwd, *user, *name, *host;
	const char *hostname, *machine_id, *generation;
	const uint8_t *entropy;
	uint32_t entropy_size;
	uint64_t timeout_ms, grace_ms, time_ns;
	uint32_t rows, cols, process, signal, port;
};

/* buf is the whole of the OPEN's payloads and needs one spare byte after len; strings are ended in place. Returns NULL, or what is wrong. */
const char *params_decode(struct request *r, uint8_t *buf, size_t len);

static inline bool given(const struct request *r, enum tag tag) { return r->given >> tag & 1; }

#endif
