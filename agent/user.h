/* Who a process runs as: the guest's /etc/passwd and /etc/group, read without a libc's help. */
#ifndef RAMET_USER_H
#define RAMET_USER_H

#include <sys/types.h>

enum { GROUPS_MAX = 128, USER_TEXT_MAX = 256 };

struct user {
	uid_t uid;
	gid_t gid;
	int groups_count;
	gid_t groups[GROUPS_MAX];
	char name[USER_TEXT_MAX], home[USER_TEXT_MAX], shell[USER_TEXT_MAX];
};

/* spec as in PROTOCOL.md, NULL for root. Returns NULL and writes a message when there is no such user or group. */
const struct user *user_find(const char *spec, char *message, size_t size);

#endif
