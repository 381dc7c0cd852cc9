/* The end of the machine. */
#ifndef RAMET_POWER_H
#define RAMET_POWER_H

#include <stdbool.h>
#include <stdint.h>

enum power_mode { POWER_SELF, POWER_ASK_INIT, POWER_EXIT };
void power_begin(enum power_mode mode);
/* Once what is in the port has gone out. */
void power_off_soon(uint64_t grace_ms);
/* Called when the loop is about to sleep; milliseconds until it wants to be called again, or -1. Does not return when it is time. */
int power_due(bool port_empty);
_Noreturn void power_off_now(void);

#endif
