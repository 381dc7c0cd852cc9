#ifndef RAMET_METRICS_H
#define RAMET_METRICS_H

#include <stdint.h>

void metrics_begin(int proc_fd, int sys_fd);
void metrics_answer(uint32_t stream);

#endif
