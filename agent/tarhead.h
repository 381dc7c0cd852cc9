/* The headers of tar archives, to and from bytes. Pure. */
#ifndef RAMET_TARHEAD_H
#define RAMET_TARHEAD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TAR_BLOCK = 512, TAR_NAME_MAX = 16 * 1024, TAR_PAX_MAX = 64 * 1024 };

struct tar_entry {
	char type; /* '0' file, '1' hard link, '2' symbolic link, '3' '4' devices, '5' directory, '6' fifo; x g L K as in the archive */
	unsigned mode, uid, gid, major, minor;
	int64_t size, mtime;
	long mtime_ns;
	char name[TAR_NAME_MAX], link[TAR_NAME_MAX];
};

/* The bytes a header with its pax extensions may need at most. */
enum { TAR_ENCODED_MAX = 2 * TAR_NAME_MAX + 8 * TAR_BLOCK };
/* Returns how many bytes of out were filled. */
size_t tar_encode(const struct tar_entry *e, uint8_t *out);

enum tar_result { TAR_OK, TAR_END, TAR_BAD };
enum tar_result tar_decode(struct tar_entry *e, const uint8_t *block);

/* What extensions say about the entry that follows. */
struct tar_extension {
	bool has_name, has_link, has_size, has_mtime, has_uid, has_gid;
	struct tar_entry entry;
};
/* NULL, or what is wrong with the records. */
const char *tar_extend(struct tar_extension *x, const uint8_t *p, size_t n);
/* The bytes of a GNU long name ('L') or link ('K'). */
const char *tar_long_name(struct tar_extension *x, char type, const uint8_t *p, size_t n);
void tar_apply(struct tar_entry *e, struct tar_extension *x);

/* Into a relative path without "." and empty parts; "" is the top. false: absolute, or with "..". */
bool tar_clean_name(char *name);

#endif
