#ifndef RAMET_LIST_H
#define RAMET_LIST_H

#include "slot.h"

void list_open(uint32_t stream);
/* One frame of the listing, or its end; false when it has to wait for credit or room. */
bool list_emit(struct slot *s);

#endif
