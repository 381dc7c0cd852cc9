/* The virtio-serial port: buffered both ways, never blocking, and quiet while no host is there. */
#ifndef RAMET_PORT_H
#define RAMET_PORT_H

#include <poll.h>
#include "frame.h"

/* fd is non-blocking. A socket or pipe instead of a port (for tests): PORT_GONE is for good then. */
void port_begin(int fd);
extern struct framer port_in;
/* The host is about to save the machine: what is queued goes out, and then nobody may queue more. The host sends nothing either, so both directions
 * are between two frames. */
extern bool port_quiet;

/* What to poll for, and what came of it. */
struct pollfd port_pollfd(bool want_input);
enum port_event { PORT_NOTHING, PORT_INPUT, PORT_GONE };
enum port_event port_event(short revents);
/* Milliseconds until port_flush() is worth another try, or -1. */
int port_retry_ms(void);

/* Room for at least n bytes in one piece, or NULL; then say how many were used. */
uint8_t *port_reserve(uint32_t n);
void port_commit(uint32_t n);
uint32_t port_room(void);
bool port_empty(void);
void port_flush(void);
void port_forget_output(void);

/* False when the port is too full; ask port_room() first where that matters. */
bool port_frame(enum frame_type type, uint8_t flags, uint32_t stream, const void *payload, uint32_t length);
bool port_end(uint32_t stream, enum end_kind kind, int code, const char *message);

#endif
