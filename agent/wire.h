/* The numbers of PROTOCOL.md, and little-endian integers. */
#ifndef RAMET_WIRE_H
#define RAMET_WIRE_H

#include <stdint.h>
#include <string.h>

#define PROTOCOL_VERSION 2
#ifndef AGENT_VERSION
#define AGENT_VERSION "0.1.0"
#endif

enum {
	FRAME_HEADER = 12,
	FRAME_PAYLOAD_MAX = 32756,
	FRAME_MAX = FRAME_HEADER + FRAME_PAYLOAD_MAX,
	PARAMS_MAX = 256 * 1024,
	CREDIT_START = 65536,
	NONCE_SIZE = 16,
	MESSAGE_MAX = 4096,
	NAME_MAX_BYTES = 64,
	ENTROPY_MAX = 512,
	HOSTNAME_MAX = 64,
	MACHINE_ID_SIZE = 32,
	GENERATION_SIZE = 36,
};

enum frame_type { T_SYNC = 1, T_OPEN, T_DATA, T_EOF, T_CREDIT, T_CLOSE, T_STARTED, T_END };
enum { FLAG_MORE = 1 };

enum end_kind { END_EXITED, END_SIGNALED, END_FAILED, END_TIMEOUT, END_DETACHED };

enum op {
	OP_PING = 1, OP_EXEC, OP_ATTACH, OP_LIST, OP_SIGNAL, OP_RESIZE, OP_FORGET, OP_METRICS, OP_DIAL, OP_POWEROFF, OP_QUIESCE, OP_RESUME, OP_IDENTIFY,
	OP_LAST,
};
enum { OPEN_PTY = 1, OPEN_DETACH = 2, OPEN_STDIN = 4, OPEN_BUILTIN = 8, OPEN_FLAGS = 15 };

enum tag {
	TAG_ARG = 1, TAG_ENV, TAG_CWD, TAG_USER, TAG_TIMEOUT, TAG_ROWS, TAG_COLS, TAG_PROCESS, TAG_SIGNAL, TAG_NAME, TAG_HOST, TAG_PORT, TAG_GRACE,
	TAG_TIME, TAG_ENTROPY, TAG_HOSTNAME, TAG_MACHINE_ID, TAG_GENERATION,
	TAG_LAST,
};

static inline uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t get32(const uint8_t *p) { return get16(p) | (uint32_t)get16(p + 2) << 16; }
static inline uint64_t get64(const uint8_t *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }
static inline void put16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)v; p[1] = (uint8_t)(v >> 8); }
static inline void put32(uint8_t *p, uint32_t v) { put16(p, (uint16_t)v); put16(p + 2, (uint16_t)(v >> 16)); }

#endif
