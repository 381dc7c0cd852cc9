/* Counting assertions; the last line says how many there were. */
#ifndef RAMET_CHECK_H
#define RAMET_CHECK_H

#include <stdio.h>

static int passed, failed;

#define CHECK(condition) \
	((condition) ? (void)passed++ : (void)(failed++, fprintf(stderr, "%s:%d: %s: not so: %s\n", __FILE__, __LINE__, __func__, #condition)))

static inline int check_report(void)
{
	printf("%d passed, %d failed\n", passed, failed);
	return failed != 0;
}

#endif
