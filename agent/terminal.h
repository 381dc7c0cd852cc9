#ifndef RAMET_TERMINAL_H
#define RAMET_TERMINAL_H

#include <stdint.h>

/* The agent's side (non-blocking) and the process's side of a new terminal; 0 rows or columns: 24 by 80. */
int terminal_open(int *ours, int *theirs, uint32_t rows, uint32_t cols);
int terminal_resize(int fd, uint32_t rows, uint32_t cols);
/* Where ptmx is opened, for guests whose root has no /dev. */
extern int terminal_dev;

#endif
