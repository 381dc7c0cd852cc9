#include <errno.h>
#include <sys/epoll.h>
#include <sys/stat.h>
#include <unistd.h>
#include "port.h"
#include "wire.h"

enum { OUT_SIZE = 2 * FRAME_MAX, WRITE_MOST = 32 * 1024, WRITE_LEAST = 512, RETRY_MS = 20 };

struct framer port_in;
bool port_quiet;

static int port_fd;
static bool is_port; /* a character device; else a socket */
static bool host_gone;
static int connect_watch; /* an epoll descriptor that becomes readable when the host connects */
static uint8_t out[OUT_SIZE];
static uint32_t out_start, out_end;
static bool full;        /* the kernel took less than offered: wait for POLLOUT */
static bool no_memory;   /* the kernel had no buffer: wait a moment, then offer less */
static uint32_t write_most = WRITE_MOST;

void port_begin(int fd)
{
	struct stat st;
	port_fd = fd;
	is_port = fstat(fd, &st) == 0 && S_ISCHR(st.st_mode);
	framer_reset(&port_in, true);
	if (!is_port)
		return;
	/* poll() reports HUP all the time while nobody is connected. Edge-triggered, the same is reported once per wake-up of the port, and the
	 * driver wakes its sleepers when the host connects: so this descriptor sleeps until then. */
	connect_watch = epoll_create1(EPOLL_CLOEXEC);
	epoll_ctl(connect_watch, EPOLL_CTL_ADD, fd, &(struct epoll_event){.events = EPOLLIN | EPOLLET});
}

struct pollfd port_pollfd(bool want_input)
{
	if (host_gone)
		return (struct pollfd){.fd = connect_watch, .events = POLLIN};
	return (struct pollfd){.fd = port_fd, .events = (short)((want_input ? POLLIN : 0) | (full ? POLLOUT : 0))};
}

static bool hung_up(void)
{
	struct pollfd p = {.fd = port_fd, .events = POLLIN};
	return poll(&p, 1, 0) > 0 && (p.revents & POLLHUP);
}

static enum port_event gone(void)
{
	struct epoll_event ignored;
	if (!is_port)
		return PORT_GONE;
	host_gone = true;
	full = false;
	port_forget_output();
	if (port_quiet) {
		/* The old connection left nothing behind: what is there is the new one's, which may be faster than the news of it. */
		framer_restart(&port_in);
	} else {
		framer_reset(&port_in, true);
		/* What the old connection left behind is of no use, and must not be taken for the new one's. */
		while (read(port_fd, out, sizeof out) > 0)
			;
	}
	/* An old wake-up counts no more; one that comes from here on does. */
	epoll_wait(connect_watch, &ignored, 1, 0);
	if (!hung_up())
		host_gone = false;
	return PORT_GONE;
}

static enum port_event read_input(void)
{
	size_t room;
	uint8_t *p = framer_space(&port_in, &room);
	if (room == 0)
		return PORT_INPUT;
	ssize_t n = read(port_fd, p, room);
	if (n > 0)
		framer_filled(&port_in, (size_t)n);
	else if (n == 0 || (errno != EAGAIN && errno != EINTR))
		return hung_up() || !is_port ? gone() : PORT_NOTHING;
	return n > 0 ? PORT_INPUT : PORT_NOTHING;
}

enum port_event port_event(short revents)
{
	if (host_gone) {
		struct epoll_event ignored;
		if (revents & POLLIN) {
			epoll_wait(connect_watch, &ignored, 1, 0);
			host_gone = hung_up();
		}
		return PORT_NOTHING;
	}
	if (revents & POLLOUT)
		full = false;
	if (revents & (POLLHUP | POLLERR | POLLNVAL))
		return is_port ? gone() : read_input();
	return revents & POLLIN ? read_input() : PORT_NOTHING;
}

int port_retry_ms(void)
{
	return no_memory ? RETRY_MS : -1;
}

uint32_t port_room(void)
{
	return OUT_SIZE - (out_end - out_start);
}

bool port_empty(void)
{
	return out_start == out_end;
}

uint8_t *port_reserve(uint32_t n)
{
	if (n > port_room())
		return NULL;
	if (out_start == out_end) {
		out_start = out_end = 0;
	} else if (n > OUT_SIZE - out_end) {
		memmove(out, out + out_start, out_end - out_start);
		out_end -= out_start;
		out_start = 0;
	}
	return out + out_end;
}

void port_commit(uint32_t n)
{
	out_end += n;
}

void port_flush(void)
{
	no_memory = false;
	while (out_start < out_end && !full && !host_gone) {
		uint32_t n = out_end - out_start;
		ssize_t done = write(port_fd, out + out_start, n < write_most ? n : write_most);
		if (done > 0) {
			out_start += (uint32_t)done;
			write_most = WRITE_MOST;
		} else if (done < 0 && errno == ENOMEM) {
			/* The driver copies each write into one physically contiguous buffer: in a full guest only small ones exist. */
			if (write_most > WRITE_LEAST) {
				write_most /= 2;
				continue;
			}
			no_memory = true;
			return;
		} else if (done == 0 || errno != EINTR) {
			full = true; /* or the host has gone, which poll will say */
		}
	}
}

void port_forget_output(void)
{
	out_start = out_end = 0;
}

bool port_frame(enum frame_type type, uint8_t flags, uint32_t stream, const void *payload, uint32_t length)
{
	uint8_t *p = port_reserve(FRAME_HEADER + length);
	if (!p)
		return false;
	frame_header(p, type, flags, stream, length);
	if (length)
		memcpy(p + FRAME_HEADER, payload, length);
	port_commit(FRAME_HEADER + length);
	return true;
}

bool port_end(uint32_t stream, enum end_kind kind, int code, const char *message)
{
	size_t length = message ? strlen(message) : 0;
	if (length > MESSAGE_MAX)
		length = MESSAGE_MAX;
	uint8_t *p = port_reserve(FRAME_HEADER + 8 + (uint32_t)length);
	if (!p)
		return false;
	frame_header(p, T_END, 0, stream, 8 + (uint32_t)length);
	p += FRAME_HEADER;
	memset(p, 0, 4);
	p[0] = (uint8_t)kind;
	put32(p + 4, (uint32_t)code);
	if (length)
		memcpy(p + 8, message, length);
	port_commit(FRAME_HEADER + 8 + (uint32_t)length);
	return true;
}
