#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>
#include "terminal.h"

#ifndef TIOCGPTPEER
#define TIOCGPTPEER 0x5441
#endif

int terminal_dev = AT_FDCWD;

int terminal_resize(int fd, uint32_t rows, uint32_t cols)
{
	struct winsize w = {.ws_row = (unsigned short)(rows ? rows : 24), .ws_col = (unsigned short)(cols ? cols : 80)};
	if (rows > UINT16_MAX || cols > UINT16_MAX) {
		errno = EINVAL;
		return -1;
	}
	return ioctl(fd, TIOCSWINSZ, &w);
}

int terminal_open(int *ours, int *theirs, uint32_t rows, uint32_t cols)
{
	int unlock = 0;
	struct termios mode;
	int flags = O_RDWR | O_NOCTTY | O_CLOEXEC;
	int fd = openat(terminal_dev, terminal_dev == AT_FDCWD ? "/dev/ptmx" : "ptmx", flags | O_NONBLOCK);
	if (fd < 0)
		return -1;
	int peer = -1;
	if (ioctl(fd, TIOCSPTLCK, &unlock) < 0 || (peer = ioctl(fd, TIOCGPTPEER, flags)) < 0 || terminal_resize(fd, rows, cols) < 0) {
		int error = errno;
		close(fd);
		if (peer >= 0)
			close(peer);
		errno = error;
		return -1;
	}
	/* Without it, erasing a character of several bytes leaves some of them. */
	if (tcgetattr(peer, &mode) == 0) {
		mode.c_iflag |= IUTF8;
		tcsetattr(peer, TCSANOW, &mode);
	}
	*ours = fd;
	*theirs = peer;
	return 0;
}
