/* Who the machine is. After a restore the host says it anew, before anything else is done. */
#ifndef RAMET_IDENTITY_H
#define RAMET_IDENTITY_H

#include "params.h"

/* Open on /dev/urandom since before the guest could have taken it away. */
extern int random_fd;

/* Makes /run/ramet, a generation, and, when machine_id is given, the machine's id; root is put before each path (for tests). What fails is said on the
 * console. Without this call, IDENTIFY is refused: the system is not ours. */
void identity_begin(const char *root, const char *machine_id);
/* The op IDENTIFY; the answer goes to the port. */
void identity_take(uint32_t stream, const struct request *r);

#endif
