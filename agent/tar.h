/* Whole trees to tar streams and back. */
#ifndef RAMET_TAR_H
#define RAMET_TAR_H

#include <stdbool.h>
#include <stddef.h>

struct tar_failure {
	int error;
	char message[256], path[1024];
};

/* Into the directory root. false: *f says why; what was unpacked until then stays. */
bool tar_unpack(int in, int root, bool owners, bool root_is_new, struct tar_failure *f);
/* The number of what could not be read, each said on stderr; or -1: the stream broke. */
int tar_pack(int out, const char *path);

#endif
