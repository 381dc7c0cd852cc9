/* The /etc/hosts that a machine gets when its image has none. */
#ifndef RAMET_HOSTS_H
#define RAMET_HOSTS_H

#include "wire.h"

enum { HOSTS_MAX = 128 + HOSTNAME_MAX };

/* Into HOSTS_MAX bytes; name is at most HOSTNAME_MAX bytes. */
void hosts_text(char *text, const char *name);
/* Changes the name in a file that is exactly ours but for it; any other file, or none, is left alone. -1 with errno. */
int hosts_rename(const char *path, const char *name);

#endif
