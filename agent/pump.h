/* Moves bytes: port to processes and connections, and back, each in its turn and only as far as its credit goes. */
#ifndef RAMET_PUMP_H
#define RAMET_PUMP_H

#include <poll.h>
#include "slot.h"

enum { PUMP_POLL_MAX = 3 * SLOTS };

/* Frames of the host. false: it broke the rules of the stream. */
bool pump_data(struct slot *s, const uint8_t *p, uint32_t n);
void pump_eof(struct slot *s);
bool pump_credit(struct slot *s, int channel, uint32_t n);

int pump_poll(struct pollfd *p);
void pump_polled(const struct pollfd *p, int n);
/* Frames for the port while there is room in it; true when somebody may have more to say. */
bool pump_emit(void);

#endif
