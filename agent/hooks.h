#ifndef RAMET_HOOKS_H
#define RAMET_HOOKS_H

/* Runs the executable files of a directory by name, one after another, until one fails; 1 and a line on stderr then, else 0. */
int hooks_run(const char *directory, const char *generation, const char *name);

#endif
