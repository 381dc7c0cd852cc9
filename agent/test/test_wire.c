/* The frame parser and the parameters. */
#include <stdlib.h>
#include "../frame.h"
#include "../params.h"
#include "../ring.h"
#include "check.h"

static struct framer framer;

static void feed(const void *p, size_t n)
{
	size_t room;
	uint8_t *to = framer_space(&framer, &room);
	CHECK(room >= n);
	if (n)
		memcpy(to, p, n);
	framer_filled(&framer, n);
}

static void feed_frame(int type, int flags, uint32_t stream, const void *payload, uint32_t length)
{
	uint8_t header[FRAME_HEADER];
	frame_header(header, type, (uint8_t)flags, stream, length);
	feed(header, sizeof header);
	feed(payload, length);
}

static void feed_zeros(size_t n)
{
	static const uint8_t zeros[1000];
	struct frame f;
	/* As the port does: what is complete is taken out between reads. */
	for (; n > 0; n -= n < sizeof zeros ? n : sizeof zeros) {
		feed(zeros, n < sizeof zeros ? n : sizeof zeros);
		while (n > sizeof zeros && framer_next(&framer, &f) != FRAMER_MORE)
			;
	}
}

static const char nonce[NONCE_SIZE + 1] = "0123456789abcdef";

/* The next frame is the SYNC; what the zeros made of unfinished frames comes before it. */
static int finds_sync(void)
{
	struct frame f;
	for (int i = 0; i < 10; i++) {
		enum framer_result r = framer_next(&framer, &f);
		if (r == FRAMER_MORE)
			return 0;
		if (r == FRAMER_FRAME && f.type == T_SYNC)
			return f.length == NONCE_SIZE && memcmp(f.payload, nonce, NONCE_SIZE) == 0;
	}
	return 0;
}

static void start(void)
{
	framer_reset(&framer, true);
	feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
	CHECK(finds_sync());
}

static void test_frames(void)
{
	struct frame f;
	start();
	CHECK(framer_next(&framer, &f) == FRAMER_MORE);
	feed_frame(T_DATA, 0, 7, "hello", 5);
	feed_frame(T_EOF, 0, 0x01020304, NULL, 0);
	CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.type == T_DATA && f.stream == 7 && f.length == 5 && memcmp(f.payload, "hello", 5) == 0);
	CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.type == T_EOF && f.stream == 0x01020304 && f.length == 0);
	CHECK(framer_next(&framer, &f) == FRAMER_MORE);
}

/* What the zeros of a new connection filled up is not delivered as if the old one had sent it. */
static void test_filled_up(void)
{
	struct frame f;
	start();
	uint8_t header[FRAME_HEADER];
	frame_header(header, T_DATA, 0, 7, 100);
	feed(header, sizeof header);
	feed("half", 4);
	CHECK(framer_next(&framer, &f) == FRAMER_MORE);
	feed_zeros(1000);
	CHECK(framer_next(&framer, &f) == FRAMER_BAD);
	feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
	CHECK(finds_sync());
}

static void test_byte_by_byte(void)
{
	uint8_t bytes[FRAME_HEADER + 300];
	struct frame f;
	start();
	frame_header(bytes, T_DATA, 0, 9, 300);
	for (int i = 0; i < 300; i++)
		bytes[FRAME_HEADER + i] = (uint8_t)i;
	for (int round = 0; round < 1000; round++) {
		for (size_t i = 0; i < sizeof bytes; i++) {
			if (framer_next(&framer, &f) != FRAMER_MORE)
				CHECK(!"too early");
			feed(bytes + i, 1);
		}
		if (framer_next(&framer, &f) != FRAMER_FRAME || memcmp(f.payload, bytes + FRAME_HEADER, 300) != 0)
			CHECK(!"the frame");
	}
	CHECK(framer_next(&framer, &f) == FRAMER_MORE);
}

static void test_largest(void)
{
	static uint8_t payload[FRAME_PAYLOAD_MAX + 1];
	struct frame f;
	start();
	feed_frame(T_DATA, 0, 1, payload, FRAME_PAYLOAD_MAX);
	CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.length == FRAME_PAYLOAD_MAX);
	feed_frame(T_DATA, 0, 1, payload, 0);
	CHECK(framer_next(&framer, &f) == FRAMER_FRAME);
	uint8_t header[FRAME_HEADER];
	frame_header(header, T_DATA, 0, 1, FRAME_PAYLOAD_MAX + 1);
	feed(header, sizeof header);
	CHECK(framer_next(&framer, &f) == FRAMER_BAD);
	CHECK(framer.lost);
}

static void test_before_sync(void)
{
	struct frame f;
	framer_reset(&framer, true);
	feed_frame(T_OPEN, 0, 1, "\1\0\0\0", 4);
	CHECK(framer_next(&framer, &f) == FRAMER_MORE);
	feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
	CHECK(framer_next(&framer, &f) == FRAMER_MORE); /* no zeros before it */
	feed_zeros(32780);
	feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
	CHECK(finds_sync());
}

