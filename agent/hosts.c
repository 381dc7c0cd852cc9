#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
#include "hosts.h"

static const char head[] = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 ";

void hosts_text(char *text, const char *name)
{
	snprintf(text, HOSTS_MAX, "%s%.*s\n", head, HOSTNAME_MAX, name);
}

int hosts_rename(const char *path, const char *name)
{
	enum { HEAD = sizeof head - 1 };
	char old[HOSTS_MAX], new[HOSTS_MAX];
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT ? 0 : -1;
	ssize_t n = read(fd, old, sizeof old);
	close(fd);
	/* Ours: the head, one name, and the end of the line and of the file. */
	if (n <= HEAD + 1 || n == sizeof old || memcmp(old, head, HEAD) != 0 || memchr(old + HEAD, '\n', (size_t)n - HEAD) != old + n - 1 ||
	    memchr(old + HEAD, ' ', (size_t)n - HEAD))
		return 0;
	hosts_text(new, name);
	size_t length = strlen(new);
	if (length == (size_t)n && memcmp(old, new, length) == 0)
		return 0;
	fd = open(path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	int result = pwrite(fd, new, length, 0) == (ssize_t)length && ftruncate(fd, (off_t)length) == 0 ? 0 : -1;
	int error = errno;
	close(fd);
	errno = error;
	return result;
}
