/* What the host's frames mean. */
#ifndef RAMET_SERVE_H
#define RAMET_SERVE_H

#include <stdbool.h>

/* proc_fd: a directory descriptor of /proc. */
void serve_begin(int proc_fd);
/* Handles the frames that have come, as long as there is room for the answers; true when some had to wait. */
bool serve_input(void);
/* The connection is over: streams end, detached processes stay. */
void serve_disconnect(void);

#endif