/* Wherever in a frame the old connection ended, the zeros and a SYNC get through. */
static void test_resync(void)
{
	static uint8_t bytes[FRAME_MAX];
	static const uint32_t lengths[] = {0, 1, 4, 16, 255, 256, 4095, 32755, 32756};
	for (int type = 1; type <= 255; type += type < 9 ? 1 : 41)
		for (size_t l = 0; l < sizeof lengths / sizeof *lengths; l++)
			for (size_t cut = 0; cut <= FRAME_HEADER + lengths[l]; cut += cut < 40 ? 1 : 997) {
				memset(bytes, 0xff, sizeof bytes);
				frame_header(bytes, type, 1, 0xffffffff, lengths[l]);
				start();
				feed(bytes, cut);
				feed_zeros(32780);
				feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
				CHECK(finds_sync());
			}
}

static void test_garbage(void)
{
	srand(1);
	for (int round = 0; round < 200; round++) {
		uint8_t noise[3000];
		start();
		for (size_t i = 0; i < sizeof noise; i++)
			noise[i] = (uint8_t)rand();
		feed(noise, sizeof noise);
		struct frame f;
		while (framer_next(&framer, &f) != FRAMER_MORE)
			;
		feed_zeros(32780);
		feed_frame(T_SYNC, 0, 0, nonce, NONCE_SIZE);
		CHECK(finds_sync());
	}
}

/* --- parameters --- */

static uint8_t buf[PARAMS_MAX + 1];
static size_t len;

static void begin(int op, int flags)
{
	put16(buf, (uint16_t)op);
	put16(buf + 2, (uint16_t)flags);
	len = 4;
}

static void add(int tag, const void *p, size_t n)
{
	put16(buf + len, (uint16_t)tag);
	put16(buf + len + 2, 0);
	put32(buf + len + 4, (uint32_t)n);
	memcpy(buf + len + 8, p, n);
	len += 8 + n;
}

static const char *decode(struct request *r)
{
	buf[len] = 0xee;
	return params_decode(r, buf, len);
}

static void test_params(void)
{
	struct request r;
	begin(OP_EXEC, OPEN_PTY | OPEN_DETACH);
	add(TAG_ARG, "echo", 4);
	add(TAG_ENV, "A=1", 3);
	add(TAG_ARG, "", 0);
	add(TAG_TIMEOUT, "\1\0\0\0\0\0\0\1", 8);
	add(TAG_ARG, "x y", 3);
	add(TAG_ROWS, "\30\0\0\0", 4);
	add(TAG_USER, "bob:wheel", 9);
	add(TAG_CWD, "/tmp", 4);
	CHECK(decode(&r) == NULL);
	CHECK(r.op == OP_EXEC && r.flags == (OPEN_PTY | OPEN_DETACH));
	CHECK(r.argc == 3 && !strcmp(r.argv[0], "echo") && !strcmp(r.argv[1], "") && !strcmp(r.argv[2], "x y") && !r.argv[3]);
	CHECK(r.envc == 1 && !strcmp(r.envp[0], "A=1") && !r.envp[1]);
	CHECK(r.timeout_ms == 0x0100000000000001 && r.rows == 24 && given(&r, TAG_ROWS) && !given(&r, TAG_COLS));
	CHECK(!strcmp(r.user, "bob:wheel") && !strcmp(r.cwd, "/tmp") && !r.name);
}

static void test_bad_params(void)
{
	struct request r;
	static const struct { int tag; const char *p; size_t n; } bad[] = {
		{0, "", 0}, {TAG_LAST, "", 0}, {TAG_ARG, "a\0b", 3}, {TAG_ENV, "novalue", 7}, {TAG_ROWS, "\1\0", 2},
		{TAG_ROWS, "\0\0\0\0\1\0\0\0", 8}, {TAG_TIMEOUT, "", 0},
		{TAG_NAME, "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", 65},
	};
	for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
		begin(OP_EXEC, 0);
		add(bad[i].tag, bad[i].p, bad[i].n);
		CHECK(decode(&r) != NULL);
	}
	for (size_t cut = 0; cut < 4 + 8 + 4; cut++) {
		begin(OP_EXEC, 0);
		add(TAG_ARG, "echo", 4);
		len = cut;
		CHECK((decode(&r) == NULL) == (cut == 4));
	}
	begin(OP_EXEC, 0);
	add(TAG_CWD, "/", 1);
	add(TAG_CWD, "/", 1);
	CHECK(decode(&r) != NULL);
	begin(0, 0);
	CHECK(decode(&r) != NULL);
	begin(OP_LAST, 0);
	CHECK(decode(&r) != NULL);
	begin(OP_EXEC, 16);
	CHECK(decode(&r) != NULL);
}

