/* From a request to a running process: user, environment, descriptors, and what went wrong. */
#ifndef RAMET_EXEC_H
#define RAMET_EXEC_H

#include <stdbool.h>
#include <sys/types.h>
#include "params.h"

struct launch {
	const struct request *request; /* its envp gets the defaults added */
	int fd[3];                     /* the child's stdin, stdout, stderr */
	bool pty;
};

void exec_begin(bool first_process);

/* The process id; or -1 with errno and a message: nothing was run. */
pid_t exec_launch(const struct launch *l, char *message, size_t size);

#endif
