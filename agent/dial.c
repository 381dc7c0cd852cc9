#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include "dial.h"
#include "port.h"

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
	struct sockaddr_un local;
};

static socklen_t parse(union address *a, const char *host, uint32_t port)
{
	memset(a, 0, sizeof *a);
	if (strncmp(host, "unix:", 5) == 0) {
		size_t n = strlen(host + 5);
		if (n == 0 || n >= sizeof a->local.sun_path)
			return 0;
		a->local.sun_family = AF_UNIX;
		memcpy(a->local.sun_path, host + 5, n + 1);
		return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + n + 1);
	}
	if (port == 0 || port > UINT16_MAX)
		return 0;
	if (inet_pton(AF_INET, host, &a->v4.sin_addr) == 1) {
		a->v4.sin_family = AF_INET;
		a->v4.sin_port = htons((uint16_t)port);
		return sizeof a->v4;
	}
	if (inet_pton(AF_INET6, host, &a->v6.sin6_addr) == 1) {
		a->v6.sin6_family = AF_INET6;
		a->v6.sin6_port = htons((uint16_t)port);
		return sizeof a->v6;
	}
	return 0;
}

static void refuse(uint32_t stream, int error)
{
	char message[128];
	snprintf(message, sizeof message, "cannot connect: %s", strerror(error));
	port_end(stream, END_FAILED, error, message);
}

static void established(struct slot *s)
{
	s->connecting = false;
	s->deadline = 0;
	s->started_due = true;
	if (s->in.eof && s->in.pending.length == 0) {
		shutdown(s->in.fd, SHUT_WR);
		slot_close_input(s);
	}
}

void dial_open(uint32_t stream, const struct request *r)
{
	union address a;
	socklen_t length = parse(&a, r->host ? r->host : "127.0.0.1", r->port);
	if (length == 0) {
		port_end(stream, END_FAILED, EINVAL, "not an address: an IPv4 or IPv6 literal with a port, or unix:/path");
		return;
	}
	struct slot *s = slot_new(CONNECTION, stream);
	if (!s) {
		port_end(stream, END_FAILED, EAGAIN, "too many streams");
		return;
	}
	int fd = socket(a.any.sa_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	int result = fd < 0 ? -1 : connect(fd, &a.any, length);
	if (fd < 0 || (result < 0 && errno != EINPROGRESS)) {
		int error = errno;
		if (fd >= 0)
			close(fd);
		slot_free(s);
		refuse(stream, error);
		return;
	}
	/* Frames are written as they come; waiting for more would only delay them. */
	if (a.any.sa_family != AF_UNIX)
		setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
	s->in.fd = s->out[0].fd = fd;
	s->out[0].exists = true;
	s->connecting = true;
	if (r->timeout_ms)
		s->deadline = deadline_after(r->timeout_ms);
	if (result == 0)
		established(s);
}

void dial_connected(struct slot *s)
{
	int error = 0;
	socklen_t length = sizeof error;
	if (getsockopt(s->in.fd, SOL_SOCKET, SO_ERROR, &error, &length) < 0)
		error = errno;
	if (error == 0) {
		established(s);
		return;
	}
	uint32_t stream = s->stream;
	slot_free(s);
	refuse(stream, error);
}

int dial_deadlines(void)
{
	uint64_t now = 0, next = UINT64_MAX;
	for (struct slot *s = slots; s < slots + slots_top; s++) {
		if (s->kind != CONNECTION || s->deadline == 0)
			continue;
		if (now == 0)
			now = now_ms();
		if (s->deadline <= now) {
			uint32_t stream = s->stream;
			slot_free(s);
			refuse(stream, ETIMEDOUT);
		} else if (s->deadline < next) {
			next = s->deadline;
		}
	}
	return next == UINT64_MAX ? -1 : next - now > 60000 ? 60000 : (int)(next - now) + 1;
}
