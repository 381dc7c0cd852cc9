/* Bytes through the framer, and every OPEN through the decoder of parameters, in reads of odd sizes. */
#include <assert.h>
#include <stdlib.h>
#include "../frame.h"
#include "../params.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct framer framer;

static void decode(const struct frame *f)
{
	/* Exactly as large as it is said to be, so that the sanitizer sees each byte beyond. */
	uint8_t *copy = malloc(f->length + 1);
	struct request r;
	memcpy(copy, f->payload, f->length);
	const char *wrong = params_decode(&r, copy, f->length);
	if (!wrong) {
		size_t total = 0;
		assert(r.op > 0 && r.op < OP_LAST && !r.argv[r.argc] && !r.envp[r.envc]);
		for (int i = 0; i < r.argc; i++)
			total += strlen(r.argv[i]);
		for (int i = 0; i < r.envc; i++)
			total += strlen(r.envp[i]);
		assert(total <= f->length);
		for (int i = 0; i < r.envc; i++)
			assert(strchr(r.envp[i], '='));
		assert(!r.name || strlen(r.name) <= NAME_MAX_BYTES);
		assert(!r.hostname || strlen(r.hostname) <= f->length);
		assert(!r.machine_id || strlen(r.machine_id) <= f->length);
		assert(!r.generation || strlen(r.generation) <= f->length);
		assert(given(&r, TAG_ENTROPY) == (r.entropy != NULL) && r.entropy_size <= ENTROPY_MAX);
		assert(!r.entropy || (r.entropy >= copy && r.entropy + r.entropy_size <= copy + f->length));
	}
	free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct frame f;
	if (size < 1)
		return 0;
	size_t most = data[0] + 1u;
	/* Half of the runs start in the middle of things; some are told of a new connection there. */
	framer_reset(&framer, true);
	framer.lost = data[0] & 1;
	bool restart = data[0] & 2;
	data++;
	size--;
	while (size > 0) {
		size_t room, n = size < most ? size : most;
		uint8_t *p = framer_space(&framer, &room);
		assert(room >= n);
		memcpy(p, data, n);
		framer_filled(&framer, n);
		data += n;
		size -= n;
		if (restart && size < most)
			framer_restart(&framer);
		for (enum framer_result r; (r = framer_next(&framer, &f)) != FRAMER_MORE;) {
			assert(framer.start <= framer.end && framer.end <= sizeof framer.buf);
			assert((r == FRAMER_BAD) == framer.lost);
			if (r == FRAMER_FRAME) {
				assert(f.type != 0 && f.length <= FRAME_PAYLOAD_MAX);
				if (f.type == T_OPEN)
					decode(&f);
			}
		}
	}
	return 0;
}
