#include <stddef.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include "slot.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

struct slot slots[SLOTS];
int slots_top;

/* 64 MiB of addresses; memory only where something was put, and only until the slot is free again. */
static struct store {
	uint8_t kept[2][KEPT_SIZE];
	uint8_t pending[PENDING_SIZE];
} stores[SLOTS] __attribute__((aligned(4096)));
static bool touched[SLOTS];

void slots_begin(void)
{
	/* A forked child needs none of it, so it need not pay for the page tables. */
	madvise(stores, sizeof stores, MADV_DONTFORK);
}

static void clear(struct slot *s, enum slot_kind kind)
{
	/* Not the whole struct: the command line at its end would be a kilobyte of zeroing per process. */
	memset(s, 0, offsetof(struct slot, name));
	s->name[0] = s->command[0] = 0;
	s->connecting = false;
	s->error = 0;
	s->next_id = 0;
	s->kind = kind;
	s->in.fd = s->out[0].fd = s->out[1].fd = -1;
}

static struct slot *oldest_finished(void)
{
	struct slot *oldest = NULL;
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind == PROCESS && s->state != RUNNING && s->stream == 0 && (!oldest || s->id < oldest->id))
			oldest = s;
	return oldest;
}

struct slot *slot_new(enum slot_kind kind, uint32_t stream)
{
	struct slot *s = slots;
	while (s < slots + slots_top && s->kind != FREE)
		s++;
	if (s == slots + SLOTS) {
		s = oldest_finished();
		if (!s)
			return NULL;
		slot_free(s);
	}
	clear(s, kind);
	if (s - slots >= slots_top)
		slots_top = (int)(s - slots) + 1;
	slot_attach(s, stream);
	return s;
}

void slot_attach(struct slot *s, uint32_t stream)
{
	s->stream = stream;
	s->in.consumed = 0;
	s->in.window = CREDIT_START;
	for (int c = 0; c < 2; c++) {
		s->out[c].credit = CREDIT_START;
		s->out[c].eof_sent = false;
	}
	/* The new stream may send 64 KiB at once. Nobody can tell how much of a cut-off stream's input arrived, so the excess is cut too. */
	if (s->in.pending.length > PENDING_SIZE - CREDIT_START)
		s->in.pending.length = PENDING_SIZE - CREDIT_START;
}

void slot_close_input(struct slot *s)
{
	/* A terminal and a connection have one descriptor for both directions. */
	if (s->in.fd >= 0 && s->in.fd != s->out[0].fd)
		close(s->in.fd);
	s->in.fd = -1;
	s->in.done = true;
	s->in.consumed += s->in.pending.length;
	s->in.pending = (struct ring){0, 0};
}

void slot_close(struct slot *s)
{
	slot_close_input(s);
	for (int c = 0; c < 2; c++) {
		if (s->out[c].fd >= 0)
			close(s->out[c].fd);
		s->out[c].fd = -1;
		s->out[c].eof = true;
	}
}

void slot_free(struct slot *s)
{
	size_t i = (size_t)(s - slots);
	slot_close(s);
	if (touched[i]) {
		/* The plain advice is refused for locked memory. */
		if (madvise(&stores[i], sizeof stores[i], MADV_DONTNEED_LOCKED) < 0)
			madvise(&stores[i], sizeof stores[i], MADV_DONTNEED);
		touched[i] = false;
	}
	s->kind = FREE;
	s->stream = 0;
	while (slots_top > 0 && slots[slots_top - 1].kind == FREE)
		slots_top--;
}

struct slot *slot_of_stream(uint32_t stream)
{
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind != FREE && s->stream == stream)
			return s;
	return NULL;
}

struct slot *slot_of_process(uint32_t id)
{
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind == PROCESS && !s->dying && s->id == id)
			return s;
	return NULL;
}

struct slot *slot_of_pid(pid_t pid)
{
	for (struct slot *s = slots; s < slots + slots_top; s++)
		if (s->kind == PROCESS && s->pid == pid)
			return s;
	return NULL;
}

uint8_t *slot_kept(const struct slot *s, int channel)
{
	touched[s - slots] = true;
	return stores[s - slots].kept[channel];
}

uint8_t *slot_pending(const struct slot *s)
{
	touched[s - slots] = true;
	return stores[s - slots].pending;
}

uint64_t now_ms(void)
{
	/* The coarse clock reads no hardware, which a virtual machine would pay for dearly. */
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC_COARSE, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

uint64_t deadline_after(uint64_t ms)
{
	enum { TICK_MS = 4 };
	return ms > UINT32_MAX * (uint64_t)1000 ? 0 : now_ms() + ms + TICK_MS;
}
