/* The agent's own functions, run in a child process of their own. They may allocate and block. */
#ifndef RAMET_BUILTIN_H
#define RAMET_BUILTIN_H

#include <stdbool.h>

enum { BUILTIN_ARGUMENTS = 16 }; /* at most, besides the name */

bool builtin_exists(const char *name);
/* The exit status. */
int builtin_run(int argc, char **argv);

/* Says `errno-number message: path` on stderr; returns 1, the exit status that goes with it. */
int builtin_fail(const char *path);
int builtin_fail_with(int error, const char *message, const char *path);
/* A number in base 8 or 10; false when it is none. */
bool builtin_number(const char *s, int base, long long *value);
bool write_all(int fd, const void *p, unsigned long n);
/* mkdir -p of what is before the last slash, or of all of it. */
int make_parents(const char *path, unsigned mode, bool all);

int builtin_read(char **argv);
int builtin_write(char **argv);
int builtin_stat(char **argv);
int builtin_list(char **argv);
int builtin_remove(char **argv);
int builtin_pack(char **argv);
int builtin_unpack(char **argv);
int builtin_hooks(char **argv);
int builtin_reclaim(char **argv);
int builtin_tune(char **argv);
int builtin_slim(char **argv);

#endif