static void test_identity(void)
{
	struct request r;
	static uint8_t entropy[ENTROPY_MAX + 1];
	begin(OP_IDENTIFY, 0);
	add(TAG_GENERATION, "01234567-89ab-4def-8123-456789abcdef", GENERATION_SIZE);
	add(TAG_ENTROPY, entropy, ENTROPY_MAX);
	add(TAG_TIME, "\0\0\0\0\0\0\0\x18", 8);
	add(TAG_HOSTNAME, "fork-1", 6);
	add(TAG_MACHINE_ID, "0123456789abcdef0123456789abcdef", MACHINE_ID_SIZE);
	CHECK(decode(&r) == NULL && r.op == OP_IDENTIFY);
	CHECK(!strcmp(r.generation, "01234567-89ab-4def-8123-456789abcdef") && !strcmp(r.hostname, "fork-1"));
	CHECK(!strcmp(r.machine_id, "0123456789abcdef0123456789abcdef") && r.time_ns == 0x1800000000000000);
	CHECK(r.entropy_size == ENTROPY_MAX && memcmp(r.entropy, entropy, ENTROPY_MAX) == 0);
	begin(OP_IDENTIFY, 0);
	add(TAG_ENTROPY, entropy, ENTROPY_MAX + 1);
	CHECK(decode(&r) != NULL);
	begin(OP_IDENTIFY, 0);
	add(TAG_ENTROPY, "", 0);
	add(TAG_ENTROPY, "", 0);
	CHECK(decode(&r) != NULL);
	for (int op = OP_QUIESCE; op < OP_LAST; op++) {
		begin(op, 0);
		CHECK(decode(&r) == NULL && r.op == op && r.given == 0);
	}
}

/* As a new host does to a machine that was saved while it was quiet, and as the port then may be: parts of the SYNC before the news of the host. */
static void test_restart(void)
{
	uint8_t bytes[FRAME_HEADER + NONCE_SIZE];
	struct frame f;
	frame_header(bytes, T_SYNC, 0, 0, NONCE_SIZE);
	memcpy(bytes + FRAME_HEADER, nonce, NONCE_SIZE);
	for (size_t cut = 0; cut <= sizeof bytes; cut++) {
		start();
		feed_frame(T_OPEN, 0, 1, "\13\0\0\0", 4);
		CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.type == T_OPEN);
		feed(bytes, cut);
		framer_restart(&framer);
		feed(bytes + cut, sizeof bytes - cut);
		feed_frame(T_OPEN, 0, 1, "\15\0\0\0", 4);
		CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.type == T_SYNC && memcmp(f.payload, nonce, NONCE_SIZE) == 0);
		CHECK(framer_next(&framer, &f) == FRAMER_FRAME && f.type == T_OPEN && f.length == 4);
	}
	start();
	framer_restart(&framer);
	feed_frame(T_OPEN, 0, 1, "\15\0\0\0", 4);
	CHECK(framer_next(&framer, &f) == FRAMER_MORE); /* whatever comes before a SYNC is no frame */
}

static void test_most_params(void)
{
	struct request r;
	begin(OP_EXEC, 0);
	while (len + 8 <= PARAMS_MAX)
		add(len % 32 == 4 ? TAG_ENV : TAG_ARG, "", 0);
	CHECK(decode(&r) != NULL); /* an ENV without = */
	begin(OP_EXEC, 0);
	while (len + 8 <= PARAMS_MAX)
		add(TAG_ARG, "", 0);
	CHECK(decode(&r) == NULL && r.argc == (PARAMS_MAX - 4) / 8);
}

static void test_ring(void)
{
	enum { SIZE = 16 };
	struct ring r = {0, 0};
	uint8_t store[SIZE], next_in = 0, next_out = 0;
	srand(2);
	for (int i = 0; i < 10000; i++) {
		uint8_t p[SIZE];
		uint32_t n = (uint32_t)rand() % (SIZE + 1);
		for (uint32_t k = 0; k < n; k++)
			p[k] = next_in++;
		if (r.length + n > SIZE)
			next_out = (uint8_t)(next_out + r.length + n - SIZE);
		ring_push(&r, store, SIZE, p, n);
		uint32_t take = ring_peek(&r, SIZE);
		take = take ? (uint32_t)rand() % (take + 1) : 0;
		for (uint32_t k = 0; k < take; k++)
			if (store[r.start + k] != next_out++)
				CHECK(!"order");
		ring_take(&r, SIZE, take);
	}
	CHECK(r.length <= SIZE);
}

int main(void)
{
	test_frames();
	test_filled_up();
	test_byte_by_byte();
	test_largest();
	test_before_sync();
	test_resync();
	test_garbage();
	test_params();
	test_bad_params();
	test_identity();
	test_restart();
	test_most_params();
	test_ring();
	return check_report();
}
