/* From the kernel's first process to an open port. */
#ifndef RAMET_BOOT_H
#define RAMET_BOOT_H

#include <stdbool.h>

struct boot {
	int port_fd, proc_fd, sys_fd;
	const char *init; /* the image's own */
	bool test;        /* beside an ordinary system, on a descriptor that was handed over */
};

void boot_machine(struct boot *b, char *argv0);
void boot_beside(struct boot *b, int fd);
void boot_ready(void);

/* For the parts of the start-up. */
void boot_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
_Noreturn void boot_fatal(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* The value of a word of the kernel's command line, or NULL. */
const char *boot_word(const char *name);
/* The same of a word that may be there several times; at: which of them, from 0. */
const char *boot_word_at(const char *name, int at);
/* Sleeps until the kernel reports something about a device, or a moment; false when the time for devices is over. */
bool boot_wait_device(void);
/* Loops over what the paths of a file system need. */
void boot_directory(const char *path, unsigned mode);

#endif
