#ifndef RAMET_DIAL_H
#define RAMET_DIAL_H

#include "params.h"
#include "slot.h"

void dial_open(uint32_t stream, const struct request *r);
/* The connection is there, or will never be. */
void dial_connected(struct slot *s);
int dial_deadlines(void);

#endif
